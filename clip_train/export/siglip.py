"""transformers' SiglipModel, both ways (Zhai et al. 2023).

The image tower has no class token, no norm before the blocks and no projection behind its attention pooling; captions
are filled up to the cap, and the last token, mostly padding, stands for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clip_train.config.schema import Recipe, Sigmoid, TextTransformer, VisionTransformer
from clip_train.export.open_clip_keys import rename
from clip_train.export.transformers_keys import BLOCK, apart, together
from clip_train.export.transformers_text import hidden_act
from clip_train.loading import LoadedModel

_TABLE = [
    ("logit_scale", "logit_scale"),
    ("logit_bias", "logit_bias"),
    ("text.token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("text.positional_embedding", "text_model.embeddings.position_embedding.weight"),
    *((f"text.blocks.#.{ours}", f"text_model.encoder.layers.#.{theirs}") for ours, theirs in BLOCK),
    ("text.final_norm.*", "text_model.final_layer_norm.*"),
    ("text_projection.*", "text_model.head.*"),
    ("image.patch_embedding.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("image.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    *((f"image.blocks.#.{ours}", f"vision_model.encoder.layers.#.{theirs}") for ours, theirs in BLOCK),
    ("image.post_norm.*", "vision_model.post_layernorm.*"),
    ("image.attention_pool.probe", "vision_model.head.probe"),
    ("image.attention_pool.in.weight", "vision_model.head.attention.in_proj_weight"),
    ("image.attention_pool.in.bias", "vision_model.head.attention.in_proj_bias"),
    ("image.attention_pool.out.*", "vision_model.head.attention.out_proj.*"),
    ("image.attention_pool.mlp_norm.*", "vision_model.head.layernorm.*"),
    ("image.attention_pool.mlp.up.*", "vision_model.head.mlp.fc1.*"),
    ("image.attention_pool.mlp.down.*", "vision_model.head.mlp.fc2.*"),
]
_PATCH_BIAS = "vision_model.embeddings.patch_embedding.bias"
_POOL = "image.attention_pool"


def is_siglip(recipe: Recipe) -> bool:
    """Whether both towers and the loss are SigLIP's."""
    image, text = recipe.vision, recipe.text
    return (
        isinstance(recipe.loss, Sigmoid)
        and isinstance(image, VisionTransformer)
        and (image.pool, image.pre_norm, image.projection) == ("map", False, False)
        and isinstance(text, TextTransformer)
        and (text.padding, text.pool, text.projection_bias) == ("attended", "last", True)
    )


def siglip(loaded: LoadedModel) -> tuple[Any, dict[str, Tensor]]:
    """SiglipModel of the same shape with fresh weights, and ours under its names; for recipes that `is_siglip`."""
    from transformers import SiglipConfig, SiglipModel

    image, text, tokenizer = loaded.recipe.vision, loaded.recipe.text, loaded.tokenizer
    assert isinstance(image, VisionTransformer)
    assert isinstance(text, TextTransformer)
    both = SiglipConfig(
        text_config=_sizes(text)
        | {
            "vocab_size": tokenizer.vocab_size,
            "max_position_embeddings": tokenizer.context_length,
            "projection_size": loaded.recipe.joint.embed_dim,
            "pad_token_id": tokenizer.pad,
            "bos_token_id": tokenizer.sot,
            "eos_token_id": tokenizer.eot,
        },
        vision_config=_sizes(image) | {"image_size": image.image_size, "patch_size": image.patch_size},
    )
    return SiglipModel(both), to_siglip(loaded.model.state_dict())


def to_siglip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A `TwoTower` state dict under the names of SiglipModel. Raises ValueError for parameters without a place."""
    left = apart(state)
    for kind in ("weight", "bias"):
        parts = [left.pop(f"{_POOL}.{part}.{kind}") for part in ("query", "key_value")]
        left[f"{_POOL}.in.{kind}"] = torch.cat(parts)
    named = rename(left, _TABLE, "transformers")
    for scalar in ("logit_scale", "logit_bias"):
        named[scalar] = named[scalar].reshape(1)
    return named | {_PATCH_BIAS: torch.zeros(len(left["image.patch_embedding.weight"]))}


def from_siglip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `to_siglip`. The bias of the patches, which ours lack, becomes part of their positions.

    Raises:
        ValueError: parameters that `TwoTower` has no place for; each is named.
    """
    left = dict(state)
    bias = left.pop(_PATCH_BIAS, None)
    ours = together(rename(left, [(theirs, ours) for ours, theirs in _TABLE], "clip-train"))
    for kind in ("weight", "bias"):
        joined = ours.pop(f"{_POOL}.in.{kind}")
        query = len(joined) // 3
        ours[f"{_POOL}.query.{kind}"], ours[f"{_POOL}.key_value.{kind}"] = joined[:query], joined[query:]
    for scalar in ("logit_scale", "logit_bias"):
        ours[scalar] = ours[scalar].reshape(())
    if bias is not None and bias.any():
        ours["image.positional_embedding"] = ours["image.positional_embedding"] + bias
    return ours


def _sizes(tower: TextTransformer | VisionTransformer) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": int(tower.width * tower.mlp_ratio),
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": hidden_act(tower.activation),
        "layer_norm_eps": tower.norm_eps,
    }
