"""Which parameters decay, and the optimizer over them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from clip_train.training.muon import MuonAdamW, Share


def decay_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, no_decay: set[str]
) -> list[dict[str, Any]]:
    """Two groups: matrices, convolutions and embeddings decay; gains, biases and other vectors do not.

    As in CLIP (section 2.5: "all weights that are not gains or biases"), token and position embeddings decay.
    `no_decay` names further parameters that a tower wants left alone.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in parameters:
        if parameter.requires_grad:
            (kept if parameter.ndim < 2 or name in no_decay else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    no_decay: set[str],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Fused AdamW (Loshchilov & Hutter 2019) over decay groups."""
    groups = decay_groups(parameters, weight_decay, no_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, fused=True)


def muon(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    no_decay: set[str],
    lr: float,
    momentum: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    share: Share | None = None,
) -> torch.optim.Optimizer:
    """Muon over hidden matrices and convolutions; AdamW over embeddings, gains, biases and other vectors."""
    named = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    # An embedding's rows are looked up one at a time: there is no matrix product whose spectrum matters.
    hidden = [(n, p) for n, p in named if p.ndim >= 2 and "embedding" not in n and n not in no_decay]
    names = {name for name, _ in hidden}
    rest = [(name, parameter) for name, parameter in named if name not in names]
    groups = [{"params": [p for _, p in hidden], "weight_decay": weight_decay, "orthogonalize": True}]
    groups += [{**group, "orthogonalize": False} for group in decay_groups(rest, weight_decay, no_decay)]
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
