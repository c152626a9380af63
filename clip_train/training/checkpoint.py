"""The state of a run on disk: written aside, synced, renamed, so that a checkpoint is whole or is not there.

    checkpoints/step_1000/
        model.safetensors       weights and buffers, or model/shard-*.safetensors (`sharded.py`)
        optimizer.safetensors   `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME`, or optimizer/shard-*.safetensors;
                                `ema/NAME`, the averaged weights
        state.json              step, samples, fingerprints, scaler, versions
        recipe.toml             the resolved recipe
        tokenizer.json          the vocabulary
    checkpoints/latest          relative symlink to the newest

There is no generator state to keep: every random number is a function of (seed, step, rank) or (seed, epoch, sample).
safetensors and JSON hold data only, so nothing in a checkpoint can run code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clip_train.errors import CheckpointError, TrainingError
from clip_train.runtime.shards import is_shard
from clip_train.training import sharded
from clip_train.training.average import PREFIX

FORMAT = 1
FILES = ("state.json", "recipe.toml", "tokenizer.json")


@dataclass(frozen=True)
class State:
    """Everything beside tensors that a run needs to go on."""

    step: int
    """Updates done; the next batch is the global batch of this number."""
    samples: int
    data_fingerprint: str
    tokenizer_fingerprint: str
    bad_samples: int = 0
    captions_cut: int = 0
    sources: dict[str, Any] = field(default_factory=dict[str, Any])
    """Shards and samples of each source."""
    origin: tuple[int, int] = (0, 0)
    """A step and the number of the sample with which it began: other than 0 after an accepted change."""
    changes: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Accepted changes: `{"step": …, "samples": …, "changed": {key: [old, new]}}`."""
    faults: dict[str, Any] = field(default_factory=dict[str, Any])
    shards: int = 0
    """Files that each kind of tensors is cut into; 0 for one whole file."""
    scaler: dict[str, Any] = field(default_factory=dict[str, Any])
    versions: dict[str, str] = field(default_factory=dict[str, str])
    format: int = FORMAT


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's parts, read back."""

    path: Path
    state: State
    recipe_toml: str

    def model(self) -> dict[str, Tensor]:
        """Whole weights and buffers by name, however they are stored."""
        return self._whole("model")

    def optimizer(self) -> dict[str, Tensor]:
        """The optimizer's whole tensors by kind and name."""
        return self._whole("optimizer")

    def average(self) -> dict[str, Tensor]:
        """The averaged weights by name, whole; none where the run kept no average."""

        def targets(shapes: sharded.Shapes, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
            kept = [key for key in shapes if key.startswith(PREFIX)]
            return {key: torch.empty(shapes[key], dtype=dtypes[key]) for key in kept}

        return {key.removeprefix(PREFIX): tensor for key, tensor in self.read_into("optimizer", targets).items()}

    def _whole(self, kind: str) -> dict[str, Tensor]:
        if self.state.shards:
            return sharded.read_whole(self.path / kind)
        return _read_tensors(self.path / f"{kind}.safetensors")

    def read_into(self, kind: str, targets: sharded.Targets) -> dict[str, Tensor]:
        """Fill tensors, sharded ones with this process's part only; `targets` makes them from all names and shapes."""
        return sharded.read_into(self.path / kind if self.state.shards else self.path / f"{kind}.safetensors", targets)

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer.json"


@dataclass(frozen=True)
class Companions:
    """What lies beside the tensors of every checkpoint of a run."""

    recipe_toml: str
    save_tokenizer: Callable[[Path], object]


def save_checkpoint(
    folder: Path,
    state: State,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    companions: Companions,
    *,
    keep_last: int,
) -> Path:
    """Write `folder/step_N` atomically, point `latest` at it, remove all but the `keep_last` newest.

    Raises TrainingError when the disk is full or not writable; what was there before stays whole.
    """
    final = folder / f"step_{state.step}"
    with failing_whole(final):
        write_whole(final, state, model, optimizer, companions)
    link_and_rotate(final, keep_last)
    return final


def write_whole(
    final: Path, state: State, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], companions: Companions
) -> None:
    """Tensors of every kind in one file each, and what lies beside them."""
    partial = begin(final)
    save_file({name: value.contiguous() for name, value in model.items()}, partial / "model.safetensors")
    save_file({name: value.contiguous() for name, value in optimizer.items()}, partial / "optimizer.safetensors")
    publish(final, state, companions)


@contextmanager
def failing_whole(final: Path) -> Generator[None]:
    """What goes wrong inside removes the unfinished checkpoint and becomes a TrainingError."""
    try:
        with explaining(final):
            yield
    except TrainingError:
        shutil.rmtree(unfinished(final), ignore_errors=True)
        raise


@contextmanager
def explaining(final: Path) -> Generator[None]:
    """What the disk refuses becomes a TrainingError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{final}: the checkpoint could not be written ({error}). Earlier checkpoints are whole: make room and "
            "run again with --resume auto"
        ) from error


def unfinished(final: Path) -> Path:
    """Where a checkpoint is written before it has its name."""
    return final.with_name(f".{final.name}.partial")


def begin(final: Path) -> Path:
    """An empty folder to write into. What killed processes left beside it goes."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(".*.partial"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
    partial = unfinished(final)
    partial.mkdir()
    return partial


