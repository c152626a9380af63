"""Start torchrun in the background, find its workers, wait for a step, and leave nothing behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from conftest import descendants, kill_all

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def started(
    command: Sequence[str], log: Path, env: Mapping[str, str] | None = None
) -> Generator[subprocess.Popen[bytes]]:
    """A process in a session of its own, its output in `log`; it and all its descendants are gone afterwards."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **(env or {})}
        )
    try:
        yield process
    finally:
        kill_all(process.pid)
        process.wait(30)


def worker(agent: int, rank: int) -> int:
    """The process of a rank under a torchrun agent."""
    for pid in descendants(agent):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in environment:
            return pid
    raise AssertionError(f"rank {rank} is not a process of {agent}")


def wait_until(done: Callable[[], bool], what: str, log: Path, seconds: float = 240) -> None:
    """Poll; AssertionError with the log's end when it takes too long."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen in {seconds} s: {log.read_text()[-6000:]}")
        time.sleep(0.02)


def has_step(run_dir: Path, step: int) -> Callable[[], bool]:
    """Whether metrics have come to a step."""
    path = run_dir / "metrics.jsonl"
    return lambda: path.exists() and f'"step": {step},' in path.read_text()


def listens(port: int) -> Callable[[], bool]:
    """Whether somebody listens on a port of this machine."""

    def connects() -> bool:
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", port)) == 0

    return connects
