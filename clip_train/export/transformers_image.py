"""The image tower in transformers: CLIP's vision model, or what timm builds, in transformers' wrapper of timm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clip_train.config.schema import VisionTransformer
from clip_train.export.timm import architecture, backbone_state, image_projection
from clip_train.export.transformers_keys import to_transformers
from clip_train.export.transformers_text import hidden_act
from clip_train.loading import LoadedModel


def is_clip_vision(loaded: LoadedModel) -> bool:
    """Whether the image tower is CLIP's: a ViT with a class token and a norm before the blocks."""
    image = loaded.recipe.vision
    return isinstance(image, VisionTransformer) and image.pool == "cls" and image.pre_norm


def clip_vision_config(loaded: LoadedModel) -> Any:
    """CLIPVisionConfig of a ViT with a class token."""
    from transformers import CLIPVisionConfig

    image = loaded.recipe.vision
    assert isinstance(image, VisionTransformer)
    return CLIPVisionConfig(
        hidden_size=image.width,
        intermediate_size=int(image.width * image.mlp_ratio),
        projection_dim=loaded.recipe.joint.embed_dim,
        num_hidden_layers=image.layers,
        num_attention_heads=image.heads,
        image_size=image.image_size,
        patch_size=image.patch_size,
        hidden_act=hidden_act(image.activation),
        layer_norm_eps=image.norm_eps,
    )


def vision_model(loaded: LoadedModel) -> Any:
    """The vision model of a VisionTextDualEncoderModel, with fresh weights.

    Raises:
        ExportError: neither CLIP's nor any that timm has.
    """
    from transformers import CLIPVisionModel, TimmWrapperConfig, TimmWrapperModel

    if is_clip_vision(loaded):
        return CLIPVisionModel(clip_vision_config(loaded))
    name, arguments = architecture(loaded)
    config: Any = TimmWrapperConfig(architecture=name, model_args=arguments)
    config.num_labels = 0
    config.hidden_size = loaded.model.image.width  # the dual encoder asks for it, and the wrapper does not know
    return TimmWrapperModel(config)


def vision_state(loaded: LoadedModel) -> dict[str, Tensor]:
    """`vision_model.*` and `visual_projection.weight`."""
    state = {name: tensor for name, tensor in loaded.model.state_dict().items() if name.startswith("image")}
    weight, bias = image_projection(loaded)
    if is_clip_vision(loaded):
        return to_transformers(state) | {"visual_projection.weight": weight}
    tower = backbone_state(state)
    if bias is not None:
        tower["head.v.bias"] = tower["head.v.bias"] + _before_projection(weight, bias)
    renamed = {f"vision_model.timm_model.{name}": tensor for name, tensor in tower.items()}
    return renamed | {"visual_projection.weight": weight}


def _before_projection(weight: Tensor, bias: Tensor) -> Tensor:
    """`c` with `weight @ c = bias`: `weight` `(D, W)`, `bias` `(D,)` -> `(W,)`, the shortest one.

    The dual encoder's projection has no bias. Attention weights sum to one, so that a constant added to every value
    is added to what attention pooling gives: there the bias has the same effect.
    """
    return (torch.linalg.pinv(weight.double()) @ bias.double()).to(bias.dtype)
