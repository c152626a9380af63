"""FLOPs from sizes against torch's counter and the published table."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clip_train.models.adapters import TimmTower
from clip_train.models.flops import forward_flops, image_flops, parameter_count, text_flops
from clip_train.models.pooling import Pool
from clip_train.models.presets import build_preset
from clip_train.models.resnet import ModifiedResNet
from clip_train.models.text import TextTransformer
from clip_train.models.two_tower import TwoTower
from clip_train.models.vision import VisionTransformer

IMAGES = {
    "vit": lambda: VisionTransformer(64, 8, 96, 3, 3),
    "vit-map": lambda: VisionTransformer(64, 8, 96, 3, 3, mlp_ratio=2.0, pool="map"),
    "resnet": lambda: ModifiedResNet(64, (1, 2, 2, 1), 16, 8),
    "timm": lambda: TimmTower("test_resnet", 64),
}


def counted(model: TwoTower, size: int, length: int) -> int:
    """What torch counts for a batch of two, halved."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # not every torch counts its fused attention
        model.eval()(
            torch.randn(2, 3, size, size),
            torch.zeros(2, length, dtype=torch.int64),
            torch.tensor([length] * 2),
        )
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("kind", list(IMAGES))
@pytest.mark.parametrize("pool", ["eot", "map"])
def test_flops_are_those_of_torchs_counter(kind: str, pool: Pool) -> None:
    model = TwoTower(IMAGES[kind](), TextTransformer(50, 20, 64, 3, 2, pool=pool), 48)
    assert forward_flops(model, 17, pooled_only=True).total == pytest.approx(counted(model, 64, 17), rel=0.01)


@pytest.mark.parametrize("pool", ["cls", "map"])
def test_flops_of_all_tokens_are_those_of_torchs_counter(pool: Literal["cls", "map"]) -> None:
    image, text = VisionTransformer(64, 8, 96, 3, 3, pool=pool), TextTransformer(50, 20, 64, 3, 2)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # not every torch counts its fused attention
        image.eval()(torch.randn(2, 3, 64, 64))
        text.eval()(torch.zeros(2, 17, dtype=torch.int64), torch.tensor([17, 17]))
    assert image_flops(image) + text_flops(text, 17) == pytest.approx(counter.get_total_flops() // 2, rel=0.01)


@pytest.mark.parametrize(
    ("name", "published", "spared"),
    [
        ("ViT-B/32", 14.78, 0.0),
        ("ViT-B/16", 41.09, 0.0),
        ("ViT-L/14", 175.3, 0.0),
        # open_clip's attention pooling projects all 50 queries and outputs and keeps one.
        ("RN50", 18.18, 49 * 2 * (2048 * 2048 + 2048 * 1024 + 2 * 50 * 2048) / 1e9),
    ],
)
def test_flops_of_the_published_models(name: str, published: float, spared: float) -> None:
    with torch.device("meta"):
        model = build_preset(name)
    assert forward_flops(model, 77).total / 1e9 + spared == pytest.approx(published, rel=0.001)


def test_short_captions_are_cheap_and_means_may_be_fractional() -> None:
    with torch.device("meta"):
        model = build_preset("ViT-B/32")
    assert forward_flops(model, 77).total / forward_flops(model, 16).total == pytest.approx(1.47, abs=0.01)
    assert forward_flops(model, 16).text < forward_flops(model, 16.5).text < forward_flops(model, 17).text
    assert parameter_count(model) == 151_277_313
