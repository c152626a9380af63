"""The folder where shards from elsewhere lie while they are used: shared by all processes of a node.

A shard is fetched once, by whoever asks first, into `NAME.part` under an exclusive lock; checked; renamed to `NAME`.
Readers hold a shared lock while they read. Where the folder has a cap, or its disk is full, what was read longest ago
goes, unless somebody holds a lock on it. Locks are `flock`s on the files themselves: the kernel lifts them with their
process, so nothing is left behind by one that was killed but a `.part`, which the next one overwrites.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from clip_train.data.remote import base_name, fetch
from clip_train.data.transfer import PIPE, Found, Transfer
from clip_train.errors import DataError

_POLL = 0.05  # seconds
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PART = ".part"

Check = Callable[[Path], object]
"""Raises DataError where a file is not what it should be."""


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/clip-train/shards`, which is `~/.cache/clip-train/shards` for most."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if home.startswith("/") else Path.home() / ".cache") / "clip-train" / "shards"


def make_cache(folder: str | None, gib: float | None) -> Cache:
    """`data.cache_dir` and `data.cache_gib` of a recipe as a cache."""
    return Cache(
        folder=default_folder() if folder is None else Path(folder).expanduser().absolute(),
        max_bytes=None if gib is None else int(gib * 2**30),
    )


@dataclass(frozen=True)
class Cache:
    """Where shards from elsewhere are kept, and how they are fetched."""

    folder: Path = field(default_factory=default_folder)
    max_bytes: int | None = None
    """Most bytes of all shards in the folder; None is what the disk holds."""
    transfer: Transfer = field(default_factory=Transfer)
    commands: bool = False
    """Whether `pipe:` shards may be run: only for recipes that the user runs, never for one found in a checkpoint."""

    def check_allowed(self, shard: str) -> None:
        """Raises DataError for a command where none may be run."""
        if shard.startswith(PIPE) and not self.commands:
            raise DataError(f"{shard}: commands are run for the training data of a recipe only. Name a file or a URL.")

    def holds(self, shard: str, found: Found) -> bool:
        """Whether a shard need not be fetched now."""
        return self._path(shard, found).exists()

    @contextmanager
    def opened(self, shard: str, found: Found, check: Check) -> Generator[int]:
        """A descriptor of the whole shard, fetched if need be; the shard stays while it is open.

        Args:
            shard: a URL, or `pipe:` and a command.
            found: what the shard is known to be.
            check: looks at a file that was just fetched, before anybody reads it.

        Raises:
            DataError: it cannot be fetched, is not what was expected, or there is no room for it.
        """
        path = self._path(shard, found)
        try:
            descriptor = _open_shared(path, found.size)
            if descriptor is None:
                descriptor = self._fetch(shard, found, check, path)
        except OSError as error:
            raise self.unusable(error) from error
        try:
            yield descriptor
        finally:
            _close(descriptor)

    def _path(self, shard: str, found: Found) -> Path:
        self.check_allowed(shard)
        digest = hashlib.blake2b(f"{shard}\0{found.version}".encode("utf-8", "surrogateescape"), digest_size=10)
        name = re.sub(r"[^\w.-]+", "_", base_name(shard))[-100:]
        return self.folder / f"{digest.hexdigest()}-{name}"

    def _fetch(self, shard: str, found: Found, check: Check, path: Path) -> int:
        """Fetch a shard, or wait for the process that does; returns a descriptor with a shared lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + _PART)
        descriptor = self._lock(shard, part)
        try:
            finished = _open_shared(path, found.size)  # by another one, while this one waited
            if finished is not None:
                part.unlink(missing_ok=True)
                _close(descriptor)
                return finished
            os.ftruncate(descriptor, 0)
            sink = _Part(self, shard, descriptor)
            self._make_room(shard, descriptor, found.size or 0)
            fetch(shard, sink, found, self.transfer)
            os.ftruncate(descriptor, sink.done)
            if found.size is None:
                self._make_room(shard, descriptor, sink.done)
            check(part)
            os.fdatasync(descriptor)  # a name must never stand for bytes that a power cut can take
            part.rename(path)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            return descriptor
        except BaseException:
            with suppress(OSError):
                part.unlink()
            _close(descriptor)
            raise

    def _lock(self, shard: str, part: Path) -> int:
        """A descriptor of `part`, locked for this process alone."""
        seen, since = -1, time.monotonic()
        while True:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if _locked(descriptor, fcntl.LOCK_EX) and _is(descriptor, part):
                return descriptor
            modified = os.fstat(descriptor).st_mtime_ns
            os.close(descriptor)
            if modified != seen:
                seen, since = modified, time.monotonic()
            elif time.monotonic() - since > self.transfer.patience:
                raise DataError(
                    f"{shard}: another process has been fetching it without progress for {self.transfer.patience:.0f} "
                    f"s. End that process (`fuser {part}` names it), then resume the run."
                )
            time.sleep(_POLL)

    def _make_room(self, shard: str, descriptor: int, size: int) -> None:
        """Reserve `size` bytes for the file that is being written, under the cap."""
        until = time.monotonic() + self.transfer.patience
        cap = size if self.max_bytes is None else self.max_bytes
        while size > cap or not self._reserve(descriptor, size):
            if size > cap or time.monotonic() > until:
                reason = "all that is there is in use" if size <= cap else "that is more than the whole cache may hold"
                raise DataError(
                    f"{shard}: there is no room for its {size} bytes in {self.folder}: {reason}. "
                    f"Raise data.cache_gib (now {cap / 2**30:.3g})."
                )
            time.sleep(_POLL)  # readers are done in a moment, and what others fetch can go once it was read

    def _reserve(self, descriptor: int, size: int) -> bool:
        with self._alone():
            if self.max_bytes is not None:
                over = size - os.fstat(descriptor).st_size - self.max_bytes
                over += sum(stat.st_size for _, stat in self._entries())
                while over > 0:
                    if not (freed := self._remove_oldest()):
                        return False
                    over -= freed
            os.ftruncate(descriptor, max(size, os.fstat(descriptor).st_size))
            return True

    def _remove_oldest(self) -> int:
        """Remove what was used longest ago and is not in use now; returns its bytes, 0 where there is none."""
        for path, stat in sorted(self._entries(), key=lambda entry: entry[1].st_mtime_ns):
            with suppress(OSError):
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    if stat.st_size and _locked(descriptor, fcntl.LOCK_EX):
                        path.unlink()
                        return stat.st_size
                finally:
                    _close(descriptor)
        return 0

    def _entries(self) -> list[tuple[Path, os.stat_result]]:
        found: list[tuple[Path, os.stat_result]] = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if re.match(r"[0-9a-f]{20}-", entry.name):  # nothing that somebody else put here
                    with suppress(FileNotFoundError):
                        found.append((Path(entry.path), entry.stat()))
        return found

    @contextmanager
    def _alone(self) -> Generator[None]:
        """One process at a time counts and removes."""
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            _close(descriptor)

    def free_one(self) -> bool:
        """Make some room on a full disk, if anything can go."""
        with self._alone():
            return self._remove_oldest() > 0

    def unusable(self, error: OSError) -> DataError:
        """The error for a folder or a disk that cannot be used."""
        what = "is full, and nothing in it can go" if error.errno in _FULL else "cannot be used"
        return DataError(
            f"the cache {self.folder} {what} ({error.strerror or error}). "
            "Free some space, or set data.cache_dir to a folder on another disk."
        )


class _Part:
    """The file that is being written."""

    def __init__(self, cache: Cache, shard: str, descriptor: int) -> None:
        self.cache, self.shard, self.descriptor = cache, shard, descriptor
        self.done = 0

    def restart(self) -> None:
        self.done = 0

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                written = os.pwrite(self.descriptor, rest, self.done)
            except OSError as error:
                if error.errno in _FULL and self.cache.free_one():
                    continue
                raise self.cache.unusable(error) from error
            self.done, rest = self.done + written, rest[written:]


def _open_shared(path: Path, size: int | None) -> int | None:
    """A descriptor with a shared lock, or None where the file is not there or not of this size."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        stat = os.fstat(descriptor)
        if stat.st_nlink:
            break
        _close(descriptor)  # it was removed between opening and locking
    if size is not None and stat.st_size != size:
        _close(descriptor)
        return None
    if time.time() - stat.st_mtime > 1:
        with suppress(OSError):  # a folder that may only be read serves too
            os.utime(descriptor)
    return descriptor


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is(descriptor: int, path: Path) -> bool:
    """Whether an open file is (still) the one at this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _close(descriptor: int) -> None:
    """Unlock in so many words: a process forked meanwhile holds the descriptor too, and with it the lock."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
