"""Reading shards for evaluation: every sample once, in order, as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_train.data import columns
from clip_train.data.batch import BadSample
from clip_train.data.columns import BadSampleError
from clip_train.data.decode import DecodeError, decode
from clip_train.data.files import ShardFiles
from clip_train.data.loader import Loader
from clip_train.data.shards import ShardIndex
from clip_train.data.transforms import Preprocess
from clip_train.errors import DataError


@dataclass(frozen=True)
class EvalBatch:
    """`b` samples of an evaluation set."""

    images: Tensor
    """(b, 3, S, S) uint8."""
    labels: list[int | str]
    """Classes; empty where no label was asked for."""
    captions: list[list[str]]
    """All captions of each; empty where none were asked for."""
    keys: list[str]
    numbers: Tensor
    """(b,) int64, place of each in the whole set: to put what ranks computed back in order."""
    skipped: list[BadSample]
    """Samples left out, where that was asked for."""


class EvalSet:
    """A map from batch numbers to batches. Ranks take every `world`-th sample."""

    def __init__(
        self,
        indexes: Sequence[ShardIndex],
        preprocess: Preprocess,
        *,
        image: str,
        label: str | None,
        caption: str | None,
        batch_size: int,
        rank: int,
        world: int,
        skip_bad: bool = False,
    ) -> None:
        for one in indexes:
            columns.check_columns(one, image=image, caption=caption, label=label)
        self.places = [(one, sample) for one in indexes for sample in range(len(one))]
        self.own = range(rank, len(self.places), world)
        self.preprocess, self.batch_size = preprocess, batch_size
        self.image = columns.parse(image)
        self.label = columns.parse(label) if label else None
        self.caption = columns.parse(caption) if caption else None
        self.files, self.skip_bad = ShardFiles(), skip_bad

    def __len__(self) -> int:
        return -(-len(self.own) // self.batch_size)

    def __getitem__(self, number: int) -> EvalBatch:
        own = self.own[number * self.batch_size : (number + 1) * self.batch_size]
        images = torch.empty((len(own), 3, self.preprocess.size, self.preprocess.size), dtype=torch.uint8)
        labels: list[int | str] = []
        captions: list[list[str]] = []
        keys: list[str] = []
        numbers: list[int] = []
        skipped: list[BadSample] = []
        for place in own:
            one, sample = self.places[place]
            try:
                pixels = self.preprocess.pixels(decode(columns.read(self.files, one, sample, self.image)[1]))
                label = columns.read_label(*columns.read(self.files, one, sample, self.label)) if self.label else None
                texts = (
                    columns.read_captions(*columns.read(self.files, one, sample, self.caption)) if self.caption else []
                )
            except (BadSampleError, DecodeError) as error:
                if self.skip_bad:
                    skipped.append(BadSample(one.shard, one.key(sample), str(error)))
                    continue
                raise DataError(
                    f"{one.shard}: sample {one.key(sample)!r} cannot be evaluated: {error}. A score over "
                    "part of a "
                    "set would mean something else: mend the shard or take the sample out."
                ) from error
            images[len(keys)] = pixels
            keys.append(one.key(sample))
            numbers.append(place)
            if label is not None:
                labels.append(label)
            if self.caption:
                captions.append(texts)
        return EvalBatch(images[: len(keys)], labels, captions, keys, torch.tensor(numbers, dtype=torch.int64), skipped)


def read_samples(
    indexes: Sequence[ShardIndex],
    preprocess: Preprocess,
    *,
    image: str = "jpg;jpeg;png;webp",
    label: str | None = None,
    caption: str | None = None,
    batch_size: int = 256,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    skip_bad: bool = False,
) -> Loader[EvalBatch]:
    """Iterate over an evaluation set in the order of its shards.

    Args:
        indexes: `[index(shard) for shard in resolve(patterns)]`.
        preprocess: the fixed view; only its uint8 half is applied, `normalize` on the device does the rest.
        image, label, caption: columns; those that are None are not read.
        batch_size: samples in a batch; the last may be smaller.
        rank, world: this process reads samples `rank, rank + world, …`.
        workers: reading processes.
        skip_bad: leave out samples that cannot be read, and name them in `skipped`.

    Raises:
        DataError: a column that is not there; while iterating, a sample that cannot be read.
    """
    samples = EvalSet(
        indexes,
        preprocess,
        image=image,
        label=label,
        caption=caption,
        batch_size=batch_size,
        rank=rank,
        world=world,
        skip_bad=skip_bad,
    )
    return Loader(
        samples,
        range(len(samples)),
        workers=workers,
        item_bytes=3 * preprocess.size**2 * batch_size,
    )
