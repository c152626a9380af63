"""The shape of a model read off its tensors: what recipe sections would build it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from clip_train.errors import CheckpointError

HEAD_WIDTH = 64
"""Of every published CLIP; tensors do not tell."""


def text_section(state: Mapping[str, Tensor], heads: int | None, activation: str) -> dict[str, Any]:
    """`[text]` of a `TwoTower` state dict.

    Args:
        heads: where a configuration says them; by default width / 64.
        activation: which tensors do not tell either.
    """
    width = state["text.token_embedding.weight"].shape[1]
    return {
        "kind": "transformer",
        "width": width,
        "layers": blocks(state, "text"),
        "heads": heads or width // HEAD_WIDTH,
        "mlp_ratio": state["text.blocks.0.mlp.up.weight"].shape[0] / width,
        "activation": activation,
    }


def image_section(state: Mapping[str, Tensor], heads: int | None, activation: str) -> dict[str, Any]:
    """`[image]` of a `TwoTower` state dict with a ViT or a ResNet; arguments as `text_section`.

    Raises:
        CheckpointError: it is neither.
    """
    if "image.patch_embedding.weight" in state:
        return _vit(state, heads, activation)
    return _resnet(state, heads)


def _vit(state: Mapping[str, Tensor], heads: int | None, activation: str) -> dict[str, Any]:
    width, _, patch, _ = state["image.patch_embedding.weight"].shape
    grid = _side(state["image.positional_embedding"].shape[0] - 1, "image.positional_embedding")
    return {
        "kind": "vit",
        "image_size": grid * patch,
        "patch_size": patch,
        "width": width,
        "layers": blocks(state, "image"),
        "heads": heads or width // HEAD_WIDTH,
        "mlp_ratio": state["image.blocks.0.mlp.up.weight"].shape[0] / width,
        "activation": activation,
        **({} if "image.pre_norm.weight" in state else {"pre_norm": False}),
    }


def _resnet(state: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
    name = "image.attention_pool.positional_embedding"
    if name not in state:
        raise CheckpointError("the image tower is neither a ViT with a class token nor CLIP's ResNet")
    width = state["image.conv3.weight"].shape[0]
    return {
        "kind": "resnet",
        "image_size": 32 * _side(state[name].shape[0] - 1, name),
        "layers": [_count(state, rf"image\.stages\.{stage}\.(\d+)\.") for stage in range(4)],
        "width": width,
        "heads": heads or width * 32 // HEAD_WIDTH,
    }


def blocks(state: Mapping[str, Tensor], tower: str) -> int:
    """Blocks of the transformer `image` or `text`."""
    return _count(state, rf"{tower}\.blocks\.(\d+)\.")


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Blocks: one more than the largest number in names."""
    numbers = [int(match[1]) for name in state if (match := re.match(pattern, name))]
    return 1 + max(numbers, default=-1)


def _side(cells: int, name: str) -> int:
    side = math.isqrt(cells)
    if side * side != cells:
        raise CheckpointError(f"{name} has {cells} cells beside the class token, which is no square")
    return side
