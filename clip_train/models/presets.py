"""The nine models of the CLIP paper (Radford et al. 2021, tables 19 and 20)."""

from __future__ import annotations

from dataclasses import dataclass

from clip_train.models.base import Tower
from clip_train.models.resnet import ModifiedResNet
from clip_train.models.text import TextTransformer
from clip_train.models.two_tower import TwoTower
from clip_train.models.vision import VisionTransformer


@dataclass(frozen=True)
class ViTSize:
    """Arguments of `VisionTransformer`."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class ResNetSize:
    """Arguments of `ModifiedResNet`."""

    image_size: int
    layers: tuple[int, int, int, int]
    width: int
    heads: int


@dataclass(frozen=True)
class TextSize:
    """Arguments of `TextTransformer`."""

    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class ClipSize:
    """One row of the tables."""

    image: ViTSize | ResNetSize
    text: TextSize
    embed_dim: int


PRESETS: dict[str, ClipSize] = {
    "RN50": ClipSize(ResNetSize(224, (3, 4, 6, 3), 64, 32), TextSize(512, 12, 8), 1024),
    "RN101": ClipSize(ResNetSize(224, (3, 4, 23, 3), 64, 32), TextSize(512, 12, 8), 512),
    "RN50x4": ClipSize(ResNetSize(288, (4, 6, 10, 6), 80, 40), TextSize(640, 12, 10), 640),
    "RN50x16": ClipSize(ResNetSize(384, (6, 8, 18, 8), 96, 48), TextSize(768, 12, 12), 768),
    "RN50x64": ClipSize(ResNetSize(448, (3, 15, 36, 10), 128, 64), TextSize(1024, 12, 16), 1024),
    "ViT-B/32": ClipSize(ViTSize(224, 32, 768, 12, 12), TextSize(512, 12, 8), 512),
    "ViT-B/16": ClipSize(ViTSize(224, 16, 768, 12, 12), TextSize(512, 12, 8), 512),
    "ViT-L/14": ClipSize(ViTSize(224, 14, 1024, 24, 16), TextSize(768, 12, 12), 768),
    "ViT-L/14@336": ClipSize(ViTSize(336, 14, 1024, 24, 16), TextSize(768, 12, 12), 768),
}


def build_preset(name: str, vocab_size: int = 49408, context_length: int = 77) -> TwoTower:
    """The model of a preset's name, with OpenAI's vocabulary by default.

    Raises:
        ValueError: no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}: choose one of {', '.join(PRESETS)}")
    size = PRESETS[name]
    image: Tower
    if isinstance(size.image, ViTSize):
        image = VisionTransformer(**vars(size.image))
    else:
        image = ModifiedResNet(**vars(size.image))
    return TwoTower(image, TextTransformer(vocab_size, context_length, **vars(size.text)), size.embed_dim)
