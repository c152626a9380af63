"""One learned table of positions, read at a smaller size.

Shapes: `G` cells a side of the learned grid, `S` of the one asked for, `W` width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F


def resample_grid(table: Tensor, side: int) -> Tensor:
    """`(G * G, W)` -> `(side * side, W)`: bicubic with antialiasing, as pictures are made smaller; fp32.

    A product with two fixed matrices, so that the gradient is deterministic on every device.
    """
    grid = round(table.shape[0] ** 0.5)
    if side == grid:
        return table
    weights = _weights(grid, side, table.device)
    with torch.autocast(table.device.type, enabled=False):
        rows = torch.einsum("sg,ghw->shw", weights, table.float().unflatten(0, (grid, grid)))
        return torch.einsum("sh,ghw->gsw", weights, rows).flatten(0, 1)


@lru_cache(maxsize=16)
def _weights(grid: int, side: int, device: torch.device) -> Tensor:
    """`(side, grid)`: what each place of the new side takes from those of the old one."""
    with torch.inference_mode(False), torch.no_grad():
        # A channel for each old place, its row lit. (Torch 2.15 gets pictures of one column wrong.)
        places = torch.eye(grid)[None, :, :, None].repeat(1, 1, 1, grid)
        small = F.interpolate(places, (side, grid), mode="bicubic", antialias=True)
        return small[0, :, :, 0].T.contiguous().to(device)
