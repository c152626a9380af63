"""Figures of a run: `metrics.jsonl` always; wandb and TensorBoard through accelerate's trackers when asked for."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from clip_train.errors import TrainingError


class MetricsFile:
    """Appends one JSON object a line; on resume, drops the lines past the checkpoint."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Keep only lines whose `step` is at most `resume_step`: the rest will be written again."""
        self.path = path
        try:
            if path.is_file():
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
                kept = [line for line in lines if _step_of(line) <= resume_step]
                partial = path.with_suffix(".partial")
                partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
                partial.replace(path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise _unwritable(path, error) from error

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line; a number that is not finite becomes null, since JSON has no other word for it."""
        line = {name: None if _is_not_finite(value) else value for name, value in values.items()}
        data = (json.dumps(line) + "\n").encode()
        try:
            while data:  # a disk that fills up takes a part
                data = data[self._file.write(data) :]
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def close(self) -> None:
        self._file.close()


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _unwritable(path: Path, error: OSError) -> TrainingError:
    return TrainingError(f"{path}: cannot be written: {error.strerror}. Free some space, then run again to go on.")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # a line that a kill cut in two


class Trackers:
    """wandb and TensorBoard, or nothing: the same calls either way."""

    def __init__(self, accelerator: Accelerator, *, project: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Start whatever trackers the accelerator was launched with."""
        self._accelerator = accelerator
        self._active = bool(accelerator.log_with)
        if not self._active:
            return
        if not os.environ.get("WANDB_API_KEY"):
            os.environ.setdefault("WANDB_MODE", "offline")  # never stop at a prompt for a key
        flat = {key: value for key, value in config.items() if isinstance(value, int | float | str | bool)}
        options = {"wandb": {"dir": str(run_dir), "name": run_dir.name}}
        accelerator.init_trackers(project, config=flat, init_kwargs=options)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        if self._active:
            numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
            self._accelerator.log(numbers, step=step)

    def close(self) -> None:
        if self._active:
            self._accelerator.end_training()


@dataclass
class Interval:
    """What has happened since the last log line."""

    started: float
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    """Tokens that were to be told."""
    image_flops: float = 0.0
    """Forward, of all pictures."""
    waited: float = 0.0

    @classmethod
    def begin(cls) -> Interval:
        return cls(time.perf_counter())

    def rates(self, world: int) -> dict[str, float]:
        """Rates over all processes, taking this process's share as typical of each."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return {
            "samples_per_second": self.samples * world / seconds,
            "tokens_per_second": self.tokens * world / seconds,
            "data_wait": self.waited / seconds,
            "seconds_per_step": seconds / max(self.steps, 1),
        }


def measured_peak_flops(device: torch.device, precision: str, seconds: float = 0.2) -> float:
    """FLOP/s of a large matrix product on this device and in this precision: the denominator of MFU."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    torch.mm(a, b)
    began = time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < seconds:
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
