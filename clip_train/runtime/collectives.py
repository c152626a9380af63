"""Collectives over the process group; each is the identity in a single process.

Shape legend: `b` rows of this process, `B = b x world` rows of all processes, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# From torch 2.14 on the names of before are deprecated; older ones do not know the new names.
_all_gather: Callable[[Tensor, Tensor], Any] = (
    vars(dist).get("all_gather_single") or vars(dist)["all_gather_into_tensor"]
)
_reduce_scatter: Callable[[Tensor, Tensor], Any] = (
    vars(dist).get("reduce_scatter_single") or vars(dist)["reduce_scatter_tensor"]
)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """All rows, with the gradient that every process's loss sends to ours.

    Forward concatenates, so backward sums over processes and keeps our rows. With a loss that is the mean over
    local rows, and DDP's mean over processes on top, parameters get the gradient of the mean over all B rows.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = rows.shape[0]
        gathered = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
        _all_gather(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        if dist.get_backend() == "nccl":
            own = grad.new_empty((ctx.count, *grad.shape[1:]))
            _reduce_scatter(own, grad)
            return own
        dist.all_reduce(grad)  # gloo has no reduce-scatter
        return grad[rank() * ctx.count : (rank() + 1) * ctx.count]


def gather_rows(rows: Tensor) -> Tensor:
    """(b, ...) of each process -> (B, ...) in rank order, differentiable. Every process has the same b."""
    return rows if world_size() == 1 else _Gather.apply(rows)  # pyright: ignore[reportReturnType]


def first_row(rows: Tensor) -> int:
    """Where this process's rows begin among the gathered ones."""
    return rank() * rows.shape[0]


def sum_of(values: Tensor) -> Tensor:
    """Elementwise sum over processes of a tensor of one shape; not differentiable."""
    return _reduced(values, dist.ReduceOp.SUM)


def max_of(values: Tensor) -> Tensor:
    """Elementwise maximum over processes; not differentiable."""
    return _reduced(values, dist.ReduceOp.MAX)


def _reduced(values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    if world_size() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values, op=op)
    return values


def sum_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    """Elementwise sum, in fp64 (fp32 where the device has no fp64)."""
    if world_size() == 1:
        return [float(value) for value in values]
    dtype = torch.float32 if device.type == "mps" else torch.float64
    total = torch.tensor(list(values), dtype=dtype, device=device)
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


def add_up_(tensor: Tensor) -> None:
    """Replace by the sum over processes, in place and in the tensor's dtype."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def sum_modulo_2_63(value: int, device: torch.device) -> int:
    """Sum of non-negative integers over processes, modulo 2**63; exact."""
    if world_size() == 1:
        return value % 2**63
    # Two halves that cannot overflow: float or int64 sums of the whole number would.
    halves = torch.tensor([value % 2**32, value // 2**32], dtype=torch.int64, device=device)
    dist.all_reduce(halves)
    low, high = (int(half) for half in halves.tolist())
    return (low + high * 2**32) % 2**63


def any_process(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """For each flag, whether it is up in any process; one small collective for all of them."""
    if world_size() == 1:
        return list(flags)
    up = torch.tensor([int(flag) for flag in flags], device=device)
    dist.all_reduce(up, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in up.tolist()]


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers (BatchNorm's statistics), so that all evaluate the same model."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """One small picklable object of each process, in rank order; over all processes or those of `group`."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group)
    return values
