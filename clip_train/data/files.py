"""Reading parts of shards: files are read at offsets, so that order costs nothing.

A local shard is opened once. One from elsewhere is opened, in the cache, for each read (15 us): what a process does
not read this moment may make room for what another one needs.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from functools import partial

from clip_train.data.index_files import ShardIndex
from clip_train.data.remote import Found
from clip_train.data.shards import verify
from clip_train.errors import DataError


class ShardFiles:
    """Open shards, the least recently used closed first. Safe in threads.

    Reads name their offset (`pread`), so forked workers may share descriptors: there is no position to fight
    over.
    """

    def __init__(self, most_open: int = 64) -> None:
        self.most_open = most_open
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, index: ShardIndex, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of a shard.

        Raises:
            DataError: the shard has gone, is no longer what was indexed, or cannot be fetched.
        """
        try:
            if index.cache is None:
                shard = self._shard(index)
                return _read(index, shard.descriptor, offset, size)
            found = Found(index.size, index.version)
            with index.cache.opened(index.shard, found, partial(verify, index)) as descriptor:
                return _read(index, descriptor, offset, size)
        except OSError as error:
            raise DataError(
                f"{index.shard}: cannot be read any more ({error.strerror}). Put it back and resume the run."
            ) from error

    def _shard(self, index: ShardIndex) -> _Open:
        with self._lock:
            if index.shard in self._open:
                self._open.move_to_end(index.shard)
                return self._open[index.shard]
            shard = _Open(index.shard)
            if os.fstat(shard.descriptor).st_size != index.size:
                raise DataError(f"{index.shard}: changed after it was indexed. Put the old file back, or start anew.")
            self._open[index.shard] = shard
            while len(self._open) > self.most_open:
                self._open.popitem(last=False)
            return shard

    def close(self) -> None:
        self._open.clear()


class _Open:
    """A descriptor that is closed when nobody uses it any more: another thread may still read what was put out."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _read(index: ShardIndex, descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # a read may be split by the file system
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise DataError(f"{index.shard}: became shorter while it was read. Stop what writes to it.")
        data += more
    return data
