"""The names of our parameters and open_clip's, both ways.

One table of pairs, read from left to right or from right to left. `#` stands for a number, `*` for the rest
of a name. Matrices marked `T` are stored transposed there (open_clip multiplies `x @ P`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from torch import Tensor

_BLOCK = [
    ("attention_norm.*", "ln_1.*"),
    ("attention.qkv.weight", "attn.in_proj_weight"),
    ("attention.qkv.bias", "attn.in_proj_bias"),
    ("attention.out.*", "attn.out_proj.*"),
    ("mlp_norm.*", "ln_2.*"),
    ("mlp.up.*", "mlp.c_fc.*"),
    ("mlp.down.*", "mlp.c_proj.*"),
]
_TEXT = [
    ("logit_scale", "logit_scale"),
    ("logit_bias", "logit_bias"),
    ("text.token_embedding.weight", "token_embedding.weight"),
    ("text.positional_embedding", "positional_embedding"),
    *((f"text.blocks.#.{ours}", f"transformer.resblocks.#.{theirs}") for ours, theirs in _BLOCK),
    ("text.final_norm.*", "ln_final.*"),
    ("text_projection.weight", "T text_projection"),
]
_BIASED = [("text_projection.weight", "text_projection.weight"), ("text_projection.bias", "text_projection.bias")]
"""A projection with a bias is a module there, and its matrix not transposed."""
_VIT = [
    ("image.patch_embedding.weight", "visual.conv1.weight"),
    ("image.class_embedding", "visual.class_embedding"),
    ("image.positional_embedding", "visual.positional_embedding"),
    ("image.pre_norm.*", "visual.ln_pre.*"),
    *((f"image.blocks.#.{ours}", f"visual.transformer.resblocks.#.{theirs}") for ours, theirs in _BLOCK),
    ("image.post_norm.*", "visual.ln_post.*"),
    ("image_projection.weight", "T visual.proj"),
]
_RESNET = [
    ("image.conv#.weight", "visual.conv#.weight"),
    ("image.bn#.*", "visual.bn#.*"),
    *(
        (f"image.stages.{stage}.#.{ours}", f"visual.layer{stage + 1}.#.{theirs}")
        for stage in range(4)
        for ours, theirs in (
            ("conv#.weight", "conv#.weight"),
            ("bn#.*", "bn#.*"),
            ("shortcut_conv.*", "downsample.0.*"),
            ("shortcut_bn.*", "downsample.1.*"),
        )
    ),
    ("image.attention_pool.positional_embedding", "visual.attnpool.positional_embedding"),
    ("image.attention_pool.query.*", "visual.attnpool.q_proj.*"),
    ("image.attention_pool.key.*", "visual.attnpool.k_proj.*"),
    ("image.attention_pool.value.*", "visual.attnpool.v_proj.*"),
    ("image_projection.*", "visual.attnpool.c_proj.*"),
]
_TIMM = [
    ("image.backbone.*", "visual.trunk.*"),
    ("image_projection.weight", "visual.head.proj.weight"),
]


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A `TwoTower` state dict under open_clip's names (native text tower, `custom_text` false).

    Raises:
        ValueError: parameters that open_clip's model has no place for; each is named.
    """
    if "image.patch_embedding.weight" in state:
        table = _VIT
    else:
        table = _TIMM if any(key.startswith("image.backbone.") for key in state) else _RESNET
    biased = _BIASED if "text_projection.bias" in state else []
    return rename(state, biased + _TEXT + table, "open_clip")


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip state dict under the names of `TwoTower`.

    Raises:
        ValueError: parameters that `TwoTower` has no place for; each is named.
    """
    if "visual.proj" in state:
        table = _VIT
    else:
        table = _TIMM if any(key.startswith("visual.trunk.") for key in state) else _RESNET
    return rename(state, [(theirs, ours) for ours, theirs in _BIASED + _TEXT + table], "clip-train")


def rename(state: Mapping[str, Tensor], table: list[tuple[str, str]], target: str) -> dict[str, Tensor]:
    """Every tensor under its name in the table's right column, `T` ones transposed.

    Raises:
        ValueError: names that the left column does not hold; each is named.
    """
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, value in state.items():
        for source, destination in table:
            match = _pattern(source.removeprefix("T ")).fullmatch(key)
            if match:
                transposed = source.startswith("T ") or destination.startswith("T ")
                parts = iter(match.groups())
                name = re.sub(r"[#*]", lambda _, parts=parts: next(parts), destination.removeprefix("T "))
                renamed[name] = value.T.contiguous() if transposed else value
                break
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"no name in {target} for {', '.join(sorted(unknown))}")
    return renamed


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\#", r"(\d+)").replace(r"\*", r"(.+)"))
