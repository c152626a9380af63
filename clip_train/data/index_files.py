"""What a shard holds, in memory and as a file: `NAME.tar.index.json` beside the shard, so that a run that reads its
shards from elsewhere knows the order of samples before it has fetched any of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from clip_train.data.cache import Cache
from clip_train.data.remote import INDEX_SUFFIX, base_name
from clip_train.data.transfer import Found
from clip_train.errors import DataError

_FORMAT = "clip-train shard index 1"


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
    version: str = ""
    """ETag or the like of a shard that lies elsewhere; of a local one its time of change in nanoseconds."""
    cache: Cache | None = None
    """Where a shard that lies elsewhere is kept while it is used; None for a local one."""

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

    def at_hand(self) -> bool:
        """Whether it can be read without fetching it first."""
        return self.cache is None or self.cache.holds(self.shard, Found(self.size, self.version))

    def same_listing(self, other: ShardIndex) -> bool:
        """Whether both list the same members at the same places."""
        return self.size == other.size and listing_digest(self) == listing_digest(other)


def listing_digest(index: ShardIndex) -> str:
    """A hash of all keys, members, offsets and sizes."""
    head = f"{len(index)}\0{index.size}\0{' '.join(index.extensions)}\0"
    digest = hashlib.blake2b(head.encode("utf-8", "surrogateescape"), digest_size=16)
    digest.update(b"\0".join(index.key_bytes.tolist()))
    for array in (index.offsets, index.sizes):
        digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    return digest.hexdigest()


def write_index(index: ShardIndex, path: Path | None = None) -> Path:
    """Write an index, by default beside its (local) shard; appears whole or not at all.

    Raises:
        OSError: it cannot be written there.
    """
    version = "" if path is None else index.version  # what lies beside a shard is copied about with it
    path = Path(index.shard + INDEX_SUFFIX) if path is None else path
    tree = {
        "format": _FORMAT,
        "shard": base_name(index.shard),
        "size": index.size,
        "version": version,
        "extensions": index.extensions,
        "keys": [index.key(sample) for sample in range(len(index))],
        "offsets": index.offsets.tolist(),
        "sizes": index.sizes.tolist(),
        "checksum": listing_digest(index),
    }
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        aside.write_text(json.dumps(tree, separators=(",", ":")), encoding="ascii")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def parse_index(data: bytes, shard: str, cache: Cache | None = None) -> ShardIndex:
    """The index that a file holds, for `shard`.

    Raises:
        DataError: damaged, or written for another format.
    """
    try:
        tree = cast(dict[str, Any], json.loads(data))
        if tree["format"] != _FORMAT:
            raise DataError(f"{shard}{INDEX_SUFFIX}: is of format {tree['format']!r}, not {_FORMAT!r}. Write it again.")
        keys = np.array([key.encode("utf-8", "surrogateescape") for key in tree["keys"]], dtype=np.bytes_)
        shape = (len(keys), len(tree["extensions"]))
        index = ShardIndex(
            shard,
            int(tree["size"]),
            tuple(tree["extensions"]),
            keys,
            np.array(tree["offsets"], dtype=np.int64).reshape(shape),
            np.array(tree["sizes"], dtype=np.int64).reshape(shape),
            str(tree["version"]),
            cache,
        )
        held = index.offsets >= 0
        fits = bool(((index.offsets + index.sizes)[held] <= index.size).all() and (index.sizes[held] >= 0).all())
        if not len(index) or not fits or listing_digest(index) != tree["checksum"]:
            raise ValueError("its checksum is wrong")
        return index
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{shard}{INDEX_SUFFIX}: is damaged ({error}). Remove it or write it again.") from error


def recall(shard: str, found: Found, cache: Cache) -> ShardIndex | None:
    """The index kept in the cache's folder, where it is of this very shard."""
    with suppress(OSError, DataError):
        kept = parse_index(_kept_path(shard, cache).read_bytes(), shard)
        if (found.size is None or kept.size == found.size) and kept.version == found.version:
            return kept
    return None


def keep(index: ShardIndex, cache: Cache) -> None:
    """Keep an index for the next start. It only saves time, so that a folder that cannot be written is no error."""
    path = _kept_path(index.shard, cache)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_index(index, path)


def forget(shard: str, cache: Cache) -> None:
    """Take back what `keep` kept."""
    with suppress(OSError):
        _kept_path(shard, cache).unlink()


def _kept_path(shard: str, cache: Cache) -> Path:
    digest = hashlib.blake2b(shard.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return cache.folder / "index" / f"{digest}.json"
