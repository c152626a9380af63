"""SIGTERM and SIGINT as requests: finish the step, save, end."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopFlag:
    """The first signal that asked the run to stop."""

    signal: int | None = None


@contextmanager
def stop_signals() -> Generator[StopFlag]:
    """Inside, SIGTERM and SIGINT ask for a checkpoint and a clean end; a second SIGINT ends at once."""
    flag = StopFlag()

    def ask(number: int, frame: FrameType | None) -> None:
        if flag.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.signal = number

    handled = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, ask) for number in handled}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
