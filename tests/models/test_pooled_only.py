"""A tower asked for its pooled vector alone gives what it gives among all tokens, and the same gradients."""

from __future__ import annotations

from itertools import product
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from clip_train.models.adapters import TimmTower
from clip_train.models.base import Tower
from clip_train.models.pooling import Pool
from clip_train.models.resnet import ModifiedResNet
from clip_train.models.text import TextTransformer
from clip_train.models.vision import VisionTransformer

Attention = Literal["causal", "bidirectional"]
ATTENTION: tuple[Attention, ...] = ("causal", "bidirectional")
POOLS: tuple[Pool, ...] = ("eot", "last", "cls", "mean", "max", "map")
LENGTHS = torch.tensor([5, 2, 9, 1, 9])

IMAGE_TOWERS = {
    "vit-cls": lambda: VisionTransformer(32, 8, 48, 3, 3),
    "vit-mean": lambda: VisionTransformer(32, 8, 48, 2, 3, pool="mean"),
    "vit-map": lambda: VisionTransformer(32, 8, 48, 2, 3, pool="map"),
    "resnet": lambda: ModifiedResNet(32, (1, 1, 1, 1), 8, 4),
    "timm": lambda: TimmTower("test_vit", 32),
}


def assert_same(tower: Tower, *inputs: Tensor) -> None:
    found: list[list[Tensor]] = []
    for only in (False, True):
        pooled: Tensor = tower(*inputs, pooled_only=only).pooled
        weights = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(3))
        found.append([pooled.detach(), *torch.autograd.grad((pooled * weights).sum(), list(tower.parameters()))])
    for all_tokens, alone in zip(*found, strict=True):
        assert (all_tokens - alone).abs().max().item() <= 2e-6 * max(1.0, all_tokens.abs().max().item())


@pytest.mark.parametrize("kind", list(IMAGE_TOWERS))
def test_of_pictures(kind: str) -> None:
    torch.manual_seed(0)
    assert_same(IMAGE_TOWERS[kind](), torch.randn(4, 3, 32, 32))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("attention", "pool"), [c for c in product(ATTENTION, POOLS) if c != ("causal", "cls")])
def test_of_captions(attention: Attention, pool: Pool, packed: bool) -> None:
    for lengths in (LENGTHS, torch.full((5,), 6)):  # of one length, nothing is packed
        torch.manual_seed(0)
        tower = TextTransformer(50, 14, 32, 3, 4, attention=attention, pool=pool, packed=packed)
        nn.init.normal_(tower.positional_embedding)  # small positions would let a wrong one pass unseen
        assert_same(tower, torch.randint(0, 50, (5, int(lengths.max()))), lengths)


def test_the_last_block_leaves_out_the_other_tokens() -> None:
    output = VisionTransformer(32, 8, 48, 2, 3)(torch.randn(2, 3, 32, 32), pooled_only=True)
    assert output.tokens.shape == (2, 1, 48)
    output = TextTransformer(50, 14, 32, 2, 4)(torch.randint(0, 50, (5, 9)), LENGTHS, pooled_only=True)
    assert output.tokens.shape == (5, 1, 32)
