"""Waiting without hanging: work in threads that an interrupted process need not wait for, and a word to a person who
would else wonder.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_NOTICE = 60.0  # seconds


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> Iterator[Result]:
    """`function` of each item, in order, worked out by `threads` threads; 0 works here.

    Unlike those of an executor the threads end with the process: Ctrl-C does not wait for a server that hangs.
    """
    if threads == 0:
        yield from map(function, items)
        return
    todo: queue.SimpleQueue[tuple[Future[Result], Item]] = queue.SimpleQueue()
    futures = [Future[Result]() for _ in items]

    def work() -> None:
        with suppress(queue.Empty):
            while True:
                future, item = todo.get_nowait()
                try:
                    future.set_result(function(item))
                except BaseException as error:
                    future.set_exception(error)

    for entry in zip(futures, items, strict=True):
        todo.put(entry)
    for _ in range(min(threads, len(items))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for future in futures:
            yield future.result()
    finally:
        with suppress(queue.Empty):
            while True:
                todo.get_nowait()


class SlowNotice:
    """Says on standard error what is waited for, after a minute and each time the wait has doubled."""

    def __init__(self, after: float = _NOTICE) -> None:
        self.after = after
        self._wait: tuple[str, float] | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def waiting_for(self, what: str) -> Generator[None]:
        """Inside, `what` is waited for."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        self._wait = (what, time.monotonic())
        try:
            yield
        finally:
            self._wait = None

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        told: tuple[tuple[str, float] | None, float] = (None, 0.0)
        while not self._closed.wait(self.after / 20):
            wait = self._wait
            if wait is None:
                continue
            waited = time.monotonic() - wait[1]
            due = 2 * told[1] if told[0] == wait else self.after
            if waited >= due:
                told = (wait, waited)
                print(f"still waiting for {wait[0]} after {waited:.0f} s", file=sys.stderr, flush=True)
