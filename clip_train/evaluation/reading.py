"""What an evaluation reads: pictures with their captions or labels, strided over ranks, and small text files.

Sample `i` of the set belongs to rank `i % world`, so that every rank knows its part without asking and all parts
together are the whole, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clip_train.data.collections.base import Collection
from clip_train.data.samples import Change, read_samples
from clip_train.data.shards import resolve
from clip_train.data.transforms import Preprocess, normalize
from clip_train.errors import ConfigError, DataError

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

    collection: Collection
    preprocess: Preprocess
    label: bool = False
    captions: bool = False
    batch_size: int = 256
    workers: int = 0
    rank: int = 0
    world: int = 1
    advance: Advance | None = None
    places: Sequence[int] | None = None
    """Where each of the collection's own classes is among those of the task; None: they are the task's."""
    change: Change | None = None
    """What is done to each picture."""

    def __len__(self) -> int:
        """Samples of the whole set."""
        return len(self.collection)

    @property
    def shards(self) -> Sequence[str]:
        return self.collection.parts

    def names(self) -> dict[str, npt.NDArray[np.str_]]:
        """What finds a sample's picture again: `shards`, the `patterns` they came from, `image` the member."""
        return {
            "shards": np.array(self.collection.parts),
            "patterns": np.array(self.collection.patterns),
            "image": np.array(self.collection.column),
        }

    def shard_of(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Index into `shards` of each sample of the whole set."""
        return np.array([self.collection.part(number) for number in numbers.tolist()], dtype=np.int64)

    def batches(self, device: torch.device) -> Iterator[Pictures]:
        """This rank's samples. Raises DataError for one that cannot be read: a score over fewer means another thing."""
        loader = read_samples(
            self.collection,
            self.preprocess,
            label=self.label,
            captions=self.captions,
            batch_size=self.batch_size,
            rank=self.rank,
            world=self.world,
            workers=self.workers,
            change=self.change,
        )
        for batch in loader:
            images = normalize(batch.images.to(device), self.preprocess.mean, self.preprocess.std)
            labels = [self._place(label) for label in batch.labels]
            yield Pictures(images, batch.numbers.numpy(), batch.keys, labels, batch.captions)
            if self.advance is not None:
                self.advance(len(batch.keys) * self.world)

    def _place(self, label: int | str) -> int | str:
        if self.places is None or not isinstance(label, int) or not 0 <= label < len(self.places):
            return label  # what is no class, `label_index` refuses with the sample's name
        return self.places[label]


def class_places(own: Sequence[str] | None, names: Sequence[str], where: str, file: str) -> list[int] | None:
    """Where each of a collection's `own` classes is among the task's `names`: by its name, or as the list counts.

    None where the collection has no names. A list of as many names as there are classes may call them otherwise (the
    folders of ImageNet are WordNet's numbers).

    Raises:
        ConfigError: the names are other ones, and of another number.
    """
    if own is None:
        return None
    place = {name: number for number, name in enumerate(names)}
    if all(name in place for name in own):
        return [place[name] for name in own]
    if len(own) == len(names):
        return list(range(len(own)))
    unknown = [name for name in own if name not in place]
    raise ConfigError(
        f"{where}: its {len(own)} classes are not those of {file}, which has {len(names)}: {unknown[0]!r} is not "
        f"among them{f', nor are {len(unknown) - 1} others' if len(unknown) > 1 else ''}. Name them alike, or give "
        "one line a class, in their order"
    )


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
