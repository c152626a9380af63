"""Looking at one shard: what it holds as far as it can be read, and each sample measured.

Reading goes through the code that training reads with, so that a sample is broken here exactly if it would be there.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from clip_train.data import columns
from clip_train.data.cache import Cache
from clip_train.data.columns import BadSampleError, Column
from clip_train.data.decode import DecodeError, Pixels, decode
from clip_train.data.files import ShardFiles
from clip_train.data.index_files import ShardIndex
from clip_train.data.listing import DamagedShardError, list_samples
from clip_train.data.remote import is_remote
from clip_train.data.shards import index
from tokenizer import BPETokenizer


class Broken(NamedTuple):
    """A sample that training would skip."""

    shard: str
    key: str
    cause: str


@dataclass(frozen=True, eq=False)
class Scan:
    """The headers of a shard, as far as they can be read."""

    shard: str
    size: int
    index: ShardIndex | None
    """None where not one sample can be read."""
    damage: str | None
    """Why the whole shard would be refused."""
    broken: list[Broken]
    """Samples that are unusable whatever their bytes are: a member twice, or a name that leads elsewhere."""
    strays: list[str]
    """Members that belong to no sample."""


def scan(shard: str, cache: Cache) -> Scan:
    """Read the headers of a shard up to its end or its damage.

    One that lies elsewhere is fetched into the cache as for training, which keeps no damaged one: of such a shard only
    the damage is told.

    Raises:
        DataError: it lies elsewhere and cannot be fetched.
    """
    if is_remote(shard):
        return _scan_remote(shard, cache)
    path = Path(shard)
    broken: dict[str, Broken] = {}
    strays: list[str] = []

    def report(key: str, cause: str) -> None:
        broken[key] = Broken(shard, key, cause)

    try:
        size = path.stat().st_size
        listed, strays, damage = list_samples(shard, path, report)
    except OSError as error:
        size, listed, damage = 0, None, f"{shard}: cannot be read: {error.strerror or error}"
    if not damage and broken:
        damage = f"{shard}: {next(iter(broken.values())).cause}; training refuses the whole shard"
    if listed is None:
        return Scan(shard, size, None, damage or f"{shard}: holds no samples", [], strays)
    return Scan(shard, size, listed, damage or None, list(broken.values()), strays)


def _scan_remote(shard: str, cache: Cache) -> Scan:
    try:
        found = index(shard, cache)
        return Scan(shard, found.size, found, None, [], [])
    except DamagedShardError as error:
        return Scan(shard, 0, None, f"{error} (Copy it to a disk to see what is left of it.)", [], [])


class Measured(NamedTuple):
    """One sample. Where it is broken only `shard`, `key`, `cause` and perhaps `byte_hash` mean anything."""

    shard: int
    row: int
    key: str
    cause: str | None
    format: str = ""
    mode: str = ""
    """Pillow's, of the picture as it is stored."""
    width: int = 0
    height: int = 0
    size: int = 0
    """Bytes of the picture."""
    byte_hash: bytes = b""
    pixel_hash: bytes = b""
    dhash: int = 0
    """`difference_hash` of the pixels."""
    blank: bool = False
    """All pixels have one colour."""
    captions: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    """Of each caption, SOT and EOT included, before it is cut."""


@dataclass(frozen=True, eq=False)
class Work:
    """Some samples of a shard to be measured."""

    shard: int
    index: ShardIndex
    rows: list[int]
    image: tuple[Column, ...] | None
    """None looks at captions alone."""
    caption: tuple[Column, ...]


def measure(work: Work, tokenizer: BPETokenizer) -> list[Measured]:
    """Decode pictures and tokenise captions.

    Raises:
        DataError: the shard changed meanwhile.
    """
    files = ShardFiles()
    return [_measure(work, row, files, tokenizer) for row in work.rows]


def _measure(work: Work, row: int, files: ShardFiles, tokenizer: BPETokenizer) -> Measured:
    key = work.index.key(row)
    try:
        found = None if work.image is None else columns.read(files, work.index, row, work.image)
        pixels = None if found is None else decode(found[1])
        captions = tuple(columns.read_captions(*columns.read(files, work.index, row, work.caption)))
    except (BadSampleError, DecodeError) as error:
        return Measured(work.shard, row, key, str(error))
    tokens = tuple(len(tokenizer.encode(text)) + 2 for text in captions)
    if found is None or pixels is None:
        return Measured(work.shard, row, key, None, captions=captions, tokens=tokens)
    column, data = found
    with Image.open(io.BytesIO(data)) as image:
        stored = (image.format or column.extension, image.mode)
    return Measured(
        work.shard,
        row,
        key,
        None,
        *stored,
        width=pixels.shape[1],
        height=pixels.shape[0],
        size=len(data),
        byte_hash=hashlib.blake2b(data, digest_size=16).digest(),
        pixel_hash=hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest(),
        dhash=difference_hash(pixels),
        blank=bool((pixels == pixels[0, 0]).all()),
        captions=captions,
        tokens=tokens,
    )


def difference_hash(pixels: Pixels) -> int:
    """64 bits: the picture in grey at 9 x 8, and for each pixel whether its right neighbour is brighter.

    Source: N. Krawetz, "Kind of Like That" (2013), known as dHash.
    """
    small = np.asarray(Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.LANCZOS))
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")


def img2dataset_stats(shard: str) -> Path | None:
    """`00000_stats.json` beside `00000.tar`."""
    if is_remote(shard):
        return None
    path = Path(shard)
    stats = path.with_name(path.stem + "_stats.json")
    return stats if stats.is_file() else None
