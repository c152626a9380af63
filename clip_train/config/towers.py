"""The towers of a recipe and the space they share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from clip_train.config.section import Section


class VisionTransformer(Section):
    """CLIP's ViT (paper, section 2.4)."""

    kind: Literal["vit"] = "vit"
    image_size: PositiveInt
    patch_size: PositiveInt
    width: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    mlp_ratio: PositiveFloat = 4.0
    pool: Literal["cls", "mean", "map"] = "cls"
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    patch_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of a picture's patches that training leaves out, drawn anew in every step (FLIP)."""


class ResNet(Section):
    """CLIP's ModifiedResNet: three-convolution stem, anti-aliased strides, attention pooling."""

    kind: Literal["resnet"] = "resnet"
    image_size: PositiveInt
    layers: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]
    width: PositiveInt = 64
    heads: PositiveInt


class Timm(Section):
    """Any timm backbone, its head replaced by CLIP's projection."""

    kind: Literal["timm"] = "timm"
    name: str
    image_size: PositiveInt
    pretrained: bool = False
    arguments: dict[str, Any] = {}
    """Passed to `timm.create_model`."""


class TextTransformer(Section):
    """The text tower: CLIP's causal transformer, or its bidirectional twin."""

    kind: Literal["transformer"] = "transformer"
    width: PositiveInt = 512
    layers: PositiveInt = 12
    heads: PositiveInt = 8
    mlp_ratio: PositiveFloat = 4.0
    attention: Literal["causal", "bidirectional"] = "causal"
    pool: Literal["eot", "last", "cls", "mean", "max", "map"] = "eot"
    activation: Literal["gelu", "quick_gelu"] = "gelu"


class Joint(Section):
    """The space both towers project into."""

    embed_dim: PositiveInt = 512
    init_temperature: PositiveFloat = 0.07
    """Initial temperature; the learned logit scale starts at its inverse."""
    max_logit_scale: PositiveFloat = 100.0
    """The logit scale is clamped to this after every update."""
