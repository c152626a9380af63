"""Reading for evaluation: every sample once, in order, as it is or changed on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_train.data.batch import BadSample
from clip_train.data.collections.base import Collection
from clip_train.data.columns import BadSampleError
from clip_train.data.decode import DecodeError
from clip_train.data.loader import Loader
from clip_train.data.transforms import Preprocess
from clip_train.errors import DataError

Change = Callable[[Tensor, str], Tensor]
"""`(3, S, S)` uint8 and the sample's key -> the picture that is to be seen instead."""


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
        collection: Collection,
        preprocess: Preprocess,
        *,
        label: bool,
        captions: bool,
        batch_size: int,
        rank: int,
        world: int,
        skip_bad: bool = False,
        change: Change | None = None,
    ) -> None:
        collection.check(label=label, captions=captions)
        self.collection, self.preprocess, self.batch_size = collection, preprocess, batch_size
        self.own = range(rank, len(collection), world)
        self.label, self.captions, self.skip_bad, self.change = label, captions, skip_bad, change

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
            key = self.collection.key(place)
            try:
                pixels = self.preprocess.pixels(self.collection.pixels(place))
                label = self.collection.label(place) if self.label else None
                texts = self.collection.captions(place) if self.captions else []
            except (BadSampleError, DecodeError) as error:
                part = self.collection.parts[self.collection.part(place)]
                if self.skip_bad:
                    skipped.append(BadSample(part, key, str(error)))
                    continue
                raise DataError(
                    f"{part}: sample {key!r} cannot be evaluated: {error}. A score over part of a set would mean "
                    "something else: mend the data or take the sample out."
                ) from error
            images[len(keys)] = pixels if self.change is None else self.change(pixels, key)
            keys.append(key)
            numbers.append(place)
            if label is not None:
                labels.append(label)
            if self.captions:
                captions.append(texts)
        return EvalBatch(images[: len(keys)], labels, captions, keys, torch.tensor(numbers, dtype=torch.int64), skipped)


def read_samples(
    collection: Collection,
    preprocess: Preprocess,
    *,
    label: bool = False,
    captions: bool = False,
    batch_size: int = 256,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    skip_bad: bool = False,
    change: Change | None = None,
) -> Loader[EvalBatch]:
    """Iterate over an evaluation set in its order.

    Args:
        collection: the set.
        preprocess: the fixed view; only its uint8 half is applied, `normalize` on the device does the rest.
        label, captions: whether they are read.
        batch_size: samples in a batch; the last may be smaller.
        rank, world: this process reads samples `rank, rank + world, …`.
        workers: reading processes.
        skip_bad: leave out samples that cannot be read, and name them in `skipped`.
        change: what is done to each view.

    Raises:
        DataError: what is to be read is not there; while iterating, a sample that cannot be read.
    """
    samples = EvalSet(
        collection,
        preprocess,
        label=label,
        captions=captions,
        batch_size=batch_size,
        rank=rank,
        world=world,
        skip_bad=skip_bad,
        change=change,
    )
    return Loader(
        samples,
        range(len(samples)),
        workers=workers,
        item_bytes=3 * preprocess.size**2 * batch_size,
    )
