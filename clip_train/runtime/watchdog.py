"""Notices that processes stand still, says which one the others wait for, and ends this one, so that nothing hangs.

Each process has a thread that tells the others, through the key-value store of the process group, what its main thread
is doing (`clip_train.heartbeat`), and counts as it does so. A process whose count stands still is stopped or gone; one
whose count goes on while its step does not is stuck, in the phase that it tells.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from clip_train import heartbeat
from clip_train.errors import LostError
from clip_train.runtime import collectives
from clip_train.runtime.process import Process

STALLED = 75
"""Exit code, sysexits' EX_TEMPFAIL: try again."""
PHASES = ("set up", "data", "agree", "update", "log", "save", "evaluate")
"""In the order of a step. Whoever is in an earlier one keeps the others waiting."""
PATIENCE = {"set up": float("inf"), "evaluate": 4.0}
"""Times the limit: listing shards takes what it takes, and an evaluation has long stretches without a sign."""


@dataclass(frozen=True)
class Report:
    """What a process tells the others."""

    rank: int
    host: str
    pid: int
    phase: str
    step: int
    idle: float
    """Seconds without progress."""
    count: int

    def __str__(self) -> str:
        doing = f"'{self.phase}' of step {self.step}" if self.phase != "set up" else "'set up'"
        return f"rank {self.rank} on {self.host} (pid {self.pid}), in {doing} for {self.idle:.0f} s"


class Watchdog:
    """The thread, and what it knows of the others.

    Args:
        limit: seconds without progress after which the process ends itself.
    """

    def __init__(self, process: Process, limit: float) -> None:
        self.rank, self.world, self.limit = process.rank, process.world, limit
        self.interval = min(max(limit / 20, 0.1), 1.0)
        self.idle, self._count = 0.0, 0
        self._store = connect() if process.world > 1 else None
        self._ended = threading.Event()
        self.publish()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join(10)

    def publish(self) -> None:
        """Tell the others; a store that does not answer is theirs to notice."""
        sign, self._count = heartbeat.NOW, self._count + 1
        report = Report(self.rank, socket.gethostname(), os.getpid(), sign.phase, sign.step, self.idle, self._count)
        self._mine = report
        if self._store is not None:
            try:
                self._store.set(f"rank_{self.rank}", json.dumps(asdict(report)))
            except RuntimeError:
                return

    def reports(self) -> list[Report]:
        """Of all processes. Raises RuntimeError where the store does not answer."""
        if self._store is None:
            return [self._mine]
        values = self._store.multi_get([f"rank_{rank}" for rank in range(self.world)])
        return [Report(**json.loads(value)) for value in values]

    def blame(self) -> str:
        """Look twice at the others and say whom they wait for, or who is gone. Takes a few intervals."""
        try:
            before = self.reports()
            for _ in range(3):
                time.sleep(self.interval)
                self.publish()
            after = self.reports()
        except RuntimeError:
            return (
                "the key-value store does not answer: rank 0, or the torchrun agent that holds it, is stopped or gone"
            )
        silent = [new for old, new in zip(before, after, strict=True) if old.count == new.count]
        if silent:
            return f"{listed(silent)}: stopped, killed or cut off, for there is no sign of life from it"
        return f"the others wait for {listed(behind(after))}" if self.world > 1 else listed(after)

    def _watch(self) -> None:
        seen, before = -1, time.monotonic()
        while not self._ended.wait(self.interval):
            now = time.monotonic()
            # This thread itself may have been stopped (Ctrl-Z, a frozen container): that time is not a stall.
            step, before = min(now - before, 2 * self.interval), now
            beats = heartbeat.NOW.beats
            self.idle = 0.0 if beats != seen else self.idle + step
            seen = beats
            self.publish()
            if self.idle >= self.limit * PATIENCE.get(heartbeat.NOW.phase, 1.0):
                self._end()

    def _end(self) -> None:
        blame = self.blame()
        if self._ended.is_set():
            return
        print(
            f"error (rank {self.rank}): no progress for {self.idle:.0f} s (faults.stall_minutes = "
            f"{self.limit / 60:g}). {blame}. Ending with code {STALLED}; run again to go on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        if f"rank {self.rank} on" in blame:  # this one: where it hangs
            faulthandler.dump_traceback(file=sys.stderr)
        for worker in multiprocessing.active_children():  # a loader's, which may be what hangs
            worker.kill()
        os._exit(STALLED)


def behind(reports: Sequence[Report]) -> list[Report]:
    """Those in the earliest phase of the earliest step."""
    places = [(report.step, PHASES.index(report.phase)) for report in reports]
    return [report for report, place in zip(reports, places, strict=True) if place == min(places)]


def listed(reports: Sequence[Report]) -> str:
    """A few of them, in words."""
    more = f" and {len(reports) - 4} more" if len(reports) > 4 else ""
    return "; ".join(map(str, reports[:4])) + more


def connect() -> Store:
    """A connection of its own to the group's store: the group's may be in use by a call that waits."""
    name = str(collectives.gather_objects(uuid.uuid4().hex)[0])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return PrefixStore(f"watchdog_{name}", TCPStore(address, port, is_master=False, timeout=timedelta(seconds=20)))


@contextmanager
def watchdog(process: Process, stall_minutes: float) -> Generator[Watchdog]:
    """Inside, a stall of this process or of those it waits for ends it with code 75 and a message that names them.

    Raises LostError where a collective broke because another process is gone.
    """
    dog = Watchdog(process, 60 * stall_minutes)
    try:
        process.barrier()  # all have published
        yield dog
    except RuntimeError as error:
        if not is_broken_collective(error):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, who saw it too: first say who it was
        raise LostError(
            f"step {heartbeat.NOW.step}: {dog.blame()}. Its own message, if there is one, stands above; one killed "
            f"without any was most often out of memory (dmesg). ({str(error).splitlines()[0][:200]})"
        ) from error
    finally:
        dog.close()


def is_broken_collective(error: RuntimeError) -> bool:
    """gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
