"""How a model is spread over processes: `parallelize` reads top to bottom, over torch's own DDP and `fully_shard`.

*Replicated* (DDP): every process holds the model; gradients are averaged while the backward pass runs.
*Sharded* (FSDP2): every process holds a part of each parameter, its gradient and its optimizer state; a block is
gathered before it is used and its gradient is averaged and dealt out again. What is computed is the same.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from clip_train.errors import ConfigError
from clip_train.models.two_tower import TwoTower
from clip_train.runtime.process import Process
from clip_train.runtime.recompute import recompute_blocks

RESHARDS = "reshards_after_forward"
"""Attribute of a unit of FSDP: torch can set this but does not tell it, and `unsharded` must put it back."""


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
    model: TwoTower,
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
        for block in blocks_of(model):
            block.compile(dynamic=True)  # packed captions have another length in every step
    if process.world == 1:
        return model
    if isinstance(strategy, Replicated):
        return replicate(model, process, strategy)
    return shard(model, process, strategy)


def blocks_of(model: TwoTower) -> list[nn.Module]:
    """The blocks of both towers, in order."""
    return [*model.image.blocks, *model.text.blocks]


def replicate(model: TwoTower, process: Process, strategy: Replicated) -> DistributedDataParallel:
    """DDP; gradients live in the buckets that are sent."""
    wrapped = DistributedDataParallel(
        model,
        device_ids=[process.local_rank] if process.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=strategy.static_graph,
        # Every process keeps its own BatchNorm buffers; rank 0's are the ones saved and evaluated.
        broadcast_buffers=False,
    )
    if strategy.bf16_gradients:
        wrapped.register_comm_hook(None, bf16_compress_hook)  # pyright: ignore[reportArgumentType]
    return wrapped


def shard(model: TwoTower, process: Process, strategy: Sharded) -> nn.Module:
    """FSDP2: each block is a unit, and what lies outside the blocks is one more. Changes the model in place."""
    if strategy.cpu_offload and process.device.type == "cpu":
        raise ConfigError("training.parallel.cpu_offload moves shards off the GPU, and there is none")
    mesh = device_mesh(process, strategy)
    offload = CPUOffloadPolicy() if strategy.cpu_offload else OffloadPolicy()
    for block in blocks_of(model):
        fully_shard(
            block,
            mesh=mesh,
            reshard_after_forward=strategy.reshard_after_forward,
            mp_policy=matrices_in(process.precision, block),
            offload_policy=offload,
        )
        setattr(block, RESHARDS, strategy.reshard_after_forward)
    # A tensor without dimensions cannot be cut. Its gradient is averaged by `average_whole_gradients`.
    whole = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    fully_shard(model, mesh=mesh, offload_policy=offload, ignored_params=whole)
    return model


def device_mesh(process: Process, strategy: Sharded) -> DeviceMesh:
    """`full`: one dimension over all processes. `hybrid`: (replicate over nodes, shard within a node)."""
    device, world, local = process.device.type, process.world, process.local_world
    if strategy.shard == "full":
        return init_device_mesh(device, (world,), mesh_dim_names=("shard",))
    if world == local or world % local:
        raise ConfigError(
            f"training.parallel.shard = 'hybrid' replicates over nodes: with {world} processes, {local} on this node, "
            "take 'full'"
        )
    return init_device_mesh(device, (world // local, local), mesh_dim_names=("replicate", "shard"))


def matrices_in(precision: str, block: nn.Module) -> MixedPrecisionPolicy:
    """Gather the operands of matrix products in the precision autocast gives them anyway; all else stays fp32.

    Rounding before the gather instead of after it changes no number and halves what is sent. Gradients are reduced
    in fp32. A torch without the per-parameter choice (before 2.15) gathers in fp32.
    """
    if precision == "fp32" or "param_dtype_override_fn" not in {field.name for field in fields(MixedPrecisionPolicy)}:
        return MixedPrecisionPolicy()
    products = {module.weight for module in block.modules() if isinstance(module, (nn.Linear, nn.Conv2d))}

    def own_dtype_unless_product(parameter: nn.Parameter) -> torch.dtype | None:
        return None if parameter in products else parameter.dtype

    options: dict[str, Any] = {"param_dtype_override_fn": own_dtype_unless_product}
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False, **options
    )


def synchronize_batch_norm(model: TwoTower, process: Process) -> None:
    """BatchNorm over the rows of all processes. Raises ConfigError where there is none, or no kernel for it."""
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):  # pyright: ignore[reportPrivateUsage]
        raise ConfigError("training.sync_batch_norm: this model has no BatchNorm")
    if process.device.type != "cuda":
        raise ConfigError("training.sync_batch_norm: torch's SyncBatchNorm runs on GPUs only")
    for tower in (model.image, model.text):
        nn.SyncBatchNorm.convert_sync_batchnorm(tower)


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextmanager
def without_gradient_sync(model: nn.Module) -> Generator[None]:
    """Backward passes inside only add to local gradients; the first one outside averages the sum."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


def average_whole_gradients(model: nn.Module) -> None:
    """After the last backward pass of a step: average over processes what `shard` left whole."""
    if isinstance(model, FSDPModule):
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor) and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()


def clip_gradients(model: nn.Module, largest: float | None) -> float:
    """Norm of the gradient over all processes' shards; the gradient is then shortened to `largest`."""
    parameters = list(model.parameters())
    limit = math.inf if largest is None else largest
    sharded = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    if not sharded:
        return float(nn.utils.clip_grad_norm_(parameters, limit))
    # torch's norm takes either kind of tensor, not both in one call.
    whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    part = nn.utils.get_total_norm([p.grad for p in sharded if p.grad is not None])
    assert isinstance(part, DTensor)
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
            [p for p in group["params"] if isinstance(p, DTensor)],
            [p for p in group["params"] if not isinstance(p, DTensor)],
        )
        groups += [{**group, "params": kind} for kind in kinds if kind]
    optimizer.param_groups[:] = groups


@contextmanager
def unsharded(model: nn.Module) -> Generator[None]:
    """Inside, every process holds all weights, so that it may run as many forward passes as it likes.

    Evaluation deals samples out unevenly: with gathers inside the passes, a process with one batch more would wait
    for the others for ever. Costs one copy of the weights. For forward passes only; does nothing to a whole model.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(bool(getattr(unit, RESHARDS, False)), recurse=False)
