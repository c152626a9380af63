"""Tensors of a checkpoint cut into files, one a process, in the layout of torch.distributed.checkpoint.

    step_1000/model/shard-00001-of-00004.safetensors
    step_1000/optimizer/shard-00001-of-00004.safetensors

The files are those of torch's `HuggingFaceStorageWriter(save_distributed=True)`: safetensors whose header says at which
offset of the whole tensor each part lies. torch's reader cuts them anew for any number of processes. Its writer is not
used because it packs a file in memory first, holding the interpreter's lock that training needs.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_train.errors import CheckpointError
from clip_train.runtime.shards import is_shard

KINDS = ("model", "optimizer")


@dataclass(frozen=True)
class Part:
    """This process's part of a tensor."""

    tensor: Tensor
    offsets: tuple[int, ...]
    """Of its first entry in the whole."""


def parts_of(tensors: Mapping[str, Tensor], *, is_main: bool) -> dict[str, Part]:
    """What this process writes: its shards (those of one replica only), and on the first process the whole tensors."""
    parts: dict[str, Part] = {}
    for name, tensor in tensors.items():
        if is_shard(tensor):
            *replicas, _ = tensor.device_mesh.get_coordinate() or [0]
            local = tensor.to_local()
            if local.numel() and not any(replicas):
                (chunk,) = tensor.__create_chunk_list__()
                parts[name] = Part(local, tuple(chunk.offsets))
        elif is_main:
            parts[name] = Part(tensor, (0,) * tensor.ndim)
    return parts


def write_part(folder: Path, rank: int, world: int, parts: Mapping[str, Part]) -> None:
    """One process's file of one kind of tensors."""
    folder.mkdir(exist_ok=True)
    offsets = {name: {"saved_offsets": list(part.offsets)} for name, part in parts.items()}
    save_file(
        {name: part.tensor.contiguous() for name, part in parts.items()},
        shard_path(folder, rank, world),
        metadata={"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"},
    )


def shard_path(folder: Path, rank: int, world: int) -> Path:
    return folder / f"shard-{rank + 1:05}-of-{world:05}.safetensors"


def check_complete(checkpoint: Path, shards: int) -> None:
    """Raises CheckpointError naming the first file of a sharded checkpoint that is not there."""
    for kind in KINDS:
        for rank in range(shards):
            if not shard_path(checkpoint / kind, rank, shards).is_file():
                name = shard_path(checkpoint / kind, rank, shards).relative_to(checkpoint)
                raise CheckpointError(f"{checkpoint}: incomplete, {name} missing; use an earlier checkpoint beside it")


def read_whole(folder: Path) -> dict[str, Tensor]:
    """Whole tensors, put together from their parts."""
    return read_into(
        folder, lambda shapes, dtypes: {name: torch.empty(shapes[name], dtype=dtypes[name]) for name in shapes}
    )


Shapes = Mapping[str, torch.Size]
Targets = Callable[[Shapes, Mapping[str, torch.dtype]], dict[str, Tensor]]
"""From the shapes and dtypes of all stored tensors to the tensors to fill, by name."""


def read_into(path: Path, targets: Targets) -> dict[str, Tensor]:
    """Fill tensors in place, sharded ones with this process's part, from a folder of shards or one whole file.

    Raises CheckpointError where a file is damaged.
    """
    try:
        return _read_folder(path, targets) if path.is_dir() else _read_file(path, targets)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not whole safetensors ({error}); use an earlier checkpoint") from error


def _read_folder(folder: Path, targets: Targets) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    stored = {name: tensor for name, tensor in found.items() if isinstance(tensor, TensorStorageMetadata)}
    shapes = {name: tensor.size for name, tensor in stored.items()}
    filled = targets(shapes, {name: tensor.properties.dtype for name, tensor in stored.items()})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
        try:
            load({**filled}, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        except CheckpointException as error:
            raise SafetensorError(str(error)) from error
    return filled


def _read_file(path: Path, targets: Targets) -> dict[str, Tensor]:
    from torch.distributed.tensor import distribute_tensor

    with safe_open(path, framework="pt") as file, torch.no_grad():
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        shapes = {name: torch.Size(part.get_shape()) for name, part in slices.items()}
        filled = targets(shapes, {name: DTYPES[part.get_dtype()] for name, part in slices.items()})
        for name, target in filled.items():
            whole = file.get_tensor(name)
            if is_shard(target):  # every process cuts out its own part: nothing is sent
                whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None).to_local()
                target = target.to_local()
            target.copy_(whole)
    return filled


DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
