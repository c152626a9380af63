"""Steps that go wrong: updates left out because their gradient is not finite, and spikes of the loss.

An update is left out on all processes or on none, since all see the same averaged gradient. What has happened is in
`faults.jsonl` and, as counts, in every line of metrics; the memory is part of a checkpoint, so that a resumed run
counts and warns as the uninterrupted one. Steps are numbered as in `metrics.jsonl`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from clip_train.data.batch import Batch
from clip_train.training.metrics import MetricsFile

REMEMBERED, NEEDED = 64, 16
"""Logged losses that a new one is compared with; fewer than the second number say nothing."""
LEAST_SPREAD = 0.01
"""Of the median: a flat curve's deviation is no measure of what is strange."""


@dataclass
class FaultMemory:
    """What a checkpoint keeps."""

    skipped: int = 0
    """Updates left out because the gradient was not finite."""
    overflows: int = 0
    """Updates that fp16's loss scale left out while it looked for its value: those are normal."""
    spikes: int = 0
    recent: list[int] = field(default_factory=list[int])
    """Steps of the window whose update was left out."""
    losses: list[float] = field(default_factory=list[float])
    """The last logged losses."""


class FaultLog:
    """Counts faults and writes them down.

    Args:
        path: `faults.jsonl`; None only counts (all processes but the first).
        step: steps that are done; later lines of the file are dropped.
        kept: what `state` gave to the checkpoint.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        max_skipped_steps: int,
        window_steps: int,
        spike_sigmas: float | None,
        step: int = 0,
        kept: dict[str, Any] | None = None,
    ) -> None:
        self.max_skipped_steps, self.window_steps, self.spike_sigmas = max_skipped_steps, window_steps, spike_sigmas
        self.memory = FaultMemory(**(kept or {}))
        self._path = path
        self._file = MetricsFile(path, step) if path is not None and path.exists() else None

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self.memory)

    @property
    def counts(self) -> dict[str, int]:
        """For a line of metrics."""
        return {"skipped": self.memory.skipped, "overflows": self.memory.overflows, "spikes": self.memory.spikes}

    def skip(self, step: int, *, loss: float, overflow: bool, keys: Sequence[str]) -> bool:
        """Count an update that was left out. Returns whether the budget is overdrawn by it."""
        memory = self.memory
        if overflow:
            memory.overflows += 1
            return False
        memory.skipped += 1
        memory.recent = [*(old for old in memory.recent if old > step - self.window_steps), step]
        self._write({"step": step, "fault": "not finite", "loss": repr(loss), "keys": list(keys)})
        return len(memory.recent) > self.max_skipped_steps

    def observe(self, loss: float) -> float | None:
        """Look at a logged loss. Returns the sigmas by which it lies above the median where that is a spike.

        Sigma is 1.4826 times the median absolute deviation, which is the standard deviation of a normal distribution
        and does not see the spikes themselves.
        """
        if not math.isfinite(loss):
            return None
        sigmas = deviation(loss, self.memory.losses)
        self.memory.losses = [*self.memory.losses, loss][-REMEMBERED:]
        if sigmas is None or self.spike_sigmas is None or sigmas <= self.spike_sigmas:
            return None
        self.memory.spikes += 1
        return sigmas

    def spike(self, step: int, *, loss: float, sigmas: float, keys: Sequence[str]) -> None:
        """Write down a spike that `observe` found."""
        self._write({"step": step, "fault": "spike", "loss": loss, "sigmas": round(sigmas, 1), "keys": list(keys)})

    def _write(self, event: dict[str, Any]) -> None:
        if self._path is None:
            return
        if self._file is None:
            self._file = MetricsFile(self._path, 0)
        self._file.write(event)


def deviation(value: float, others: Sequence[float]) -> float | None:
    """By how many sigmas a value lies above the median of others; None where there are too few of them."""
    if len(others) < NEEDED:
        return None
    median = statistics.median(others)
    spread = 1.4826 * statistics.median(abs(other - median) for other in others)
    return (value - median) / max(spread, LEAST_SPREAD * abs(median), 1e-12)


def running_statistics(model: nn.Module) -> list[Tensor]:
    """BatchNorm's buffers: what a forward pass changes, and must be put back where the update is left out."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]  # pyright: ignore[reportPrivateUsage]
    return [buffer for norm in norms for buffer in norm.buffers()]


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Norm of each parameter's gradient, the worst first: not finite, then the largest. All processes call it."""
    norms: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            norm = parameter.grad.float().norm()
            norms[name] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return dict(sorted(norms.items(), key=lambda item: (math.isfinite(item[1]), -item[1])))


def write_failed_step(
    folder: Path, rank: int, *, step: int, loss: float, lr: float, norms: dict[str, float], batch: Batch
) -> None:
    """What is needed to look at a step: `rank_R.json` and the batch as `rank_R.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "step": step,
        "rank": rank,
        "loss": repr(loss),
        "lr": lr,
        "gradient_norms": {name: repr(norm) for name, norm in norms.items()},
        "keys": batch.keys,
        "sources": batch.sources,
    }
    (folder / f"rank_{rank}.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in batch.tensors().items()}
    save_file(tensors, folder / f"rank_{rank}.safetensors")
