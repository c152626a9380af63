"""No work for padding: valid tokens of a batch laid end to end.

Linear layers, norms and activations work on one token at a time, so they run on the packed `(T, ...)`
tokens; attention alone needs the grid `(B, L, ...)`, and pays for padding up to the longest caption of the
batch only.

Shapes: `B` batch, `L` longest caption, `T` valid tokens of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class _Pack(torch.autograd.Function):
    """Grid -> packed. The rows are distinct, so the gradient is a copy, not an accumulation: faster than
    the backward of indexing, and deterministic on every device."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.cells = grid.shape[0]
        return grid.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (rows,) = ctx.saved_tensors
        (grad,) = grad_outputs
        return grad.new_zeros(ctx.cells, *grad.shape[1:]).index_copy_(0, rows, grad), None


class _Unpack(torch.autograd.Function):
    """Packed -> grid with zeros where there is no token; the adjoint of `_Pack`."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, rows: Tensor, cells: int) -> Tensor:
        ctx.save_for_backward(rows)
        return packed.new_zeros(cells, *packed.shape[1:]).index_copy_(0, rows, packed)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (rows,) = ctx.saved_tensors
        (grad,) = grad_outputs
        return grad.contiguous().index_select(0, rows), None, None


def take_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    """`(T, W)` or `(B, L, W)`, distinct `rows` `(N,)` counted over all -> `(N, W)`."""
    flat = tokens.flatten(0, -2)
    if not torch.is_grad_enabled():  # graph exporters know no functions of ours
        return flat.index_select(0, rows)
    return _Pack.apply(flat, rows)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Packing:
    """Which cells of a `(B, L)` grid hold tokens."""

    batch: int
    length: int
    rows: Tensor | None
    """`(T,)` int64, the flat cell of each packed token; `None` where every cell is valid."""

    @staticmethod
    def of(lengths: Tensor, length: int, device: torch.device) -> Packing:
        """The packing of captions of `lengths` `(B,)` in a grid `length` wide.

        The number of tokens decides shapes, so it must be known on the host: lengths on an accelerator cost
        one synchronisation.

        Raises:
            ValueError: a length outside `1..length`.
        """
        lengths = lengths.to("cpu", torch.int64)
        out_of_range = ((lengths < 1) | (lengths > length)).nonzero()
        if len(out_of_range):
            first = int(out_of_range[0])
            raise ValueError(f"length {int(lengths[first])} of caption {first} is not in 1..{length}")
        valid = torch.arange(length) < lengths[:, None]
        rows = None if bool(valid.all()) else valid.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
        return Packing(batch=len(lengths), length=length, rows=rows)

    def pack(self, grid: Tensor) -> Tensor:
        """`(B, L, ...)` -> `(T, ...)`."""
        flat = grid.flatten(0, 1)
        return flat if self.rows is None else _Pack.apply(flat, self.rows)  # type: ignore[no-any-return]

    def unpack(self, packed: Tensor) -> Tensor:
        """`(T, ...)` -> `(B, L, ...)`, zero where there is no token."""
        if self.rows is not None:
            packed = _Unpack.apply(packed, self.rows, self.batch * self.length)  # type: ignore[assignment]
        return packed.unflatten(0, (self.batch, self.length))
