"""What the tiled losses share: when to tile, how large a tile is, and where its positives stand.

A tile is a run of rows of the `b x B` logits with all their columns. It is computed, used and overwritten, so that no
`b x B` matrix ever exists; what backward needs of it is computed again.

Shapes: `b` rows of this process, `B` rows of all processes, `r` rows of a tile, `K` positives of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clip_train.objectives.base import Features

Impl = Literal["auto", "dense", "tiled"]

# Elements of a tile. On a CPU a tile and its temporary should stay in the last-level cache, but a product of fewer
# than LEAST_ROWS rows wastes the matrix units; on a GPU a launch must be worth its cost.
CPU_TILE, GPU_TILE, LEAST_ROWS = 2**20, 2**26, 128
# `auto` holds whole logits up to this many elements. On a CPU the tiled losses were never slower from 512 x 512 on
# (docs/benchmarks.md); on a GPU launches cost more, and 64 MiB a matrix is nothing.
CPU_DENSE, GPU_DENSE = 2**18, 2**24


def is_tiled(impl: Impl, rows: int, columns: int, device: str) -> bool:
    """Whether logits of `b x B` are computed in tiles on `cpu` or `cuda`: as `impl` says, or by their number."""
    if impl != "auto":
        return impl == "tiled"
    return rows * columns > (GPU_DENSE if device == "cuda" else CPU_DENSE)


def tile_rows(columns: int, device: str) -> int:
    """Rows of a tile."""
    return max(LEAST_ROWS, (GPU_TILE if device == "cuda" else CPU_TILE) // columns)


def logit_bytes(impl: Impl, rows: int, columns: int, device: str) -> int:
    """Memory of the fp32 logits and what is made of them, at most: about four matrices of `b x B` where they are dense
    (both directions' logits and log-softmaxes; the sigmoid loss makes as many of its one), two tiles otherwise."""
    if is_tiled(impl, rows, columns, device):
        return 2 * 4 * min(rows, tile_rows(columns, device)) * columns
    return 4 * 4 * rows * columns


def row_runs(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Runs of rows, each a tile."""
    step = tile_rows(columns, device.type)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@dataclass(frozen=True)
class Positives:
    """Which columns a row is paired with: its own, or all of its group of equal captions."""

    first_row: int
    groups: Tensor | None
    """(b,) int64, or None: each row has one positive, its own column."""
    all_groups: Tensor | None
    """(B,) int64."""

    @staticmethod
    def of(features: Features, equal_captions: bool) -> Positives:
        """Raises ValueError where groups are needed and missing."""
        if not equal_captions:
            return Positives(features.first_row, None, None)
        if features.groups is None or features.all_groups is None:
            raise ValueError("equal_captions_positive needs the groups of equal captions in the batch")
        return Positives(features.first_row, features.groups, features.all_groups)

    def within(self, rows: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row (from the tile's first) and column of each positive of a tile, each (K,) int64; no pair twice."""
        if self.groups is None or self.all_groups is None:
            own = torch.arange(rows.stop - rows.start, device=device)
            return own, own + (self.first_row + rows.start)
        row, column = (self.groups[rows, None] == self.all_groups).nonzero(as_tuple=True)
        return row, column

    def counts(self, columns: int, like: Tensor) -> Tensor:
        """How many positives each of all `B` rows has: (B,), of the type and on the device of `like`."""
        if self.all_groups is None:
            return like.new_ones(columns)
        _, group, size = self.all_groups.unique(return_inverse=True, return_counts=True)
        return size[group].to(like.dtype)
