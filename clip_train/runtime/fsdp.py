"""FSDP2: torch's `fully_shard`, unit by unit."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from clip_train.errors import ConfigError
from clip_train.runtime.process import Process

RESHARDS = "reshards_after_forward"
"""Attribute of a unit: torch can set this but does not tell it, and `gathered` must put it back."""


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    process: Process,
    *,
    hybrid: bool,
    reshard_after_forward: bool,
    cpu_offload: bool,
) -> None:
    """Each block becomes a unit, and what lies outside the blocks one more; the model is changed in place."""
    if cpu_offload and process.device.type == "cpu":
        raise ConfigError("training.parallel.cpu_offload moves shards off the GPU, and there is none")
    mesh = device_mesh(process, hybrid=hybrid)
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    for block in blocks:
        fully_shard(
            block,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=matrices_in(process.precision, block),
            offload_policy=offload,
        )
        setattr(block, RESHARDS, reshard_after_forward)
    # A tensor without dimensions cannot be cut. Its gradient is averaged by `average_whole_gradients`.
    whole = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    fully_shard(model, mesh=mesh, offload_policy=offload, ignored_params=whole)


def device_mesh(process: Process, *, hybrid: bool) -> DeviceMesh:
    """One dimension over all processes; hybrid: (replicate over nodes, shard within a node)."""
    device, world, local = process.device.type, process.world, process.local_world
    if not hybrid:
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


@contextmanager
def gathered(model: nn.Module) -> Generator[None]:
    """Inside, every process holds all weights."""
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
