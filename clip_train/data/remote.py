"""Shards that lie elsewhere: http(s), any fsspec URL (s3, gs, …), or what a shell command writes.

Three questions are put to the other side: `look_up` (how long is it, which version), `fetch` (all its bytes) and
`read_beside` (a small file). Each is retried while the trouble may pass, and is an error after a bounded time.
What is fetched lands in the cache (`cache.py`), checked against what was looked up.

Source: RFC 9110, sections 13.1.5 (If-Range) and 14 (ranges), for going on with a broken transfer.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from clip_train.data import remote_http, remote_pipe
from clip_train.data.transfer import PIPE, Absent, Found, Sink, Temporary, Transfer
from clip_train.errors import DataError

T = TypeVar("T")
INDEX_SUFFIX = ".index.json"
_ENOUGH = 1 << 20  # bytes gained, after which failures are counted anew


def is_remote(shard: str) -> bool:
    """Whether a shard is a URL or a command, and no path."""
    return shard.startswith(PIPE) or re.match(r"[A-Za-z][\w+.:-]*://", shard) is not None


def base_name(shard: str) -> str:
    """The file name of a shard, wherever it lies: without folders, query, or the command around it."""
    if shard.startswith(PIPE):
        tars = re.findall(r"[^\s/'\"=]+\.tar\b", shard)
        return tars[0] if tars else shard.removeprefix(PIPE).strip()
    if is_remote(shard):
        path = urlsplit(shard).path if _is_http(shard) else shard
        return unquote(path.rstrip("/").rpartition("/")[2])
    return shard.rpartition("/")[2]


def look_up(shard: str, transfer: Transfer) -> Found:
    """Size and version of a shard, without its bytes.

    Raises:
        DataError: it is not there, may not be read, or nobody answers.
    """
    if shard.startswith(PIPE):
        return Found(None, "")
    try:
        return _patiently(shard, transfer, lambda: _side(shard).look_up(shard, transfer))
    except Absent as error:
        raise DataError(f"{shard}: {error}. Check what `shards` names.") from error


def fetch(shard: str, sink: Sink, expected: Found, transfer: Transfer) -> None:
    """All bytes of a shard into a sink. A broken transfer goes on where it broke, if the other side can do so and
    the shard is provably the same.

    Raises:
        DataError: as `look_up`; or the shard is not, or during the transfer no longer, what was expected.
    """
    try:
        _patiently(shard, transfer, lambda: _side(shard).fetch(shard, sink, expected, transfer), lambda: sink.done)
    except Absent as error:
        raise DataError(f"{shard}: {error}. Put it back and resume the run.") from error


def read_beside(shard: str, suffix: str, transfer: Transfer) -> bytes | None:
    """A small file that lies beside a shard, or None where there is none.

    Raises:
        DataError: nobody answers.
    """
    if shard.startswith(PIPE):
        return None
    path, mark, query = shard.partition("?") if _is_http(shard) else (shard, "", "")
    try:
        return _patiently(shard, transfer, lambda: _side(shard).read(path + suffix + mark + query, transfer))
    except Absent:  # a store may answer "forbidden" for what does not exist
        return None


def expand(pattern: str) -> list[str]:
    """The shards that a URL with `*`, `?` or `[…]` names, sorted; any other URL is itself.

    Raises:
        DataError: nothing matches, or the place cannot be listed.
    """
    if pattern.startswith(PIPE) or not set("*?[") & set(pattern):
        return [pattern]
    if _is_http(pattern):  # here ? and [ mean something else
        if "*" in urlsplit(pattern).path:
            raise DataError(f"shards {pattern!r}: a web server cannot be searched. Write numbers as {{000..099}}.")
        return [pattern]
    from clip_train.data import remote_fsspec  # fsspec, which most never need, takes a while to import

    try:
        found = _patiently(pattern, Transfer(), lambda: remote_fsspec.glob(pattern, Transfer()))
    except Absent as error:
        raise DataError(f"shards {pattern!r}: {error}") from error
    if not found:
        raise DataError(f"shards {pattern!r} names no file")
    return found


class _Side(Protocol):
    """How one kind of place is asked. `Temporary` and `Absent` may be raised, or a final `DataError`."""

    def look_up(self, shard: str, transfer: Transfer) -> Found: ...

    def fetch(self, shard: str, sink: Sink, expected: Found, transfer: Transfer) -> None: ...

    def read(self, shard: str, transfer: Transfer) -> bytes: ...


def _is_http(shard: str) -> bool:
    return shard.lower().startswith(("http://", "https://"))


def _side(shard: str) -> _Side:
    if shard.startswith(PIPE):
        return remote_pipe
    if _is_http(shard):
        return remote_http
    from clip_train.data import remote_fsspec

    return remote_fsspec


def _patiently(shard: str, transfer: Transfer, attempt: Callable[[], T], progress: Callable[[], int] = int) -> T:
    """Try until it works, or `attempts` failures have come in a row without a MiB between them."""
    failures, gained = 0, 0
    while True:
        try:
            return attempt()
        except Temporary as error:
            if progress() >= gained + _ENOUGH:
                failures, gained = 0, progress()
            failures += 1
            if failures >= transfer.attempts:
                raise DataError(
                    f"{shard}: could not be fetched, {failures} attempts failed. The last: {error}. "
                    "Resume the run when it can be reached again."
                ) from error
        time.sleep(transfer.pause(failures, shard))
