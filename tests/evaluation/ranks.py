"""Ranks as threads that meet at a barrier, as processes do in an all-gather."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from clip_train.errors import UserError


def run_ranks(world: int, work: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
    """`work(rank, gather)` on every rank; results, or the user errors raised, in the order of ranks.

    A rank that never comes to a gather breaks the barrier, which fails the others instead of hanging the test.
    """
    barrier = threading.Barrier(world, timeout=60)
    box: list[Any] = [None] * world
    results: list[Any] = [None] * world

    def run(rank: int) -> None:
        def gather(part: Any) -> list[Any]:
            box[rank] = part
            barrier.wait()
            parts = list(box)
            barrier.wait()
            return parts

        try:
            results[rank] = work(rank, gather)
        except UserError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
