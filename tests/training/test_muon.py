"""Muon against a singular value decomposition and a hand-written reference; AdamW's part against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clip_train.training.muon import MuonAdamW, orthogonalize
from clip_train.training.optimizer import load_named_state, muon, named_state


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_orthogonalize_keeps_singular_vectors_and_levels_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    for given, found in zip(matrices, orthogonalize(matrices).float(), strict=True):
        u, _, v = torch.linalg.svd(given, full_matrices=False)
        inside = u.T @ found @ v.T  # diagonal where the singular vectors are the same
        assert (inside.diagonal() > 0.5).all()
        assert (inside.diagonal() < 1.3).all()
        assert (inside - inside.diagonal().diag()).abs().max() < 0.05


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