def publish(final: Path, state: State, companions: Companions) -> None:
    """Add the small files, bring all to the disk, and give the folder its name."""
    partial = unfinished(final)
    (partial / "recipe.toml").write_text(companions.recipe_toml, encoding="utf-8")
    companions.save_tokenizer(partial / "tokenizer.json")
    (partial / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
    for path in partial.rglob("*"):
        sync(path)
    sync(partial)
    if final.exists():  # a run that went back and came here again
        shutil.rmtree(final)
    partial.rename(final)
    sync(final.parent)


def link_and_rotate(final: Path, keep_last: int) -> None:
    """`latest` points at this one; all but the newest go."""
    with failing_whole(final):
        link = final.parent / ".latest.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        link.replace(final.parent / "latest")
        sync(final.parent)
    for old in list_checkpoints(final.parent)[:-keep_last]:
        shutil.rmtree(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest first."""
    found = [
        (int(match[1]), path) for path in folder.glob("step_*") if (match := re.fullmatch(r"step_(\d+)", path.name))
    ]
    return [path for _, path in sorted(found)]


def find_checkpoint(path: Path) -> Path:
    """The checkpoint meant by a checkpoint folder, a run folder or a `checkpoints` folder (then the newest)."""
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such run or checkpoint")
    if (path / "state.json").is_file():
        return path.resolve()
    for folder in (path / "checkpoints", path):
        if (folder / "latest" / "state.json").is_file():
            return (folder / "latest").resolve()
        if complete := list_checkpoints(folder):
            return complete[-1]
    if path.is_file():
        raise CheckpointError(
            f"{path}: not a clip-train checkpoint, which is a folder. Pickles are never loaded, since they can run "
            "code; convert foreign weights to safetensors first"
        )
    raise CheckpointError(f"{path}: holds no checkpoint (looked for checkpoints/latest and checkpoints/step_N)")


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint's small files; tensors are read when asked for.

    Raises CheckpointError naming what is missing or damaged.
    """
    path = find_checkpoint(path)
    missing = [name for name in FILES if not (path / name).is_file()]
    if not ((path / "model.safetensors").is_file() or (path / "model").is_dir()):
        missing.append("model.safetensors")
    if missing:
        raise CheckpointError(f"{path}: incomplete, {', '.join(missing)} missing; use an earlier checkpoint beside it")
    try:
        raw = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {raw['format']}, but this version reads format {FORMAT}")
        state = State(**raw | {"origin": tuple(raw.get("origin", (0, 0)))})
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}/state.json: damaged ({error!r}); use an earlier checkpoint beside it") from error
    sharded.check_complete(path, state.shards)
    return Checkpoint(path, state, (path / "recipe.toml").read_text(encoding="utf-8"))


def load_weights(model: nn.Module, checkpoint: Checkpoint, *, assign: bool = False) -> None:
    """The checkpoint's weights, as `load_tensors`; of sharded parameters only this process's part is read."""
    expected = model.state_dict()
    if any(is_shard(tensor) for tensor in expected.values()):
        checkpoint.read_into("model", lambda shapes, _: _fitting(expected, shapes, str(checkpoint.path)))
    else:
        load_tensors(model, checkpoint.model(), where=str(checkpoint.path), assign=assign)


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, where: str, assign: bool = False) -> None:
    """Every tensor by name, shape and nothing left over; CheckpointError says what does not fit."""
    _fitting(model.state_dict(), {name: tensor.shape for name, tensor in tensors.items()}, where)
    model.load_state_dict(tensors, strict=True, assign=assign)


def read_optimizer(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's tensors by kind and name; of a sharded parameter's, this process's part alone."""
    parameters = dict(model.named_parameters())
    if not any(is_shard(parameter) for parameter in parameters.values()):
        return checkpoint.optimizer()

    def targets(shapes: sharded.Shapes, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for key, shape in shapes.items():
            like = parameters.get(key.partition("/")[2])
            if like is not None and is_shard(like) and like.shape == shape:
                tensors[key] = torch.zeros_like(like.detach(), dtype=dtypes[key])
            else:
                tensors[key] = torch.zeros(shape, dtype=dtypes[key])
        return tensors

    return checkpoint.read_into("optimizer", targets)


def _fitting(expected: dict[str, Tensor], shapes: Mapping[str, torch.Size], where: str) -> dict[str, Tensor]:
    problems = [f"{name} is missing" for name in expected.keys() - shapes.keys()]
    problems += [f"{name} is not of this model" for name in shapes.keys() - expected.keys()]
    problems += [
        f"{name} is {tuple(shapes[name])}, the recipe's is {tuple(expected[name].shape)}"
        for name in expected.keys() & shapes.keys()
        if shapes[name] != expected[name].shape
    ]
    if problems:
        raise CheckpointError(f"{where}: does not fit the recipe: {'; '.join(sorted(problems)[:5])}")
    return expected


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); use an earlier checkpoint") from error


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
