"""Shards: which files a recipe's patterns name, and what is in them.

A shard is a tar in webdataset's format: members whose path agrees up to the first dot of the file name are
one sample, the rest of the name is the member's extension (`000123.jpg`, `000123.txt`). `index` reads the
headers once; pictures are read later, each at its own offset. Where a shard lies is told by its name: a path, a URL,
or `pipe:` and a command.
"""

from __future__ import annotations

import glob
import hashlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache as cached
from pathlib import Path

import braceexpand
import numpy as np
from rich.console import Console
from rich.progress import track

from clip_train.data import remote
from clip_train.data.cache import Cache
from clip_train.data.index_files import ShardIndex, forget, keep, parse_index, recall
from clip_train.data.remote import INDEX_SUFFIX, PIPE, Found, base_name, is_remote
from clip_train.data.tar import members
from clip_train.errors import DataError

EMBEDDED = "embedded:"
_AT_ONCE = 8  # shards that are looked up at a time
_WORTH_KEEPING = 256  # samples; fewer are listed faster than a file is read


def resolve(patterns: str | list[str], relative_to: Path | None = None) -> list[str]:
    """Expand braces, globs, lists and `embedded:` to shards, in order.

    Args:
        patterns: paths with `{000..099}`, `*`, `?`, `[...]`; URLs with the same (a web server knows no `*`);
            `pipe:COMMAND`, whose output is the shard; `embedded:REL` names data shipped with the project.
        relative_to: where relative paths are looked for before the working directory.

    Raises:
        DataError: a pattern names nothing, a file is missing, or a shard is named twice.
    """
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for one in _expand_braces(pattern):
            found += _expand(one, pattern, relative_to)
    if not found:
        raise DataError("`shards` is empty: name at least one tar file")
    for shard, times in Counter(found).items():
        if times > 1:
            raise DataError(f"{shard}: named {times} times in `shards`; every sample would be seen that often")
    return found


def _expand_braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern, escape=not is_remote(pattern)))  # a command keeps its backslashes
    except ValueError as error:
        raise DataError(f"shards {pattern!r}: {error}; a range is written {{000..099}}") from error


def _expand(one: str, pattern: str, relative_to: Path | None) -> list[str]:
    one = one.removeprefix("file://")
    if is_remote(one):
        return remote.expand(one)
    if one.startswith(EMBEDDED):
        from clip_train import embedded  # not needed by, and not installed with, everybody's own data

        try:
            candidates = [embedded.path(one.removeprefix(EMBEDDED))]
        except OSError as error:  # no such data, or no room to unpack it
            raise DataError(f"shards {pattern!r}: {error}") from error
    elif Path(one).expanduser().is_absolute():
        candidates = [Path(one).expanduser()]
    else:
        candidates = [Path(relative_to, one)] if relative_to is not None else []
        candidates.append(Path(one))
    for candidate in candidates:
        if candidate.is_file():
            return [str(candidate)]
        matches = glob.glob(str(candidate), recursive=True)  # noqa: PTH207 (it takes absolute patterns)
        if files := sorted(match for match in matches if Path(match).is_file()):
            return files
    raise DataError(_no_match(one, pattern, candidates))


def _no_match(one: str, pattern: str, candidates: list[Path]) -> str:
    what = f"shards {pattern!r}: {one!r} names no file." if one != pattern else f"shards {pattern!r} names no file."
    for candidate in candidates:
        folder = candidate if candidate.is_dir() else candidate.parent
        while not folder.is_dir() and folder != folder.parent:
            folder = folder.parent
        names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
        tars = [name for name in names if name.endswith(".tar")] or names
        shown = ", ".join(tars[:6]) + (f", … ({len(tars)} in all)" if len(tars) > 6 else "")
        what += f" {folder.resolve()} holds {shown or 'nothing'}."
    return what


def local_file(shard: str) -> Path:
    """The path of a local shard, for what works on files.

    Raises:
        DataError: it lies elsewhere.
    """
    if is_remote(shard):
        raise DataError(f"{shard}: a local file is wanted here. Copy it to a disk first.")
    return Path(shard)


def index(shard: str, cache: Cache | None = None) -> ShardIndex:
    """List a shard's samples.

    The listing of an unchanged shard is remembered in memory and in the cache's folder. Else, an index file beside
    the shard is read (`write_index` makes it); else the headers of the shard, for which one that lies elsewhere is
    fetched.

    Args:
        shard: one of those that `resolve` gave.
        cache: where shards from elsewhere are kept; by default `Cache()`.

    Raises:
        DataError: the shard is missing, cannot be fetched or read, is no tar, cut short, empty, holds a member twice,
            or holds a name that escapes its folder.
    """
    cache = Cache() if cache is None else cache
    if is_remote(shard):
        return _index_remote(shard, cache)
    try:
        stat = Path(shard).stat()
        return _index_local(shard, stat.st_size, stat.st_mtime_ns, cache)
    except OSError as error:
        raise DataError(f"{shard}: cannot be read: {error.strerror or error}") from error


def index_all(shards: Sequence[str], cache: Cache | None = None, show: bool = False) -> list[ShardIndex]:
    """`index` of each; those that lie elsewhere are asked for side by side.

    Args:
        show: draw a progress bar on a terminal.

    Raises:
        DataError: as `index`, for the first that fails.
    """
    pool = ThreadPoolExecutor(_AT_ONCE if any(map(is_remote, shards)) else 1)
    try:
        indexes = pool.map(lambda shard: index(shard, cache), shards)
        silent = not show or not sys.stderr.isatty()
        title, console = "listing shards", Console(stderr=True)
        return list(track(indexes, title, len(shards), console=console, transient=True, disable=silent))
    finally:
        pool.shutdown(cancel_futures=True)


