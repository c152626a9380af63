"""The stream: step number -> this rank's rows of the global batch of that step.

`Stream` is a map from steps to batches: it holds no cursor. What comes next is a number that the trainer
keeps, so resuming is starting at that number, on any count of ranks and workers, without reading what came
before.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clip_train.data import columns
from clip_train.data.batch import BadSample, Batch, Tokenizer
from clip_train.data.cache import Cache
from clip_train.data.columns import BadSampleError, Column
from clip_train.data.decode import DecodeError, decode
from clip_train.data.decoded import DecodedPictures
from clip_train.data.files import ShardFiles
from clip_train.data.hashing import AUGMENT, CAPTION, SUBSTITUTE, TURN, mix, text_hash, uniform
from clip_train.data.order import Order, Position
from clip_train.data.prefetch import Prefetcher, check_room
from clip_train.data.shards import ShardIndex, data_fingerprint, index_all, resolve
from clip_train.data.stages import Shortened, Stage, stage_at
from clip_train.data.threads import Threads
from clip_train.data.transforms import DRAWS, Augment
from clip_train.errors import DataError

_ATTEMPTS = 16
"""Bad samples in a row, one substituted for the other, after which the data must be rubbish."""

_AHEAD = 64
"""Steps before a shard is read that its transfer begins, where it lies elsewhere."""


CaptionChoice = Literal["first", "random", "all"]


@dataclass(frozen=True, eq=False)
class SourceData:
    """The shards of one source, indexed, and where its columns are."""

    name: str
    indexes: list[ShardIndex]
    image: tuple[Column, ...] | None
    """None where no picture is read."""
    caption: tuple[Column, ...]
    caption_choice: CaptionChoice
    weight: float | None
    augment: Augment | None = None
    """Its own random views, in place of the shared ones."""

    @property
    def pictures(self) -> tuple[Column, ...]:
        """`image` of a source whose pictures are read."""
        assert self.image is not None
        return self.image

    @property
    def counts(self) -> list[int]:
        """Samples of each shard."""
        return [len(one) for one in self.indexes]


def open_source(
    name: str,
    shards: str | list[str],
    image: str | None = "jpg;jpeg;png;webp",
    caption: str = "txt",
    caption_choice: CaptionChoice = "first",
    weight: float | None = None,
    augment: Augment | None = None,
    relative_to: Path | None = None,
    cache: Cache | None = None,
    show: bool = False,
) -> SourceData:
    """Find, index and check a source's shards. No picture is read. Arguments as `[data.sources.NAME]`.

    Args:
        image: None reads no pictures, and shards need have none.
        cache: where shards from elsewhere are kept; by default `Cache()`.
        show: draw a progress bar on a terminal.

    Raises:
        DataError: no such shards, a shard is damaged, or lacks a column: before anything is trained.
    """
    indexes = index_all(resolve(shards, relative_to), cache, show)
    for number, one in enumerate(indexes):  # of shards that would have to be fetched for it, the first is read
        columns.check_columns(one, image=image, caption=caption, contents=number == 0 or one.at_hand())
    pictures = None if image is None else columns.parse(image)
    return SourceData(name, indexes, pictures, columns.parse(caption), caption_choice, weight, augment)


class Stream(torch.utils.data.Dataset[Batch]):
    """A map from steps to batches.

    Args:
        sources: one or more sources. Their weights are all given, or none.
        tokenizer: anything with `encode_counting_cuts`.
        augment: the random views of sources without their own; its `size` is the pictures' side. None reads no
            pictures.
        seed: all order and augmentation is a function of it.
        batch_size: samples in a global batch.
        lanes, window, sampling: see `clip_train.data.order`.
        rank, world: this process takes rows `[rank * b, (rank + 1) * b)`, `b = batch_size / world`.
        cache_decoded: most bytes of decoded pictures to keep in memory, in each process that reads.
        threads: samples read and decoded at the same time, in each process that reads.
        stages: smaller sizes of the first steps.

    Raises:
        DataError: no samples, fewer than a batch, a batch that the ranks cannot share, or weights for some
        sources.
    """

    def __init__(
        self,
        sources: Sequence[SourceData],
        tokenizer: Tokenizer,
        augment: Augment | None,
        *,
        seed: int,
        batch_size: int,
        lanes: int = 16,
        window: int = 8192,
        sampling: Literal["epoch", "replacement"] = "epoch",
        rank: int = 0,
        world: int = 1,
        cache_decoded: int = 0,
        threads: int = 1,
        stages: Sequence[Stage] = (),
    ) -> None:
        if batch_size % world:
            raise DataError(f"data.batch_size {batch_size} cannot be shared by {world} processes: make it a multiple")
        weights = [source.weight for source in sources if source.weight is not None]
        if weights and len(weights) < len(sources):
            without = ", ".join(source.name for source in sources if source.weight is None)
            raise DataError(f"give every source a weight, or none: data.sources {without} has none")
        self.sources, self.tokenizer, self.augment = list(sources), tokenizer, augment
        self.seed, self.batch_size, self.rank, self.world = seed, batch_size, rank, world
        counts = [source.counts for source in sources]
        self.order = Order(counts, weights or None, seed, batch_size, lanes, window, sampling)
        self.fingerprint = data_fingerprint(one for source in sources for one in source.indexes)
        self._files = ShardFiles()
        for source in sources:
            check_room(source.indexes, lanes, window, everywhere=sampling == "replacement")
        self._remote = any(one.cache is not None for source in sources for one in source.indexes)
        self._prefetcher = Prefetcher()
        self._threads = Threads(threads)
        self._decoded = DecodedPictures(cache_decoded) if cache_decoded else None
        self._stages = [(stage, self._at(stage)) for stage in stages]

    @property
    def samples(self) -> int:
        """Samples of all sources: an epoch, where weights are proportional."""
        return self.order.samples

    @property
    def contents(self) -> dict[str, dict[str, int]]:
        """Shards and samples of each source."""
        return {one.name: {"shards": len(one.indexes), "samples": sum(one.counts)} for one in self.sources}

    def keys(self, step: int) -> list[str]:
        """Keys of the whole global batch of a step; reads nothing, so bad samples are not replaced."""
        return [self.sources[p.source].indexes[p.shard].key(p.sample) for p in self.order.batch(step)]

    def __getitem__(self, step: int) -> Batch:
        """This rank's part of the global batch of a step."""
        stage = stage_at([stage for stage, _ in self._stages], step)
        return next((stream for one, stream in self._stages if one is stage), self)._batch(step)

    def _at(self, stage: Stage) -> Stream:
        """The same samples and draws, at a stage's sizes."""
        other = copy.copy(self)
        other.tokenizer = Shortened(self.tokenizer, stage.context_length)
        if self.augment is None or stage.image_size is None:
            return other
        other.augment = replace(self.augment, size=stage.image_size)
        own = {source.name: source.augment for source in self.sources}
        other.sources = [
            source
            if (view := own[source.name]) is None
            else replace(source, augment=replace(view, size=stage.image_size))
            for source in self.sources
        ]
        return other

    def _batch(self, step: int) -> Batch:
        local = self.batch_size // self.world
        rows = range(self.rank * local, (self.rank + 1) * local)
        positions = self.order.rows(step, rows.start, rows.stop)
        if self._remote:
            later = self.order.rows(step + _AHEAD, rows.start, rows.stop)
            self._prefetcher.want(dict.fromkeys(self._index(position) for position in [*positions, *later]))
        draws, choices = self._draws(positions)  # of all at once: many times faster than one by one
        size = None if self.augment is None else self.augment.size
        images = None if size is None else torch.empty((local, 3, size, size), dtype=torch.uint8)

        def fill(row: int) -> tuple[Position, list[str], list[BadSample]]:
            position, view, texts, skipped = self._usable(positions[row], draws[row], choices[row : row + 1])
            if images is not None and view is not None:
                images[row] = view
            return position, texts, skipped

        filled = self._threads.map(fill, range(local))
        used = [position for position, _, _ in filled]
        captions = [texts[int(choice) % len(texts)] for (_, texts, _), choice in zip(filled, choices, strict=True)]
        ids, lengths, cut = self.tokenizer.encode_counting_cuts(captions)
        return Batch(
            images=None if images is None else self._views(images, draws, positions),
            ids=torch.from_numpy(ids.astype(np.int32, copy=False)),
            lengths=torch.from_numpy(lengths.astype(np.int32, copy=False)),
            groups=groups(captions),
            rows=torch.tensor(rows),
            keys=[self._index(position).key(position.sample) for position in used],
            sources=[self.sources[position.source].name for position in used],
            skipped=[bad for _, _, skipped in filled for bad in skipped],
            captions_cut=cut,
        )

    def captions(self, step: int) -> list[str]:
        """Captions of the whole global batch of a step; reads no picture, so bad samples are not replaced.

        Raises:
            DataError: a shard cannot be read.
        """
        positions, found = self.order.batch(step), list[str]()
        for position, choice in zip(positions, self._draws(positions)[1].tolist(), strict=True):
            try:
                texts = self._captions(position)
                found.append(texts[choice % len(texts)])
            except BadSampleError as error:
                found.append(f"({error})")
        return found

    def _augment(self, position: Position) -> Augment:
        augment = self.sources[position.source].augment or self.augment
        assert augment is not None  # asked for where there are pictures
        return augment

    def _views(self, images: Tensor, draws: NDArray[np.float64], positions: Sequence[Position]) -> Tensor:
        """What random views do to whole batches, for each source's view on its own rows."""
        augments = [self._augment(position) for position in positions]
        if all(augment is augments[0] for augment in augments):
            return augments[0].batch(images, draws)
        for augment in dict.fromkeys(augments):
            rows = np.array([row for row, other in enumerate(augments) if other is augment])
            images[torch.from_numpy(rows)] = augment.batch(images[torch.from_numpy(rows)], draws[rows])
        return images

    def _usable(
        self, position: Position, draws: NDArray[np.float64], choice: NDArray[np.uint64]
    ) -> tuple[Position, Tensor | None, list[str], list[BadSample]]:
        """The view and captions of the sample at a position or, where it is bad, of the first good one of its
        substitutes, whose random numbers are put in place of the position's. With it, what was skipped.
        """
        original, skipped = position, list[BadSample]()
        for attempt in range(_ATTEMPTS):
            try:
                return position, self._view(position, draws), self._captions(position), skipped
            except (BadSampleError, DecodeError) as error:
                bad = BadSample(self._index(position).shard, self._index(position).key(position.sample), str(error))
            skipped.append(bad)
            position = self._substitute(original, attempt)
            views, choices = self._draws([position])
            draws[:], choice[:] = views[0], choices
        causes = [f"{bad.shard}: {bad.key}: {bad.cause}" for bad in skipped]
        raise DataError(
            f"{_ATTEMPTS} samples of source {self.sources[original.source].name!r} could not be used, "
            f"one after another: {'; '.join(causes[:3])}. Check the shards and the source's columns."
        )

    def _substitute(self, bad: Position, attempt: int) -> Position:
        """Another sample of the same source: a function of the bad one and the attempt, so resuming finds it
        again.
        """
        order = self.order.sources[bad.source]
        number = int(mix(self.seed, SUBSTITUTE, *bad, attempt) % np.uint64(order.samples))
        ends = np.cumsum(order.counts)
        shard = int(np.searchsorted(ends, number, side="right"))
        return Position(bad.source, shard, number - int(ends[shard] - order.counts[shard]), bad.epoch)

    def _index(self, position: Position) -> ShardIndex:
        return self.sources[position.source].indexes[position.shard]

    def _view(self, position: Position, draws: NDArray[np.float64]) -> Tensor | None:
        column = self.sources[position.source].image
        if self.augment is None or column is None:
            return None
        augment, place = self._augment(position), position[:3]
        if self._decoded is not None and (kept := self._decoded.get(place)) is not None:
            return augment.crop(kept, draws)
        _, data = columns.read(self._files, self._index(position), position.sample, column)
        if self._decoded is None:
            return augment.view(data, draws)
        pixels = decode(data)
        self._decoded.add(place, pixels)
        return augment.crop(pixels, draws)

    def _captions(self, position: Position) -> list[str]:
        column = self.sources[position.source].caption
        return columns.read_captions(*columns.read(self._files, self._index(position), position.sample, column))

    def _draws(self, positions: Sequence[Position]) -> tuple[NDArray[np.float64], NDArray[np.uint64]]:
        """What is random about samples: (b, DRAWS) uniform numbers for views, (b,) integers for captions."""
        source, shard, sample, epoch = np.array(positions).T
        place = (source[:, None], shard[:, None], sample[:, None], epoch[:, None])
        views = uniform(self.seed, AUGMENT, *place, np.arange(DRAWS))
        at_random = mix(self.seed, CAPTION, source, shard, sample, epoch)
        # From a random one onwards, one after the other: n passes show each of n captions once.
        in_turn = (mix(self.seed, TURN, source, shard, sample) >> np.uint64(32)) + epoch.astype(np.uint64)
        rules = np.array([("first", "random", "all").index(one.caption_choice) for one in self.sources])[source]
        return views, np.choose(rules, [np.zeros_like(at_random), at_random, in_turn])


def groups(captions: Sequence[str]) -> Tensor:
    """(b,) int64: a number for each caption, equal where they differ at most in case and white space."""
    return torch.tensor([text_hash(" ".join(caption.lower().split())) for caption in captions], dtype=torch.int64)
