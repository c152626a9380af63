"""What an evaluation reads: pictures with their captions or labels, strided over ranks, and small text files.

Sample `i` of the listing (shards in order, samples in the order of the tar) belongs to rank `i % world`, so that
every rank knows its part without asking and all parts together are the whole, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clip_train.data.cache import Cache
from clip_train.data.samples import read_samples
from clip_train.data.shards import ShardIndex, index, resolve
from clip_train.data.transforms import Preprocess, normalize
from clip_train.errors import DataError

Advance = Callable[[int], None]
"""Told how many samples of the whole set were done since it was last called."""


@dataclass(frozen=True)
class Pictures:
    """A batch of `b` samples."""

    images: Tensor
    """(b, 3, S, S) float32, normalised, on the device."""
    numbers: npt.NDArray[np.int64]
    """(b,) places in the whole set."""
    keys: list[str]
    labels: list[int | str]
    captions: list[list[str]]


@dataclass(frozen=True, eq=False)
class Reading:
    """A set of pictures with labels or captions, and how this rank reads its part."""

    indexes: Sequence[ShardIndex]
    patterns: Sequence[str]
    """The shards as they were asked for."""
    preprocess: Preprocess
    image: str = "jpg;jpeg;png;webp"
    label: str | None = None
    caption: str | None = None
    batch_size: int = 256
    workers: int = 0
    rank: int = 0
    world: int = 1
    advance: Advance | None = None

    @classmethod
    def of(
        cls,
        shards: str | list[str],
        preprocess: Preprocess,
        *,
        relative_to: Path | None = None,
        cache: Cache | None = None,
        **how: str | int,
    ) -> Reading:
        """Resolve and index shards; `how` are the other fields. Raises DataError where there are none."""
        patterns = [shards] if isinstance(shards, str) else shards
        indexes = [index(shard, cache) for shard in resolve(patterns, relative_to)]
        return replace(cls(indexes, patterns, preprocess), **how)

    def instead(self, shards: str | list[str], relative_to: Path | None) -> Reading:
        """Other shards read the same way. Raises DataError where there are none."""
        patterns = [shards] if isinstance(shards, str) else shards
        return replace(self, indexes=[index(shard) for shard in resolve(patterns, relative_to)], patterns=patterns)

    def __len__(self) -> int:
        """Samples of the whole set."""
        return sum(len(one) for one in self.indexes)

    @property
    def shards(self) -> list[str]:
        return [one.shard for one in self.indexes]

    def names(self) -> dict[str, npt.NDArray[np.str_]]:
        """What finds a sample's picture again: `shards`, the `patterns` they came from, `image` the member."""
        return {
            "shards": np.array(self.shards),
            "patterns": np.array(self.patterns),
            "image": np.array(self.image),
        }

    def shard_of(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Index into `shards` of each sample of the whole set."""
        ends = np.cumsum([len(one) for one in self.indexes])
        return np.searchsorted(ends, numbers, side="right").astype(np.int64)

    def batches(self, device: torch.device) -> Iterator[Pictures]:
        """This rank's samples. Raises DataError for one that cannot be read: a score over fewer means another thing."""
        loader = read_samples(
            self.indexes,
            self.preprocess,
            image=self.image,
            label=self.label,
            caption=self.caption,
            batch_size=self.batch_size,
            rank=self.rank,
            world=self.world,
            workers=self.workers,
        )
        for batch in loader:
            images = normalize(batch.images.to(device), self.preprocess.mean, self.preprocess.std)
            yield Pictures(images, batch.numbers.numpy(), batch.keys, batch.labels, batch.captions)
            if self.advance is not None:
                self.advance(len(batch.keys) * self.world)


def read_lines(path: str, relative_to: Path | None = None) -> list[str]:
    """The lines of a text file, stripped; blank ones at the end are dropped. The path is found as shards are.

    Raises DataError where it is missing or not UTF-8.
    """
    found = resolve(path, relative_to)
    if len(found) != 1:
        raise DataError(f"{path}: names {len(found)} files, one is wanted")
    try:
        lines = Path(found[0]).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
    lines = [line.strip() for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    return lines
