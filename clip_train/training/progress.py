"""What a person sees while a run goes on: a live bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Context manager; `enabled` is false on all processes but the first."""

    def __init__(self, console: Console, *, total: int, done: int, enabled: bool) -> None:
        self._console = console
        self._live = enabled and console.is_terminal
        self._lines = enabled and not console.is_terminal
        self._total = total
        self._done = done
        self._start = (time.monotonic(), done)
        self._last_line = 0.0
        self._bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("training", total=total, completed=done, figures="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self) -> None:
        self._done += 1
        self._bar.advance(self._task)

    def show(self, line: Mapping[str, Any]) -> None:
        """The newest line of metrics."""
        figures = (
            f"loss [bold]{line['loss']:.3f}[/] · scale {line['logit_scale']:.1f} · "
            f"{line['samples_per_second']:,.0f} samples/s · {line['tokens_per_second']:,.0f} tokens/s · "
            f"MFU {100 * line['mfu']:.0f}% · grad {line['grad_norm']:.2f} · wait {100 * line['data_wait']:.0f}%"
        )
        self._bar.update(self._task, figures=figures)
        now = time.monotonic()
        if self._lines and (now - self._last_line >= SECONDS_BETWEEN_LINES or self._done >= self._total):
            self._last_line = now
            began, first = self._start
            left = (now - began) / max(1, self._done - first) * (self._total - self._done)
            self._console.print(
                f"step {self._done}/{self._total} · {figures} · {_clock(left)} left", highlight=False, soft_wrap=True
            )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
