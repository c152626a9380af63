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
from clip_train.data.listing import DamagedShardError, list_samples
from clip_train.data.remote import INDEX_SUFFIX, base_name, is_remote
from clip_train.data.transfer import PIPE, Found
from clip_train.data.waiting import side_by_side
from clip_train.errors import DataError

EMBEDDED = "embedded:"
AT_ONCE = 8  # shards that are looked up at a time
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
    else:
        candidates = _local_candidates(one, pattern, relative_to)
    for candidate in candidates:
        try:
            if candidate.is_file():
                return [str(candidate)]
            matches = glob.glob(str(candidate), recursive=True)  # noqa: PTH207 (it takes absolute patterns)
            if files := sorted(match for match in matches if _is_shard(Path(match), pattern)):
                return files
        except OSError as error:  # a folder that may not be entered, a name that is too long
            raise DataError(f"shards {pattern!r}: {candidate} cannot be read: {error.strerror}") from error
    raise DataError(_no_match(one, pattern, candidates))


def _local_candidates(one: str, pattern: str, relative_to: Path | None) -> list[Path]:
    try:
        path = Path(one).expanduser()
    except RuntimeError as error:  # ~nobody
        raise DataError(f"shards {pattern!r}: {error}") from error
    return [path] if path.is_absolute() or relative_to is None else [Path(relative_to, path), path]


def _is_shard(match: Path, pattern: str) -> bool:
    """Whether a match is a file; folders on the way of `**` are passed over, but nothing that was meant as a shard."""
    if match.is_file():
        return True
    if match.is_symlink() and not match.exists():
        raise DataError(f"shards {pattern!r}: {match} is a link to {match.readlink()}, where there is no file")
    if match.suffix == ".tar" or not match.is_dir():
        what = "a folder" if match.is_dir() else "a pipe or a device"
        raise DataError(f"shards {pattern!r}: {match} is {what}, not a tar file. Leave it out of the pattern.")
    return False


def _no_match(one: str, pattern: str, candidates: list[Path]) -> str:
    what = f"shards {pattern!r}: {one!r} names no file." if one != pattern else f"shards {pattern!r} names no file."
    for candidate in candidates:
        folder = candidate if candidate.is_dir() else candidate.parent
        while not folder.is_dir() and folder != folder.parent:
            folder = folder.parent
        try:
            names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
        except OSError as error:
            what += f" {folder.resolve()} cannot be read ({error.strerror})."
            continue
        tars = [name for name in names if name.endswith(".tar")] or names
        shown = ", ".join(tars[:6]) + (f", … ({len(tars)} in all)" if len(tars) > 6 else "")
        what += f" {folder.resolve()} holds {shown or 'nothing'}."
    return what


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
    indexes = side_by_side(lambda shard: index(shard, cache), shards, AT_ONCE if any(map(is_remote, shards)) else 0)
    silent = not show or not sys.stderr.isatty()
    title, console = "listing shards", Console(stderr=True)
    return list(track(indexes, title, len(shards), console=console, transient=True, disable=silent))


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
    return replace(found, shard=shard, version=version)


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
    found = list_samples(shard, path)
    if found.samples is None:
        reason = f"its {len(found.strays)} members have no KEY.EXTENSION names" if found.strays else "no members"
        raise DamagedShardError(f"{shard}: holds no samples ({reason}). Remove it from `shards` or write it again.")
    return found.samples


def data_fingerprint(indexes: Iterable[ShardIndex]) -> str:
    """A hash of what is trained on, in order: names of shards (not their folders), keys, and sizes of
    members.
    """
    digest = hashlib.blake2b(digest_size=16)
    for one in indexes:
        head = f"{base_name(one.shard)}\0{len(one)}\0{one.size}\0{' '.join(one.extensions)}\0"
        digest.update(head.encode("utf-8", "surrogateescape"))
        for array in (one.key_bytes, one.offsets, one.sizes):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
