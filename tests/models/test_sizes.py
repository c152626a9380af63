"""Pictures with fewer patches: patch dropout, and sizes below the learned one."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clip_train.models.attention import Layout
from clip_train.models.flops import image_flops
from clip_train.models.positions import resample_grid
from clip_train.models.vision import VisionTransformer

Pool = Literal["cls", "mean", "map"]


def tower(dropout: float = 0.0, pool: Pool = "cls", smaller: tuple[int, ...] = (16,)) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(32, 8, 48, 2, 3, pool=pool, patch_dropout=dropout, smaller_sizes=smaller)


def pictures(size: int = 32) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pool", ["cls", "mean", "map"])
def test_dropped_patches_are_as_if_cut_out(pool: Pool) -> None:
    """With the kept patches known, the tower is the one that runs on those tokens; every parameter has a gradient."""
    model = tower(0.5, pool)
    torch.manual_seed(7)
    output = model(pictures())
    torch.manual_seed(7)
    kept = torch.rand(4, 16).topk(8, dim=1, sorted=False).indices
    whole = tower(0.0, pool)
    for row in range(4):
        x = whole.embed_patches(pictures()[row : row + 1])[:, kept[row].sort().values]
        if whole.class_embedding is not None:
            x = torch.cat([(whole.class_embedding + whole.positional_embedding[0])[None, None], x], dim=1)
        x = whole.pre_norm(x)
        for block in whole.blocks:
            x = block(x, Layout())
        x = whole.post_norm(x)
        pooled = whole.attention_pool(x, None) if whole.attention_pool else x[:, 0] if pool == "cls" else x.mean(dim=1)
        torch.testing.assert_close(output.pooled[row], pooled[0], atol=1e-5, rtol=1e-5)
    (output.pooled * torch.randn(4, 48)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_evaluation_sees_every_patch() -> None:
    model = tower(0.75).eval()
    torch.testing.assert_close(model(pictures()).pooled, tower().eval()(pictures()).pooled, rtol=0, atol=0)
    assert model.patches_seen(32, training=False) == 16
    assert tower(0.99).patches_seen(32, training=True) == 1


def test_patches_are_drawn_anew_and_by_the_seed() -> None:
    model = tower(0.5)
    drawn: list[torch.Tensor] = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model(pictures()).pooled)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2], atol=1e-3)


def test_positions_are_interpolated_as_pictures_are() -> None:
    table = torch.randn(49, 6, requires_grad=True)
    for side in (5, 4, 2, 1):
        picture = table.T.reshape(1, 6, 7, 7)
        expected = F.interpolate(picture, (side, side), mode="bicubic", antialias=True)[0].flatten(1).T
        actual = resample_grid(table, side)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        weights = torch.randn(actual.shape)
        gradients = [torch.autograd.grad((x * weights).sum(), table, retain_graph=True)[0] for x in (actual, expected)]
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)
    assert resample_grid(table, 7) is table


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_smaller_picture_uses_every_parameter_of_the_full_size(pool: Pool) -> None:
    model = tower(pool=pool)
    assert model(pictures(16)).tokens.shape[1] == 4 + (pool == "cls")
    (model(pictures(16)).pooled * torch.randn(4, 48)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with pytest.raises(ValueError, match=r"\(4, 3, 24, 24\), this tower takes \(B, 3, 32, 32\) or \(B, 3, 16, 16\)"):
        model(pictures(24))


@pytest.mark.parametrize(("dropout", "size"), [(0.5, 32), (0.0, 16), (0.5, 16)])
def test_flops_of_training(dropout: float, size: int) -> None:
    model, counter = tower(dropout), FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # not every torch counts its fused attention
        model(pictures(size))
    # The counter also sees positions being interpolated, once a batch.
    assert image_flops(model, training=True, image_size=size) == pytest.approx(counter.get_total_flops() / 4, rel=0.02)
    assert image_flops(model) == image_flops(tower())


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size=20 is not a multiple of patch_size=8"):
        tower(smaller=(20,))
    with pytest.raises(ValueError, match=r"patch_dropout=1.0 is not in \[0, 1\)"):
        tower(1.0)
