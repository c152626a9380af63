"""Which parameters decay and how fast they learn, and the optimizer over them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clip_train.training.lamb import Lamb
from clip_train.training.lion import Lion
from clip_train.training.muon import MuonAdamW, Share

Parameters = Iterable[tuple[str, nn.Parameter]]


def decay_groups(
    parameters: Parameters, weight_decay: float, no_decay: set[str], lr_scales: Mapping[str, float] = {}
) -> list[dict[str, Any]]:
    """Matrices, convolutions and embeddings decay; gains, biases and other vectors do not.

    As in CLIP (section 2.5: "all weights that are not gains or biases"), token and position embeddings decay.
    `no_decay` names further parameters that a tower wants left alone. `lr_scales` gives factors of the learning rate
    by name, 1 where a name is missing: there is a group for each, which `train_step` honours.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters:
        if parameter.requires_grad:
            decay = 0.0 if parameter.ndim < 2 or name in no_decay else weight_decay
            groups[decay, lr_scales.get(name, 1.0)].append(parameter)
    return [
        {"params": members, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), members in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def adamw(
    parameters: Parameters,
    *,
    no_decay: set[str],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    lr_scales: Mapping[str, float] = {},
) -> torch.optim.Optimizer:
    """Fused AdamW (Loshchilov & Hutter 2019) over decay groups."""
    groups = decay_groups(parameters, weight_decay, no_decay, lr_scales)
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, fused=True)


def lamb(
    parameters: Parameters,
    *,
    no_decay: set[str],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    lr_scales: Mapping[str, float] = {},
) -> torch.optim.Optimizer:
    """LAMB over decay groups."""
    groups = decay_groups(parameters, weight_decay, no_decay, lr_scales)
    return Lamb(groups, lr=lr, betas=(beta1, beta2), eps=eps)


def lion(
    parameters: Parameters,
    *,
    no_decay: set[str],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    lr_scales: Mapping[str, float] = {},
) -> torch.optim.Optimizer:
    """Lion over decay groups."""
    return Lion(decay_groups(parameters, weight_decay, no_decay, lr_scales), lr=lr, betas=(beta1, beta2))


def muon(
    parameters: Parameters,
    *,
    embeddings: set[str],
    no_decay: set[str],
    lr: float,
    momentum: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    lr_scales: Mapping[str, float] = {},
    share: Share | None = None,
) -> torch.optim.Optimizer:
    """Muon over hidden matrices and convolutions; AdamW over embeddings, gains, biases and other vectors.

    Args:
        embeddings: names of the tables whose rows are looked up.
    """
    named = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    # An embedding's rows are looked up one at a time: there is no matrix product whose spectrum matters.
    hidden = [(n, p) for n, p in named if p.ndim >= 2 and n not in embeddings | no_decay]
    names = {name for name, _ in hidden}
    rest = [(name, parameter) for name, parameter in named if name not in names]
    groups = [
        {**group, "orthogonalize": members is hidden}
        for members in (hidden, rest)
        for group in decay_groups(members, weight_decay, no_decay, lr_scales)
    ]
    return MuonAdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, momentum=momentum, share=share)


def named_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's tensors by parameter name: `exp_avg/text.blocks.0...`. Independent of group order."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{key}/{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_named_state(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Inverse of `named_state`. Raises KeyError for a parameter that has no state."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        by_name.setdefault(name, {})[kind] = value
    state = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state["state"] = {index: by_name[names[parameter]] for index, parameter in enumerate(order)} if tensors else {}
    optimizer.load_state_dict(state)
