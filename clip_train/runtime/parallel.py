"""How a model is spread over processes: `parallelize` reads top to bottom, over torch's own DDP and `fully_shard`.

*Replicated* (DDP): every process holds the model; gradients are averaged while the backward pass runs.
*Sharded* (FSDP2): every process holds a part of each parameter, its gradient and its optimizer state; a block is
gathered before it is used and its gradient is averaged and dealt out again. What is computed is the same.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from clip_train.errors import ConfigError
from clip_train.models.base import Model
from clip_train.runtime.compilation import compile_blocks
from clip_train.runtime.process import Process
from clip_train.runtime.recompute import recompute_blocks
from clip_train.runtime.shards import is_shard

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True)
class Replicated:
    """DDP."""

    static_graph: bool = False
    bf16_gradients: bool = False


@dataclass(frozen=True)
class Sharded:
    """FSDP2."""

    shard: Literal["full", "hybrid"] = "full"
    reshard_after_forward: bool = True
    cpu_offload: bool = False


def parallelize(
    model: Model,
    process: Process,
    strategy: Replicated | Sharded = Replicated(),
    *,
    compile: bool = False,
    activation_checkpointing: bool = False,
    sync_batch_norm: bool = False,
) -> nn.Module:
    """Move to the device, change the blocks as asked, and wrap; what is returned is what to call in training.

    A single process needs no wrapping and gets none. BatchNorm statistics stay those of each process's rows, as in
    CLIP, unless `sync_batch_norm`. Raises ConfigError for what the model or the device cannot do.
    """
    model.to(process.device)
    if sync_batch_norm:
        synchronize_batch_norm(model, process)
    if activation_checkpointing:
        recompute_blocks(model)
    if compile:
        compile_blocks(blocks_of(model))
    if process.world == 1:
        return model
    if isinstance(strategy, Replicated):
        return replicate(model, process, strategy)
    from clip_train.runtime.fsdp import shard  # a second to import, and most runs do without

    shard(
        model,
        blocks_of(model),
        process,
        hybrid=strategy.shard == "hybrid",
        reshard_after_forward=strategy.reshard_after_forward,
        cpu_offload=strategy.cpu_offload,
    )
    return model


def blocks_of(model: Model) -> list[nn.Module]:
    """The blocks of all towers, in order."""
    return [block for tower in model.towers.values() for block in tower.blocks]


def replicate(model: Model, process: Process, strategy: Replicated) -> DistributedDataParallel:
    """DDP; gradients live in the buckets that are sent."""
    # Every process keeps its own BatchNorm buffers; rank 0's are the ones saved and evaluated. torch 2.14 renamed it.
    known = inspect.signature(DistributedDataParallel).parameters
    own_buffers: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    wrapped = DistributedDataParallel(
        model,
        device_ids=[process.local_rank] if process.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=strategy.static_graph,
        **own_buffers,
    )
    if strategy.bf16_gradients:
        wrapped.register_comm_hook(None, bf16_compress_hook)  # pyright: ignore[reportArgumentType]
    return wrapped


def synchronize_batch_norm(model: Model, process: Process) -> None:
    """BatchNorm over the rows of all processes. Raises ConfigError where there is none, or no kernel for it."""
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):  # pyright: ignore[reportPrivateUsage]
        raise ConfigError("training.sync_batch_norm: this model has no BatchNorm")
    if process.device.type != "cuda":
        raise ConfigError("training.sync_batch_norm: torch's SyncBatchNorm runs on GPUs only")
    for tower in model.towers.values():
        nn.SyncBatchNorm.convert_sync_batchnorm(tower)


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of the parameters."""
    return any(is_shard(parameter) for parameter in model.parameters())


@contextmanager
def without_gradient_sync(model: nn.Module) -> Generator[None]:
    """Backward passes inside only add to local gradients; the first one outside averages the sum."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif is_sharded(model):
        units = cast("FSDPModule", model)
        units.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            units.set_requires_gradient_sync(True)
    else:
        yield


def average_whole_gradients(model: nn.Module) -> None:
    """After the last backward pass of a step: average over processes what `shard` left whole."""
    if is_sharded(model):
        for parameter in model.parameters():
            if not is_shard(parameter) and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()


def clip_gradients(model: nn.Module, largest: float | None) -> float:
    """Norm of the gradient over all processes' shards; the gradient is then shortened to `largest`."""
    parameters = list(model.parameters())
    limit = math.inf if largest is None else largest
    sharded = [parameter for parameter in parameters if is_shard(parameter)]
    if not sharded:
        return float(nn.utils.clip_grad_norm_(parameters, limit))
    # torch's norm takes either kind of tensor, not both in one call.
    whole = [parameter for parameter in parameters if not is_shard(parameter)]
    part = nn.utils.get_total_norm([p.grad for p in sharded if p.grad is not None])
    assert is_shard(part)
    rest = nn.utils.get_total_norm([p.grad for p in whole if p.grad is not None])
    norm = torch.hypot(part.full_tensor().to(rest.device), rest)
    if largest is not None:
        factor = float(torch.clamp(largest / (norm + 1e-6), max=1.0))
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
    return float(norm)


def separate_shards(optimizer: torch.optim.Optimizer) -> None:
    """Split parameter groups so that none mixes whole and sharded parameters: fused updates take one kind a call."""
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        kinds: Iterable[list[Tensor]] = (
            [p for p in group["params"] if is_shard(p)],
            [p for p in group["params"] if not is_shard(p)],
        )
        groups += [{**group, "params": kind} for kind in kinds if kind]
    optimizer.param_groups[:] = groups


@contextmanager
def unsharded(model: nn.Module) -> Generator[None]:
    """Inside, every process holds all weights, so that it may run as many forward passes as it likes.

    Evaluation deals samples out unevenly: with gathers inside the passes, a process with one batch more would wait
    for the others for ever. Costs one copy of the weights. For forward passes only; does nothing to a whole model.
    """
    if is_sharded(model):
        from clip_train.runtime.fsdp import gathered

        with gathered(model):
            yield
    else:
        yield
