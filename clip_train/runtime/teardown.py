"""Leaving a process group."""

from __future__ import annotations

import time
from pathlib import Path

import torch.distributed as dist


def leave_group() -> None:
    """Destroy the process group, if there is one, and see that gloo's threads hold nothing any more.

    They outlive the group where anything still knows it, as defaults in torch.distributed.nn and DTensor's caches do.
    One that the machine did not let run since the last collective still holds its tensors, and aborts the process if
    it lets go of them while the interpreter ends ("terminate called without an active exception").
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        wait_for_gloo(seconds=10)


def wait_for_gloo(seconds: float) -> None:
    """Until gloo's threads were seen asleep twice, for once may be a wait for the interpreter's lock. Linux only:
    elsewhere there is nothing to see."""
    asleep, until = 0, time.monotonic() + seconds
    while asleep < 2 and time.monotonic() < until:
        time.sleep(0.001)  # without the lock
        asleep = 0 if _working() else asleep + 1


def _working() -> bool:
    for status in Path("/proc/self/task").glob("*/status"):
        try:
            told = status.read_text()
        except OSError:  # the thread has ended
            continue
        if told.startswith("Name:\tpt_gloo") and "\nState:\tS" not in told:
            return True
    return False
