"""The names of our parameters and those of transformers' CLIPModel, both ways.

As `open_clip_keys`, with one difference: transformers keeps query, key and value apart, ours are the rows of one
matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clip_train.export.open_clip_keys import rename

BLOCK = [
    ("attention_norm.*", "layer_norm1.*"),
    ("attention.query.*", "self_attn.q_proj.*"),
    ("attention.key.*", "self_attn.k_proj.*"),
    ("attention.value.*", "self_attn.v_proj.*"),
    ("attention.out.*", "self_attn.out_proj.*"),
    ("mlp_norm.*", "layer_norm2.*"),
    ("mlp.up.*", "mlp.fc1.*"),
    ("mlp.down.*", "mlp.fc2.*"),
]
_TABLE = [
    ("logit_scale", "logit_scale"),
    ("text.token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("text.positional_embedding", "text_model.embeddings.position_embedding.weight"),
    *((f"text.blocks.#.{ours}", f"text_model.encoder.layers.#.{theirs}") for ours, theirs in BLOCK),
    ("text.final_norm.*", "text_model.final_layer_norm.*"),
    ("text_projection.weight", "text_projection.weight"),
    ("image.class_embedding", "vision_model.embeddings.class_embedding"),
    ("image.patch_embedding.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("image.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("image.pre_norm.*", "vision_model.pre_layrnorm.*"),  # their spelling
    *((f"image.blocks.#.{ours}", f"vision_model.encoder.layers.#.{theirs}") for ours, theirs in BLOCK),
    ("image.post_norm.*", "vision_model.post_layernorm.*"),
    ("image_projection.weight", "visual_projection.weight"),
    ("image.backbone.*", "vision_model.timm_model.*"),
]
_PARTS = ("query", "key", "value")


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A `TwoTower` state dict under the names of CLIPModel, whose text names the dual encoder's are too.

    Raises:
        ValueError: parameters that transformers' model has no place for; each is named.
    """
    return rename(apart(state), _TABLE, "transformers")


def apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the rows of every `qkv` under `query`, `key` and `value`."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attention.qkv." in name:
            for part, rows in zip(_PARTS, tensor.chunk(3), strict=True):
                found[name.replace(".qkv.", f".{part}.")] = rows.contiguous()
        else:
            found[name] = tensor
    return found


def together(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `apart`."""
    joined: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attention.query." in name:
            parts = [state[name.replace(".query.", f".{part}.")] for part in _PARTS]
            joined[name.replace(".query.", ".qkv.")] = torch.cat(parts)
        elif ".attention.key." not in name and ".attention.value." not in name:
            joined[name] = tensor
    return joined


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `to_transformers`.

    Raises:
        ValueError: parameters that `TwoTower` has no place for; each is named.
    """
    return together(rename(state, [(theirs, ours) for ours, theirs in _TABLE], "clip-train"))
