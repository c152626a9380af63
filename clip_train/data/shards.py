"""Shards: which files a recipe's patterns name, and what is in them.

A shard is a tar in webdataset's format: members whose path agrees up to the first dot of the file name are
one sample, the rest of the name is the member's extension (`000123.jpg`, `000123.txt`). `index` reads the
headers once; pictures are read later, each at its own offset.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import braceexpand
import numpy as np
from numpy.typing import NDArray

from clip_train.data.tar import members
from clip_train.errors import DataError

EMBEDDED = "embedded:"


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What a shard holds: n samples with members of e kinds.

    Arrays, not dicts: they are shared by forked workers without being copied, and stay small.
    """

    shard: str
    """The shard as the recipe names it, resolved."""
    size: int
    """Bytes of the tar."""
    extensions: tuple[str, ...]
    """The kinds of members, e of them."""
    key_bytes: NDArray[np.bytes_]
    """(n,) UTF-8 keys."""
    offsets: NDArray[np.int64]
    """(n, e) where each member's bytes begin, -1 where the sample has none."""
    sizes: NDArray[np.int64]
    """(n, e) their number."""

    def __len__(self) -> int:
        return len(self.key_bytes)

    def key(self, sample: int) -> str:
        return bytes(self.key_bytes[sample]).decode("utf-8", "surrogateescape")

    def member(self, sample: int, extension: str) -> tuple[int, int] | None:
        """Offset and size of a sample's member, or None where it has none."""
        if extension not in self.extensions:
            return None
        column = self.extensions.index(extension)
        offset = int(self.offsets[sample, column])
        return None if offset < 0 else (offset, int(self.sizes[sample, column]))

    def contents(self) -> str:
        """`jpg ×998, json ×1000`: for messages."""
        counts = (self.offsets >= 0).sum(axis=0)
        return ", ".join(f"{name} ×{count}" for name, count in zip(self.extensions, counts, strict=True))


def local_file(shard: str) -> Path:
    """The file that a shard's bytes are read from: the place where shards from elsewhere will be fetched."""
    if shard.startswith("pipe:") or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", shard):
        raise DataError(f"{shard}: only local shards can be read. Copy them to a disk and name that path in `shards`.")
    return Path(shard)


def resolve(patterns: str | list[str], relative_to: Path | None = None) -> list[str]:
    """Expand braces, globs, lists and `embedded:` to shards, in order.

    Args:
        patterns: paths with `{000..099}`, `*`, `?`, `[...]`; `embedded:REL` names data shipped with the
            project.
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
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"shards {pattern!r}: {error}; a range is written {{000..099}}") from error


def _expand(one: str, pattern: str, relative_to: Path | None) -> list[str]:
    if one.startswith(EMBEDDED):
        from clip_train import embedded  # not needed by, and not installed with, everybody's own data

        try:
            candidates = [embedded.path(one.removeprefix(EMBEDDED))]
        except OSError as error:  # no such data, or no room to unpack it
            raise DataError(f"shards {pattern!r}: {error}") from error
    elif Path(one).expanduser().is_absolute():
        candidates = [Path(one).expanduser()]
    else:
        local_file(one)  # refuses what is not local
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


def index(shard: str) -> ShardIndex:
    """List a shard's samples: one pass over its headers, kept in memory while the file does not change.

    Raises:
        DataError: the shard is missing, unreadable, no tar, cut short, empty, holds a member twice, or holds
        a name
            that escapes its folder.
    """
    path = local_file(shard)
    try:
        stat = path.stat()
        return _index(shard, path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise DataError(f"{shard}: cannot be read: {error.strerror or error}") from error


@cache
def _index(shard: str, path: Path, size: int, _modified: int) -> ShardIndex:
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
    return ShardIndex(shard, size, tuple(extensions), keys, table[0], table[1])


def data_fingerprint(indexes: Iterable[ShardIndex]) -> str:
    """A hash of what is trained on, in order: names of shards (not their folders), keys, and sizes of
    members.
    """
    digest = hashlib.blake2b(digest_size=16)
    for one in indexes:
        digest.update(f"{Path(one.shard).name}\0{len(one)}\0{one.size}\0{' '.join(one.extensions)}\0".encode())
        for array in (one.key_bytes, one.offsets, one.sizes):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
