"""Fetching shards ahead of time, in threads beside the one that decodes."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterable, Sequence
from math import ceil

from clip_train.data.files import ShardFiles
from clip_train.data.index_files import ShardIndex
from clip_train.errors import DataError

_THREADS = 4


class Prefetcher:
    """Brings shards into the cache before they are read. Only a matter of time: what fails here is met again, and
    told, where the shard is read.
    """

    def __init__(self) -> None:
        self._process = 0
        self._queue: queue.SimpleQueue[ShardIndex] = queue.SimpleQueue()
        self._wanted: set[str] = set()

    def want(self, indexes: Iterable[ShardIndex]) -> None:
        """Have these shards soon."""
        missing = [one for one in indexes if not one.at_hand()]
        if missing and self._process != os.getpid():  # the threads of a parent did not come along
            self._process, self._queue, self._wanted = os.getpid(), queue.SimpleQueue(), set()
            for _ in range(_THREADS):
                threading.Thread(target=_work, args=(self._queue, self._wanted), daemon=True).start()
        for one in missing:
            if one.shard not in self._wanted:
                self._wanted.add(one.shard)
                self._queue.put(one)


def check_room(indexes: Sequence[ShardIndex], lanes: int, window: int, everywhere: bool = False) -> None:
    """Stop where the cache cannot hold the shards of a source that are read at the same time: each would be fetched
    again and again.

    Args:
        everywhere: any shard may be read at any time (sampling with replacement).

    Raises:
        DataError: with the room that is needed.
    """
    cache = next((one.cache for one in indexes if one.cache is not None), None)
    if cache is None or cache.max_bytes is None:
        return
    lanes = min(lanes, len(indexes))
    spanned = ceil(window * len(indexes) / sum(map(len, indexes))) + 1  # shards that a lane's window lies in
    shards = min(len(indexes), lanes * min(spanned, ceil(len(indexes) / lanes)))
    if everywhere:
        shards = len(indexes)
    needed = shards * max(one.size for one in indexes)
    if needed > cache.max_bytes:
        raise DataError(
            f"data.cache_gib = {cache.max_bytes / 2**30:.3g} does not hold the {shards} shards that are read at the "
            + (
                f"same time (data.sampling = 'replacement'): raise it to {needed / 2**30:.3g}, or sample by epochs."
                if everywhere
                else f"same time ({lanes} lanes, windows of {window} samples): raise it to {needed / 2**30:.3g}, or "
                "lower data.lanes or data.shuffle_window."
            )
        )


def _work(todo: queue.SimpleQueue[ShardIndex], wanted: set[str]) -> None:
    files = ShardFiles()
    while True:
        one = todo.get()
        try:
            files.read(one, 0, 0)
        except DataError:
            pass
        finally:
            wanted.discard(one.shard)
