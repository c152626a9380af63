"""SIGTERM, SIGINT and SIGUSR1 as requests: finish the step, save, end."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REPEAT_SECONDS = 3.0
"""One request may arrive twice: from a terminal or Slurm, which signal every process, and from torchrun, which passes
on what it got. Only what comes later than this is a second request."""


@dataclass
class StopFlag:
    """The first signal that asked the run to stop."""

    signal: int | None = None
    at: float = 0.0
    """When, by the monotonic clock."""


@contextmanager
def stop_signals() -> Generator[StopFlag]:
    """Inside, a signal asks for a checkpoint and a clean end; a second one, seconds later, ends at once."""
    flag = StopFlag()

    def ask(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if flag.signal is None:
            flag.signal, flag.at = number, now
        elif now - flag.at >= REPEAT_SECONDS:
            raise SystemExit(128 + number)

    before = {number: signal.signal(number, ask) for number in HANDLED}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def mark_interrupted(run_dir: Path, number: int | None, step: int) -> None:
    """Leave `INTERRUPTED` in the run folder when a signal ended the run early, else see that there is none.

    Launchers look for this file: torchrun turns every exit code into 0 or 1.
    """
    path = run_dir / "INTERRUPTED"
    if number is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(json.dumps({"signal": signal.Signals(number).name, "step": step}) + "\n", encoding="utf-8")


def exit_code(number: int | None) -> int:
    """128 + the signal; 0 under a torchrun that restarts, which would take any other code for a crash."""
    if number is None or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        return 0
    return 128 + number
