"""Reading parts of shards: files are read at offsets, so that order costs nothing.

A local shard is opened once, and looked at before each read (1 us): one that was replaced or written to meanwhile is
listed again, and where it lists differently the run stops. One from elsewhere is opened, in the cache, for each read
(15 us): what a process does not read this moment may make room for what another one needs.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from functools import partial
from pathlib import Path

from clip_train.data.index_files import ShardIndex
from clip_train.data.shards import verify
from clip_train.data.transfer import Found
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
            else:
                self._open[index.shard] = _Open(index)
                while len(self._open) > self.most_open:
                    self._open.popitem(last=False)
            shard = self._open[index.shard]
        try:
            shard.check(index)
        except DataError:
            self._open.pop(index.shard, None)  # it is opened anew when it is asked for again
            raise
        return shard

    def close(self) -> None:
        self._open.clear()


class _Open:
    """A descriptor that is closed when nobody uses it any more: another thread may still read what was put out."""

    def __init__(self, index: ShardIndex) -> None:
        self.descriptor = -1
        self.descriptor = os.open(index.shard, os.O_RDONLY | os.O_CLOEXEC)
        self.seen = (index.size, int(index.version)) if index.version else None
        """Size and time of change for which it is known to hold what was indexed."""

    def check(self, index: ShardIndex) -> None:
        """Stop where this is another file than the one that was indexed, or was written to."""
        stat = os.fstat(self.descriptor)
        now = (stat.st_size, stat.st_mtime_ns)
        if now == self.seen:
            return
        if stat.st_size != index.size:
            raise DataError(f"{index.shard}: changed after it was indexed. Put the old file back, or start anew.")
        if self.seen is not None:
            verify(index, Path(f"/dev/fd/{self.descriptor}"))
        self.seen = now

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
