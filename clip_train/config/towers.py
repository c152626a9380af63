"""The towers of a recipe and the space they share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from clip_train.config.section import Section


class VisionTransformer(Section):
    """CLIP's ViT (paper, section 2.4), or SigLIP's: `pool = "map"`, `pre_norm = false`, `projection = false`."""

    kind: Literal["vit"] = "vit"
    image_size: PositiveInt
    patch_size: PositiveInt
    width: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    mlp_ratio: PositiveFloat = 4.0
    pool: Literal["cls", "mean", "map"] = "cls"
    activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "gelu"
    pre_norm: bool = True
    """Whether there is a norm before the blocks."""
    norm_eps: PositiveFloat = 1e-5
    projection: bool = True
    """Whether a matrix leads into the joint space; without one `model.embed_dim` is the width."""
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


Pool = Literal["eot", "last", "cls", "mean", "max", "map"]
"""What stands for a text: the first EOT's vector, the last token's or the first's; the mean or maximum of all; or what
a learned query attends to."""


class TextTransformer(Section):
    """CLIP's causal transformer, its bidirectional twin, or SigLIP's."""

    kind: Literal["transformer"] = "transformer"
    width: PositiveInt = 512
    layers: PositiveInt = 12
    heads: PositiveInt = 8
    mlp_ratio: PositiveFloat = 4.0
    attention: Literal["causal", "bidirectional"] = "causal"
    pool: Pool = "eot"
    activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "gelu"
    norm_eps: PositiveFloat = 1e-5
    projection_bias: bool = False
    """Whether the projection into the joint space has a bias."""
    padding: Literal["masked", "attended"] = "masked"
    """`attended`: texts are filled up to the cap and the padding takes part, as in SigLIP."""


class BertText(Section):
    """BERT's encoder for texts of one segment: post-norm, bidirectional."""

    kind: Literal["bert"] = "bert"
    width: PositiveInt = 512
    layers: PositiveInt = 12
    heads: PositiveInt = 8
    mlp_ratio: PositiveFloat = 4.0
    pool: Pool = "cls"
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
    norm_eps: PositiveFloat = 1e-12


class T5Text(Section):
    """T5's encoder: relative positions, RMSNorm, no biases."""

    kind: Literal["t5"] = "t5"
    width: PositiveInt = 512
    layers: PositiveInt = 12
    heads: PositiveInt = 8
    head_dim: PositiveInt | None = None
    """Size of a head; default `width / heads`."""
    hidden: PositiveInt | None = None
    """Inner size of the MLPs; default 4 widths, 8/3 where they are gated."""
    mlp: Literal["gated_gelu", "relu"] = "gated_gelu"
    """That of T5 v1.1, or of the first T5."""
    buckets: PositiveInt = 32
    max_distance: PositiveInt = 128
    pool: Pool = "mean"
    norm_eps: PositiveFloat = 1e-6


class ModernText(Section):
    """Rotary positions, gated MLPs, RMSNorm, no biases."""

    kind: Literal["modern"] = "modern"
    width: PositiveInt = 512
    layers: PositiveInt = 12
    heads: PositiveInt = 8
    mlp_ratio: PositiveFloat = 8 / 3
    """Of the gated MLP: 8/3 gives it the parameters of a plain one of 4."""
    attention: Literal["causal", "bidirectional"] = "causal"
    pool: Pool = "eot"
    rope_base: PositiveFloat = 10_000.0
    norm_eps: PositiveFloat = 1e-6


class TransformersText(Section):
    """Any text encoder of transformers: by its configuration from scratch, or from a local directory with weights."""

    kind: Literal["transformers"] = "transformers"
    name: str | None = None
    """A `model_type` of transformers: fresh weights, the recipe's vocabulary."""
    path: str | None = None
    """A directory as `save_pretrained` writes it: its weights, and the vocabulary they were trained with."""
    arguments: dict[str, Any] = {}
    """Of the configuration of `name`: `hidden_size`, `num_hidden_layers`, ..."""
    pool: Pool = "mean"


class Joint(Section):
    """The space both towers project into."""

    embed_dim: PositiveInt = 512
    init_temperature: PositiveFloat = 0.07
    """Initial temperature; the learned logit scale starts at its inverse."""
    max_logit_scale: PositiveFloat = 100.0
    """The logit scale is clamped to this after every update."""
