"""What each source of a mixture gave and how well its pairs are learned, between two lines of metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clip_train.runtime import collectives


class SourceTally:
    """Counts pairs and sums their losses by source, on the device: a step never waits for it.

    Args:
        names: the sources, in the recipe's order; with a single one there is nothing to tell apart.
        device: where losses are.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._numbers = {name: number for number, name in enumerate(names)}
        self._device = device
        self._clear()

    def _clear(self) -> None:
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        self._counts = [0] * len(self._numbers)
        self._losses = torch.zeros(len(self._numbers), dtype=dtype, device=self._device)
        self._known = True

    def add(self, sources: Sequence[str], losses: Tensor | None) -> None:
        """One batch of this process: the source of each pair and, where the objective tells, `(b,)` losses."""
        if len(self._numbers) < 2:
            return
        rows = [self._numbers[name] for name in sources]
        for row in rows:
            self._counts[row] += 1
        if losses is None:
            self._known = False
        else:
            index = torch.tensor(rows).to(self._device, non_blocking=True)
            self._losses.index_add_(0, index, losses.to(self._losses.dtype))

    def read(self) -> dict[str, dict[str, float]]:
        """`{"web": {"samples": 512, "loss": 3.1}, …}` over all processes since the last call; empty for one source.

        All processes call it together. A source that gave nothing has no loss.
        """
        if len(self._numbers) < 2:
            return {}
        size = len(self._numbers)
        sums = collectives.sum_over_processes([*self._counts, *self._losses.tolist()], self._device)
        found: dict[str, dict[str, float]] = {}
        for name, number in self._numbers.items():
            found[name] = {"samples": int(sums[number])}
            if self._known and sums[number]:
                found[name]["loss"] = sums[size + number] / sums[number]
        self._clear()
        return found


def flatten(line: dict[str, object]) -> dict[str, object]:
    """A line of metrics with `sources` as `sources/web/loss`: for what knows only names and numbers."""
    flat = {name: value for name, value in line.items() if name != "sources"}
    sources = line.get("sources")
    if isinstance(sources, dict):
        for name, figures in sources.items():
            flat |= {f"sources/{name}/{short}": value for short, value in figures.items()}
    return flat
