"""What a person sees while a run goes on: a live bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0
WAITS = 0.2
"""Share of an interval spent waiting for data from which on a person is told what to do."""
SECONDS_BETWEEN_NOTES = 600.0


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
        self._shown = 0
        self._last_note = -SECONDS_BETWEEN_NOTES
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
        told = f" · accuracy {100 * line['accuracy']:.1f}%" if "accuracy" in line else ""
        scale = f" · scale {line['logit_scale']:.1f}" if "logit_scale" in line else ""
        figures = (
            f"loss [bold]{line['loss']:.3f}[/]{scale}{told} · "
            f"{line['samples_per_second']:,.0f} samples/s · {line['tokens_per_second']:,.0f} tokens/s · "
            f"MFU {100 * line['mfu']:.0f}% · grad {line['grad_norm']:.2f} · wait {100 * line['data_wait']:.0f}%"
        )
        self._bar.update(self._task, figures=figures)
        now = time.monotonic()
        self._note_waiting(line["data_wait"], now)
        if self._lines and (now - self._last_line >= SECONDS_BETWEEN_LINES or self._done >= self._total):
            self._last_line = now
            began, first = self._start
            left = (now - began) / max(1, self._done - first) * (self._total - self._done)
            self._console.print(
                f"step {self._done}/{self._total} · {figures} · {_clock(left)} left", highlight=False, soft_wrap=True
            )

    def _note_waiting(self, share: float, now: float) -> None:
        """Say that the input side is too slow, every ten minutes at most, and not of the first interval, in which
        the workers start.
        """
        self._shown += 1
        enabled = self._live or self._lines
        if enabled and share > WAITS and self._shown > 1 and now - self._last_note >= SECONDS_BETWEEN_NOTES:
            self._last_note = now
            self._console.print(
                f"[yellow]the model waited for data {100 * share:.0f} % of the last interval[/]: raise data.workers or "
                "data.threads while cores are free; data.scaled_decode = true for pictures of twice the view's size; "
                "data.cache_decoded = true for small sets; lighter data.augment (docs/data-and-resume.md, Rates)",
                highlight=False,
                soft_wrap=True,
            )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