def verify(index: ShardIndex, path: Path) -> None:
    """Stop where a file that was just fetched is not what its index lists.

    Raises:
        DataError: it is not, or is damaged.
    """
    if not index.same_listing(_list(index.shard, path)):
        if index.cache is not None:
            forget(index.shard, index.cache)
        raise DataError(
            f"{index.shard}: does not hold what its index lists. If there is a file "
            f"{base_name(index.shard)}{INDEX_SUFFIX} beside it, write that again; else the shard changed: put the old "
            "one back, or start anew."
        )


@cached
def _index_local(shard: str, size: int, modified: int, cache: Cache) -> ShardIndex:
    path = Path(shard)
    place, version = str(path.absolute()), str(modified)
    found = recall(place, Found(size, version), cache)
    if found is None:
        found = _beside_local(path, size, modified) or _list(shard, path)
        if len(found) >= _WORTH_KEEPING:
            keep(replace(found, shard=place, version=version), cache)
    return replace(found, shard=shard, version="")


def _beside_local(path: Path, size: int, modified: int) -> ShardIndex | None:
    beside = Path(f"{path}{INDEX_SUFFIX}")
    try:
        if beside.stat().st_mtime_ns >= modified:  # an older one was written for another file
            return _of_size(parse_index(beside.read_bytes(), str(path)), size)
    except OSError:
        pass
    except DataError as error:
        warnings.warn(f"{error} The shard itself is listed instead.", stacklevel=2)
    return None


def _index_remote(shard: str, cache: Cache) -> ShardIndex:
    if shard.startswith(PIPE):
        cache.check_allowed(shard)
    found = remote.look_up(shard, cache.transfer)
    kept = recall(shard, found, cache)
    if kept is None:
        kept = _beside_remote(shard, found, cache) or _fetch_and_list(shard, found, cache)
        kept = replace(kept, version=found.version)
        keep(kept, cache)
    return replace(kept, cache=cache)


def _beside_remote(shard: str, found: Found, cache: Cache) -> ShardIndex | None:
    data = remote.read_beside(shard, INDEX_SUFFIX, cache.transfer)
    if data is not None and found.size is not None:
        try:
            return _of_size(parse_index(data, shard), found.size)
        except DataError as error:
            warnings.warn(f"{error} The shard is fetched and listed instead.", stacklevel=2)
    return None


def _of_size(index: ShardIndex, size: int) -> ShardIndex:
    if index.size != size:
        raise DataError(
            f"{index.shard}{INDEX_SUFFIX}: was written for {index.size} bytes, the shard has {size}. Write it again."
        )
    return index


def _fetch_and_list(shard: str, found: Found, cache: Cache) -> ShardIndex:
    with cache.opened(shard, found, lambda path: _list(shard, path)) as descriptor:
        return _list(shard, Path(f"/dev/fd/{descriptor}"))


def _list(shard: str, path: Path) -> ShardIndex:
    """One pass over the headers of a file, in messages called by the shard's name."""
    try:
        return _list_members(shard, path)
    except DataError as error:
        raise DataError(str(error).replace(str(path), shard)) from error


def _list_members(shard: str, path: Path) -> ShardIndex:
    extensions: dict[str, int] = {}
    samples: dict[str, int] = {}
    seen: dict[tuple[int, int], tuple[int, int]] = {}
    without_extension = 0
    for name, offset, length in members(path):
        if name.startswith("/") or ".." in name.split("/"):
            raise DataError(
                f"{shard}: member {name!r} names a place outside of the archive. Pack the shard again with plain names."
            )
        folder, slash, file = name.removeprefix("./").rpartition("/")
        stem, dot, extension = file.partition(".")
        if not stem or not dot or not extension:  # as webdataset: `.DS_Store` and `README` are no samples
            without_extension += 1
            continue
        row = samples.setdefault(folder + slash + stem, len(samples))
        place = (row, extensions.setdefault(extension.lower(), len(extensions)))
        if place in seen:
            raise DataError(
                f"{shard}: member {name!r} occurs twice, so it is unclear which one belongs to the sample. "
                "Pack the shard again with a key of its own for each sample."
            )
        seen[place] = (offset, length)
    if not samples:
        reason = f"its {without_extension} members have no KEY.EXTENSION names" if without_extension else "no members"
        raise DataError(f"{shard}: holds no samples ({reason}). Remove it from `shards` or write it again.")
    table = np.full((2, len(samples), len(extensions)), -1, dtype=np.int64)
    places = np.array(list(seen), dtype=np.int64)
    table[:, places[:, 0], places[:, 1]] = np.array(list(seen.values()), dtype=np.int64).T
    keys = np.array([key.encode("utf-8", "surrogateescape") for key in samples])
    return ShardIndex(shard, path.stat().st_size, tuple(extensions), keys, table[0], table[1])


def data_fingerprint(indexes: Iterable[ShardIndex]) -> str:
    """A hash of what is trained on, in order: names of shards (not their folders), keys, and sizes of
    members.
    """
    digest = hashlib.blake2b(digest_size=16)
    for one in indexes:
        digest.update(f"{base_name(one.shard)}\0{len(one)}\0{one.size}\0{' '.join(one.extensions)}\0".encode())
        for array in (one.key_bytes, one.offsets, one.sizes):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
