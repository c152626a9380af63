"""One side of a comparison in a process of its own, so that its allocator, its caches and its memory are its alone."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from clip_train.bench.measure import Times
from clip_train.errors import UserError


class Worker:
    """A process that enters the context `build(*arguments)` and answers calls to methods of what that gives.

    Started with a fresh interpreter. `build` is a function of a module, its arguments can be pickled. An error in a
    call is raised here: a UserError as itself, any other with the traceback of the process.
    """

    def __init__(self, build: Callable[..., AbstractContextManager[Any]], *arguments: Any, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, device, build, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def ready(self) -> None:
        """Wait until it is built."""
        self._answer()

    def call(self, method: str, *arguments: Any) -> Any:
        """The method's result."""
        self._connection.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            error, result = self._connection.recv()
        except EOFError:
            self._process.join()
            raise UserError(
                f"a process of the benchmark ended with {self._process.exitcode}: most often for want of memory"
            ) from None
        if isinstance(error, UserError):
            raise error
        if error is not None:
            raise RuntimeError(error)
        return result

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(10)
        self._process.kill()


def _serve(
    connection: Connection, device: str, build: Callable[..., AbstractContextManager[Any]], arguments: tuple[Any, ...]
) -> None:
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        with build(*arguments) as side:
            connection.send((None, None))
            while True:
                method, values = connection.recv()
                connection.send((None, getattr(side, method)(*values)))
    except EOFError:  # nobody asks any more
        pass
    except UserError as error:
        connection.send((error, None))
    except Exception:
        connection.send((traceback.format_exc(), None))


def interleave_workers(workers: Mapping[str, Worker], *, rounds: int, warmup: int = 1) -> dict[str, Times]:
    """Let the workers' `run()`, which gives seconds, take turns: A B A B …"""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(warmup + rounds):
        for name, worker in workers.items():
            taken = worker.call("run")
            if number >= warmup:
                seconds[name].append(taken)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def finish(device: torch.device) -> float:
    """The clock, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def resident_bytes(what: str) -> int:
    """`VmRSS` (now) or `VmHWM` (at most) of this process; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:")), 0)


def peak_memory(device: torch.device, before: int) -> int:
    """Bytes: at most allocated on a GPU, or at most resident beyond `before` on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes("VmHWM") - before
