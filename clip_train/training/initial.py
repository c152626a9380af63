"""Starting from another run's weights: fine-tuning, also at another picture size or caption length.

Only position embeddings may differ in shape. A ViT's or ResNet's grid of positions is resized (bicubic, antialiased, as
open_clip and timm do), its class token's kept; a text table is cut, or stretched linearly to a longer cap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.errors import CheckpointError
from clip_train.models.positions import resample_grid
from clip_train.training.checkpoint import load_tensors, read_checkpoint
from tokenizer import BPETokenizer

POSITIONS = ("image.positional_embedding", "image.attention_pool.positional_embedding", "text.positional_embedding")


def load_initial(model: nn.Module, path: Path, *, tokenizer: BPETokenizer, notify: Callable[[str], Any]) -> None:
    """Load the weights of a run folder or checkpoint into the model.

    Args:
        tokenizer: the recipe's; ids must mean the same there, the cap may differ.
        notify: told what was loaded and which positions were resized.

    Raises:
        CheckpointError: another vocabulary, or a tensor that does not fit and is no position embedding.
    """
    checkpoint = read_checkpoint(path)
    theirs, ours = BPETokenizer.load(checkpoint.tokenizer_path).vocabulary, tokenizer.vocabulary
    if (theirs.merges, theirs.special_ids) != (ours.merges, ours.special_ids):
        raise CheckpointError(
            f"training.init = {str(path)!r} was trained with another vocabulary: set tokenizer.path = "
            f"'{checkpoint.tokenizer_path}'"
        )
    tensors = checkpoint.model()
    expected = model.state_dict()
    for name in POSITIONS:
        if name in tensors and name in expected and tensors[name].shape != expected[name].shape:
            before, after = tensors[name], expected[name]
            if before.ndim != after.ndim or before.shape[1] != after.shape[1]:
                continue  # another width: `load_tensors` says so
            resize = resize_text_positions if name.startswith("text.") else resize_grid
            tensors[name] = resize(before, after.shape[0])
            notify(f"{name}: {before.shape[0]} positions of {path} interpolated to {after.shape[0]}")
    load_tensors(model, tensors, where=str(checkpoint.path))
    notify(f"starting from the weights of {checkpoint.path}")


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
