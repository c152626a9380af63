"""The state of a run on disk: written aside, synced, renamed, so that a checkpoint is whole or is not there.

    checkpoints/step_1000/
        model.safetensors       weights and buffers
        optimizer.safetensors   `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME`
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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clip_train.errors import CheckpointError, TrainingError

FORMAT = 1
FILES = ("model.safetensors", "state.json", "recipe.toml", "tokenizer.json")


@dataclass(frozen=True)
class State:
    """Everything beside tensors that a run needs to go on."""

    step: int
    """Updates done; the next batch is the global batch of this number."""
    samples: int
    data_fingerprint: str
    tokenizer_fingerprint: str
    bad_samples: int = 0
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
        return _read_tensors(self.path / "model.safetensors")

    def optimizer(self) -> dict[str, Tensor]:
        return _read_tensors(self.path / "optimizer.safetensors")

    @property
    def tokenizer_path(self) -> Path:
        return self.path / "tokenizer.json"


def save_checkpoint(
    folder: Path,
    state: State,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    recipe_toml: str,
    save_tokenizer: Callable[[Path], None],
    *,
    keep_last: int,
) -> Path:
    """Write `folder/step_N` atomically, point `latest` at it, remove all but the `keep_last` newest.

    Raises TrainingError when the disk is full or not writable; what was there before stays whole.
    """
    final = folder / f"step_{state.step}"
    partial = folder / f".step_{state.step}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_file({name: value.contiguous() for name, value in model.items()}, partial / "model.safetensors")
        save_file({name: value.contiguous() for name, value in optimizer.items()}, partial / "optimizer.safetensors")
        (partial / "recipe.toml").write_text(recipe_toml, encoding="utf-8")
        save_tokenizer(partial / "tokenizer.json")
        (partial / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        if final.exists():  # a run that went back and came here again
            shutil.rmtree(final)
        partial.rename(final)
        link = folder / ".latest.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        link.replace(folder / "latest")
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(
            f"{final}: the checkpoint of step {state.step} could not be written ({error}). Earlier checkpoints are "
            "whole: make room and run again with --resume auto"
        ) from error
    for old in list_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)
    return final


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
    if missing := [name for name in FILES if not (path / name).is_file()]:
        raise CheckpointError(f"{path}: incomplete, {', '.join(missing)} missing; use an earlier checkpoint beside it")
    try:
        raw = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {raw['format']}, but this version reads format {FORMAT}")
        state = State(**raw)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}/state.json: damaged ({error!r}); use an earlier checkpoint beside it") from error
    return Checkpoint(path, state, (path / "recipe.toml").read_text(encoding="utf-8"))


def load_weights(model: nn.Module, checkpoint: Checkpoint, *, assign: bool = False) -> None:
    """The checkpoint's weights, as `load_tensors`."""
    load_tensors(model, checkpoint.model(), where=str(checkpoint.path), assign=assign)


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, where: str, assign: bool = False) -> None:
    """Every tensor by name, shape and nothing left over; CheckpointError says what does not fit."""
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    problems += [f"{name} is not of this model" for name in tensors.keys() - expected.keys()]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, the recipe's is {tuple(expected[name].shape)}"
        for name in expected.keys() & tensors.keys()
        if tensors[name].shape != expected[name].shape
    ]
    if problems:
        raise CheckpointError(f"{where}: does not fit the recipe: {'; '.join(sorted(problems)[:5])}")
    model.load_state_dict(tensors, strict=True, assign=assign)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); use an earlier checkpoint") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
