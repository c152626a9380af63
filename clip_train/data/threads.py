"""A map over threads, in order; in a forked process its threads are made anew."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Result = TypeVar("Result")
_PIECES = 4
"""Parts of the work for each thread: few cost less to hand out, many end at the same time."""


class Threads:
    """Decoders and resizers release the interpreter's lock, so that threads share the work of one process.

    Args:
        count: threads; 1 works in the caller's.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0

    def map(self, function: Callable[[Given], Result], items: Sequence[Given]) -> list[Result]:
        """`[function(item) for item in items]`. Of several errors, the one of the earliest item is raised."""
        if self.count == 1 or len(items) < 2:
            return [function(item) for item in items]
        if self._pool is None or self._process != os.getpid():  # the threads of a parent did not come along
            self._process = os.getpid()
            self._pool = ThreadPoolExecutor(self.count, "decode")
        size = -(-len(items) // (_PIECES * self.count))
        pieces = [items[start : start + size] for start in range(0, len(items), size)]

        def work(piece: Sequence[Given]) -> list[Result]:
            return [function(item) for item in piece]

        return [result for part in self._pool.map(work, pieces) for result in part]
