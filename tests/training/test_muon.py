"""Muon against a singular value decomposition and a hand-written reference; AdamW's part against torch's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from clip_train.config.load import parse_recipe
from clip_train.from_recipe.model import build_model, build_tokenizer
from clip_train.from_recipe.update import build_optimizer
from clip_train.training.muon import POLAR_EXPRESS, MuonAdamW, Share, deal, orthogonalize, orthogonalize_all
from clip_train.training.optimizer import load_named_state, muon, named_state


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16), (8, 80), (80, 8), (300, 640)])
def test_orthogonalize_keeps_singular_vectors_and_levels_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    for given, found in zip(matrices, orthogonalize_all(list(matrices)), strict=True):
        u, _, v = torch.linalg.svd(given, full_matrices=False)
        inside = u.T @ found.float() @ v.T  # diagonal where the singular vectors are the same
        assert (inside.diagonal() > 0.75).all()
        assert (inside.diagonal() < 1.2).all()
        assert (inside - inside.diagonal().diag()).abs().max() < 0.05


@pytest.mark.parametrize("shape", [(64, 64), (64, 192), (64, 640), (640, 64)])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_orthogonalize_of_ill_conditioned_matrices(shape: tuple[int, int], size: float) -> None:
    """Spectra as gradients have them, over six decades: what is above 2 % is levelled and nothing blows up."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(0, -6, 64)
    found = orthogonalize(size * (u * values) @ v).float()
    inside = (u.T @ found @ v.T).diagonal()[values > 0.02]
    assert inside.min() > 0.8
    assert inside.max() < 1.2
    assert torch.linalg.matrix_norm(found, 2) < 1.5


def test_iterations_level_the_interval_they_are_made_for() -> None:
    x = torch.logspace(math.log10(0.005), 0, 10_000, dtype=torch.float64)
    for a, b, c in POLAR_EXPRESS:
        x = a * x + b * x**3 + c * x**5
    assert x.min() == pytest.approx(0.887, abs=1e-3)
    assert x.max() == pytest.approx(1.096, abs=1e-3)


def test_stacked_matrices_are_those_one_by_one() -> None:
    torch.manual_seed(0)
    for shape in ((8, 12), (8, 24), (24, 8), (8, 80)):
        stacked = torch.randn(3, *shape)
        together = orthogonalize(stacked).float()
        assert together.shape == stacked.shape
        for given, found in zip(stacked, together, strict=True):
            torch.testing.assert_close(orthogonalize(given).float(), found, atol=0.03, rtol=0)


def test_a_zero_gradient_moves_nothing() -> None:
    assert torch.equal(orthogonalize(torch.zeros(4, 12)), torch.zeros(4, 12, dtype=torch.bfloat16))


def test_a_convolution_stored_channels_last_moves_the_same() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(6, 5, 3, 3), torch.randn(6, 5, 3, 3)
    moved: list[torch.Tensor] = []
    for form in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(start.clone(memory_format=form))
        optimizer = MuonAdamW(
            [{"params": [weight], "weight_decay": 0.1, "orthogonalize": True}], lr=0.1, betas=(0.9, 0.98), eps=1e-6
        )
        weight.grad = gradient.clone()
        optimizer.step()
        moved.append(weight.detach())
    torch.testing.assert_close(moved[0], moved[1], atol=2e-3, rtol=0)
    assert (moved[0] - start).abs().max() > 0.05


def test_processes_share_the_matrices() -> None:
    """Two that share, each doing its part: what they add up to is what one would do alone, to the bit."""
    torch.manual_seed(0)
    matrices = [torch.randn(shape) for shape in ((4, 6), (6, 4), (4, 40), (9, 9), (3, 3))]
    hands = deal(matrices, 2)
    assert sorted(hands[0] + hands[1]) == list(range(5))
    assert all(hands)
    parts: list[torch.Tensor] = []
    for rank in range(2):
        orthogonalize_all(matrices, Share(rank, 2, lambda tensor: parts.append(tensor.clone())))
    whole = parts[0] + parts[1]
    shared = orthogonalize_all(matrices, Share(0, 2, lambda tensor: tensor.copy_(whole)))
    for one, other in zip(orthogonalize_all(matrices), shared, strict=True):
        assert torch.equal(one, other)


