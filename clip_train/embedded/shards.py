"""Writing WebDataset shards that come out byte for byte the same every time."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clip_train.embedded.picture import Picture, Pixels, encode_webp


@dataclass(frozen=True)
class Sample:
    """A picture that was drawn."""

    picture: Picture
    pixels: Pixels


def shuffled(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """An order that depends on the seed and the keys alone."""

    def rank(sample: Sample) -> bytes:
        return hashlib.sha256(f"{seed}:{sample.picture.key}".encode()).digest()

    return sorted(samples, key=rank)


def write_shards(folder: Path, split: str, samples: Sequence[Sample], per_shard: int, quality: int) -> list[Path]:
    """`SPLIT-000000.tar.gz`, …: at most `per_shard` samples each, evenly filled, in the order given.

    Compressed because a tar member costs at least 1 KiB, as much as a picture: the shards are a third of
    the plain tars.
    """
    count = max(1, -(-len(samples) // per_shard))
    written: list[Path] = []
    for number in range(count):
        part = samples[len(samples) * number // count : len(samples) * (number + 1) // count]
        path = folder / f"{split}-{number:06d}.tar.gz"
        # No file name and no time in the gzip header.
        with path.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as stream:
            stream.write(tar_bytes(part, quality))
        written.append(path)
    return written


def tar_bytes(samples: Sequence[Sample], quality: int) -> bytes:
    """A tar with `KEY.webp` and `KEY.json` for each sample."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            _add(tar, f"{sample.picture.key}.webp", encode_webp(sample.pixels, quality))
            _add(tar, f"{sample.picture.key}.json", metadata(sample.picture))
    return stream.getvalue()


def metadata(picture: Picture) -> bytes:
    """What stands beside a picture, as JSON in UTF-8."""
    fields: dict[str, object] = {"captions": list(picture.captions)}
    if picture.label is not None:
        fields["label"] = picture.label
    fields |= {"source": picture.source, "license": picture.license}
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = len(content), 0o644, 0
    tar.addfile(member, io.BytesIO(content))
