"""Starting from another run's weights, all of them or a tower's: fine-tuning, also at another picture size or caption
length, and CLIPs whose text tower learned from text first.

What no shape tells (heads, activations, …) must be as it was in towers of our own; another mask or pool is announced.
Only position embeddings may differ in shape. A ViT's or ResNet's grid of positions is resized (bicubic, antialiased, as
open_clip and timm do), its class token's kept; a text table is cut, or stretched linearly to a longer cap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_train.config.load import parse_toml
from clip_train.config.schema import Recipe
from clip_train.errors import CheckpointError
from clip_train.models.base import Model
from clip_train.models.positions import resample_grid
from clip_train.training.checkpoint import Checkpoint, load_tensors, read_checkpoint
from tokenizer import BPETokenizer

POSITIONS = ("positional_embedding", "attention_pool.positional_embedding")
"""Of a tower, the tables that may have another size."""
OWN_POOLS = ("attention_pool.",)
"""Of a text tower, what stands behind its tokens: fresh where the other tower pooled without weights, left away where
this one does."""
ANNOUNCED = ("attention", "padding", "pool")
"""Keys of a tower that may differ from those it was trained with, which is said."""
IGNORED = (
    "image_size", "mlp_ratio", "head_dim", "hidden",  # shapes tell
    "projection", "projection_bias",  # stand behind the tower
    "patch_dropout", "pretrained", "name", "path", "arguments",  # act on training alone, say where a tower came from
)  # fmt: skip
"""Keys that are not compared. Among the `arguments` of timm and transformers some (dropout) may change freely, others
should not: only their shapes are looked at."""


def load_initial(
    model: Model, path: Path, *, recipe: Recipe, tokenizer: BPETokenizer, notify: Callable[[str], Any]
) -> None:
    """Load the weights of a run folder or checkpoint into the model.

    Args:
        recipe: what the model was built by.
        tokenizer: the recipe's; ids must mean the same there, the cap may differ.
        notify: told what was loaded and which positions were resized.

    Raises:
        CheckpointError: another vocabulary, a tower that computes otherwise, or a tensor that does not fit and is no
            position embedding.
    """
    checkpoint = read_checkpoint(path)
    _check_vocabulary(checkpoint, tokenizer, "training.init")
    for prefix in model.towers:
        _check_settings(checkpoint, recipe, prefix, "training.init", notify)
    tensors = checkpoint.model()
    for prefix in model.towers:
        _fit_positions(tensors, model.state_dict(), prefix, path, notify, within=f"{prefix}.")
    load_tensors(model, tensors, where=str(checkpoint.path))
    notify(f"starting from the weights of {checkpoint.path}")


def load_initial_tower(
    model: Model, prefix: str, path: Path, *, recipe: Recipe, tokenizer: BPETokenizer, notify: Callable[[str], Any]
) -> None:
    """Load the weights of one tower, `text` or `image`, of a run folder or checkpoint that has such a tower.

    Arguments as `load_initial`. A text tower may pool otherwise than it did there: weights of a pool that is new stay
    fresh, those of one that is gone are left away.

    Raises:
        CheckpointError: there is no such tower, another vocabulary, another shape, or a tower that computes otherwise.
    """
    key, tower = f"training.init_{prefix}", model.towers[prefix]
    checkpoint = read_checkpoint(path)
    if prefix == "text":
        _check_vocabulary(checkpoint, tokenizer, key)
    _check_settings(checkpoint, recipe, prefix, key, notify)
    start = f"{prefix}."
    tensors = {name.removeprefix(start): t for name, t in checkpoint.model().items() if name.startswith(start)}
    expected = tower.state_dict()
    _fit_positions(tensors, expected, prefix, path, notify)
    if prefix == "text":
        new = {name for name in expected.keys() - tensors.keys() if name.startswith(OWN_POOLS)}
        gone = {name for name in tensors.keys() - expected.keys() if name.startswith(OWN_POOLS)}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in gone}
        tensors |= {name: expected[name] for name in new}
        if new or gone:
            notify(f"{prefix}: another pool than in {path}: its weights {'start fresh' if new else 'are left away'}")
    load_tensors(tower, tensors, where=f"{key}: {checkpoint.path}")
    notify(f"{prefix} tower: starting from the weights of {checkpoint.path}")


def _check_vocabulary(checkpoint: Checkpoint, tokenizer: BPETokenizer, key: str) -> None:
    theirs, ours = BPETokenizer.load(checkpoint.tokenizer_path).vocabulary, tokenizer.vocabulary
    if (theirs.merges, theirs.special_ids) != (ours.merges, ours.special_ids):
        raise CheckpointError(
            f"{key} = {str(checkpoint.path)!r} was trained with another vocabulary: set tokenizer.path = "
            f"'{checkpoint.tokenizer_path}'"
        )


def _check_settings(
    checkpoint: Checkpoint, recipe: Recipe, prefix: str, key: str, notify: Callable[[str], Any]
) -> None:
    """Raises CheckpointError where the checkpoint has no such tower, or its recipe says otherwise of it."""
    theirs = parse_toml(checkpoint.recipe_toml, where=str(checkpoint.path / "recipe.toml"))
    if getattr(theirs, prefix) is None:
        raise CheckpointError(f"{key} = {str(checkpoint.path)!r}: this checkpoint has no {prefix} tower")
    before, now = (getattr(one, prefix).model_dump(mode="json") for one in (theirs, recipe))
    changed = {
        name: (now.get(name), before.get(name)) for name in {**now, **before} if now.get(name) != before.get(name)
    }
    told = [f"{prefix}.{name} = {here!r} here, {there!r} there" for name, (here, there) in changed.items()
            if name not in (*ANNOUNCED, *IGNORED)]  # fmt: skip
    if told:
        raise CheckpointError(f"{key} = {str(checkpoint.path)!r} has another {prefix} tower: {', '.join(told)}")
    for name in ANNOUNCED:
        if name in changed:
            notify(f"{prefix}.{name}: {changed[name][0]} here, {changed[name][1]} in {checkpoint.path}")


def _fit_positions(
    tensors: dict[str, Tensor],
    expected: dict[str, Tensor],
    tower: str,
    path: Path,
    notify: Callable[[str], Any],
    *,
    within: str = "",
) -> None:
    """Resize a tower's tables of positions to what is expected; names begin with `within`."""
    for name in (within + position for position in POSITIONS):
        if name in tensors and name in expected and tensors[name].shape != expected[name].shape:
            before, after = tensors[name], expected[name]
            if before.ndim != after.ndim or before.shape[1] != after.shape[1]:
                continue  # another width: `load_tensors` says so
            resize = resize_text_positions if tower == "text" else resize_grid
            tensors[name] = resize(before, after.shape[0])
            shown = f"{tower}.{name.removeprefix(within)}"
            notify(f"{shown}: {before.shape[0]} positions of {path} interpolated to {after.shape[0]}")


def resize_grid(table: Tensor, rows: int) -> Tensor:
    """`(1 + g*g, W)` or `(g*g, W)` learned positions -> the same for another grid; a class token's stays.

    Raises:
        CheckpointError: the table is no square grid.
    """
    extra = _extra(table.shape[0])
    if extra != _extra(rows):
        raise CheckpointError(f"{table.shape[0]} positions cannot become {rows}: one has a class token, the other none")
    resized = resample_grid(table[extra:], math.isqrt(rows - extra))
    return torch.cat([table[:extra].float(), resized]).to(table.dtype)


def resize_text_positions(table: Tensor, rows: int) -> Tensor:
    """`(L, W)` -> `(rows, W)`: the first ones of a longer table, or linear interpolation of a shorter one."""
    if rows <= table.shape[0]:
        return table[:rows].clone()
    return F.interpolate(table.float().T[None], rows, mode="linear", align_corners=False)[0].T.to(table.dtype)


def _extra(rows: int) -> int:
    for extra in (0, 1):
        if math.isqrt(rows - extra) ** 2 == rows - extra:
            return extra
    raise CheckpointError(f"{rows} positions are no square grid, with or without a class token")