def test_update_of_a_convolution_by_hand() -> None:
    """One step from zero momentum: the update is along U V' of the gradient, scaled to AdamW's size, after decay."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 3, 2, 2))
    before, gradient = weight.detach().clone(), torch.randn(4, 3, 2, 2)
    optimizer = MuonAdamW(
        [{"params": [weight], "weight_decay": 0.5, "orthogonalize": True}], lr=0.1, betas=(0.9, 0.98), eps=1e-6
    )
    weight.grad = gradient.clone()
    optimizer.step()
    u, _, v = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    moved = (weight.detach() - before * (1 - 0.1 * 0.5)).flatten(1) / (-0.1 * 0.2 * 12**0.5)
    inside = u.T @ moved @ v.T
    assert (inside.diagonal() > 0.5).all()
    assert (inside.diagonal() < 1.3).all()
    assert moved.square().mean().sqrt() * 0.2 * 12**0.5 == pytest.approx(0.2, rel=0.4), "the root mean square of AdamW"


def test_the_rest_is_torchs_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(5)) for _ in range(2))
    optimizer = MuonAdamW(
        [{"params": [ours], "weight_decay": 0.1, "orthogonalize": False}], lr=0.01, betas=(0.9, 0.95), eps=1e-8
    )
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(4):
        ours.grad = torch.randn(5)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)


def test_groups_and_state() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token_embedding = nn.Embedding(7, 4)
            self.linear = nn.Linear(4, 3)

    def build() -> tuple[Model, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = Model()
        optimizer = muon(
            model.named_parameters(),
            embeddings={"token_embedding.weight"},
            no_decay=set(),
            lr=0.1,
            momentum=0.9,
            beta1=0.9,
            beta2=0.98,
            eps=1e-6,
            weight_decay=0.2,
        )
        return model, optimizer

    model, optimizer = build()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert {key.split("/")[0] + "/" + key.split("/")[1] for key in named_state(optimizer, model)} == {
        "momentum/linear.weight",
        *(
            f"{kind}/{name}"
            for kind in ("step", "exp_avg", "exp_avg_sq")
            for name in ("linear.bias", "token_embedding.weight")
        ),
    }
    other, fresh = build()
    saved = {name: value.clone() for name, value in named_state(optimizer, model).items()}
    load_named_state(fresh, other, saved)
    other.load_state_dict(model.state_dict())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    optimizer.step()
    fresh.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("text", "tables", "loss"),
    [
        ({"width": 16, "layers": 1, "heads": 2}, {"token_embedding.weight", "positional_embedding"}, "infonce"),
        (
            {"kind": "t5", "width": 16, "layers": 1, "heads": 2},
            {"token_embedding.weight", "relative_bias.weight"},
            "mlm",
        ),
        (
            {"kind": "transformers", "name": "gpt2", "arguments": {"n_embd": 16, "n_layer": 1, "n_head": 2}},
            {"backbone.wte.weight", "backbone.wpe.weight"},
            "infonce",
        ),
        (
            {"kind": "transformers", "name": "t5", "arguments": {"d_model": 16, "num_layers": 1, "num_heads": 2}},
            {"backbone.shared.weight", "backbone.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"},
            "mlm",
        ),
    ],
)
def test_tables_are_not_orthogonalized(
    text: dict[str, Any], tables: set[str], loss: str, recipe_tree: dict[str, Any]
) -> None:
    recipe_tree["text"], recipe_tree["optimizer"] = text, {"kind": "muon", "lr": 1e-3}
    recipe_tree["tokenizer"] = {"context_length": 12}
    if loss == "mlm":
        recipe_tree["loss"] = {"kind": "mlm"}
        del recipe_tree["image"], recipe_tree["model"], recipe_tree["evaluation"]
    recipe = parse_recipe(recipe_tree)
    model = build_model(recipe, build_tokenizer(recipe))
    optimizer, names = build_optimizer(recipe, model), {p: name for name, p in model.named_parameters()}
    hidden = {names[p] for group in optimizer.param_groups if group["orthogonalize"] for p in group["params"]}
    assert {f"text.{table}" for table in tables} == {n for n in names.values() if n.startswith("text.")} & {
        name for name, p in model.named_parameters() if p.ndim >= 2 and name not in hidden
    }
