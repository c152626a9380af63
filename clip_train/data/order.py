"""The order of samples: a pure function of (seed, counts, lanes, window), with no state and no I/O.

For each source on its own, an *epoch* is laid out like this (`docs/data-and-resume.md` works an example by
hand):

1. its shards are permuted with `mix(seed, SHARDS, source, epoch, shard)`;
2. shard number j of that permutation goes to lane j mod L, where L = min(lanes, shards); a lane is the
   concatenation of its shards' samples;
3. each lane is cut into windows of W samples, and each window is permuted with
   `mix(seed, WINDOW, source, epoch, lane, window, place)`;
4. rounds: every lane that has samples left gives one, in the order of lanes, until all are empty.

So every sample comes exactly once an epoch. Epoch follows epoch without a seam: a batch may straddle two.
With several sources, `share` says how many of the first n samples each has given, each source goes through
its own epochs, and the rows of a batch are permuted so that sources are spread over its ranks.

Sampling with replacement knows no epochs: sample number n of a source is number `mix(seed, DRAW, source, n)`
modulo its samples (`Draws`).

Every question is answered from a step number in O(batch + lanes) time and the memory of the windows in use;
nothing of the size of the data set is ever built.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clip_train.data.hashing import DRAW, ROWS, SHARDS, WINDOW, mix, permutation
from clip_train.errors import DataError

Ints = NDArray[np.int64]


class Position(NamedTuple):
    """One sample of the sequence: number of the source, of the shard in it, of the sample in that, and the pass."""

    source: int
    shard: int
    sample: int
    epoch: int
    """What tells this use of the sample from others of it: the epoch or, drawn with replacement, the number of the
    draw."""


class SourceOrder:
    """The endless sequence of one source: epoch after epoch of all its samples.

    Args:
        counts: samples of each shard.
        seed: the run's seed.
        source: the number of this source.
        lanes: parallel sequences of shards; fewer where there are fewer shards.
        window: samples of a lane that are shuffled together.
    """

    def __init__(self, counts: Sequence[int], seed: int, source: int, lanes: int, window: int) -> None:
        self.counts: Ints = np.asarray(counts, dtype=np.int64)
        self.samples = int(self.counts.sum())
        self.seed, self.source, self.window = seed, source, window
        self.lanes = min(lanes, len(self.counts))
        # Caches of pure functions. Two windows a lane are alive where a batch crosses from one to the next.
        self._epoch = lru_cache(maxsize=4)(self._lay_out)
        self._window = lru_cache(maxsize=2 * self.lanes + 8)(self._permute)

    def _lay_out(self, epoch: int) -> _Epoch:
        return _Epoch(self.counts, permutation(len(self.counts), self.seed, SHARDS, self.source, epoch), self.lanes)

    def _permute(self, epoch: int, lane: int, number: int, length: int) -> Ints:
        return permutation(length, self.seed, WINDOW, self.source, epoch, lane, number)

    def at(self, numbers: Ints) -> list[Position]:
        """The samples with these numbers (ascending) in the sequence."""
        epochs = numbers // self.samples
        found: list[Position] = []
        for epoch in np.unique(epochs).tolist():
            found += self._at_places(epoch, numbers[epochs == epoch] - epoch * self.samples)
        return found

    def _at_places(self, number: int, places: Ints) -> list[Position]:
        epoch = self._epoch(number)
        lanes, offsets = epoch.deal(places)
        found: list[Position] = []
        for lane, offset in zip(lanes.tolist(), offsets.tolist(), strict=True):
            w, place = divmod(offset, self.window)
            length = min(self.window, int(epoch.lengths[lane]) - w * self.window)
            offset = w * self.window + int(self._window(number, lane, w, length)[place])
            shard, sample = epoch.locate(lane, offset)
            found.append(Position(self.source, shard, sample, number))
        return found


class Draws:
    """The endless sequence of one source with replacement: each sample is drawn from all of them, alone.

    Args:
        counts: samples of each shard.
        seed: the run's seed.
        source: the number of this source.
    """

    def __init__(self, counts: Sequence[int], seed: int, source: int) -> None:
        self.counts: Ints = np.asarray(counts, dtype=np.int64)
        self.samples = int(self.counts.sum())
        self.seed, self.source = seed, source
        self._ends = np.cumsum(self.counts)

    def at(self, numbers: Ints) -> list[Position]:
        """The samples with these numbers in the sequence."""
        drawn = (mix(self.seed, DRAW, self.source, numbers) % np.uint64(self.samples)).astype(np.int64)
        shards = np.searchsorted(self._ends, drawn, side="right")
        samples = drawn - (self._ends - self.counts)[shards]
        places = zip(shards.tolist(), samples.tolist(), numbers.tolist(), strict=True)
        return [Position(self.source, *place) for place in places]


class _Epoch:
    """Which shards are in which lane, and how lanes are dealt."""

    def __init__(self, counts: Ints, shards: Ints, lanes: int) -> None:
        self.shards = [shards[lane::lanes] for lane in range(lanes)]
        self.ends = [np.cumsum(counts[own]) for own in self.shards]
        self.lengths: Ints = np.array([ends[-1] for ends in self.ends], dtype=np.int64)
        # Lanes run empty in the order of their lengths. Before the j-th runs empty, `lanes - j` are alive.
        self.by_length: Ints = np.argsort(self.lengths, kind="stable").astype(np.int64)
        rounds = self.lengths[self.by_length]
        self.rounds: Ints = np.concatenate([[0], rounds])  # rounds gone when j lanes have run empty
        alive = lanes - np.arange(lanes)
        self.dealt: Ints = np.concatenate([[0], np.cumsum(np.diff(self.rounds) * alive)])  # samples gone by then
        self.alive = [np.sort(self.by_length[j:]) for j in range(lanes)]

    def deal(self, places: Ints) -> tuple[Ints, Ints]:
        """Places in the epoch -> lanes, and places in those lanes (before windows are shuffled)."""
        empty = np.searchsorted(self.dealt, places, side="right") - 1
        alive = len(self.shards) - empty
        beyond = places - self.dealt[empty]
        lanes = np.array([self.alive[j][k] for j, k in zip(empty, beyond % alive, strict=True)], dtype=np.int64)
        return lanes, self.rounds[empty] + beyond // alive

    def locate(self, lane: int, offset: int) -> tuple[int, int]:
        """A place in a lane -> number of the shard, and of the sample in it."""
        ends = self.ends[lane]
        which = int(np.searchsorted(ends, offset, side="right"))
        before = int(ends[which - 1]) if which else 0
        return int(self.shards[lane][which]), offset - before


def share(samples: int, weights: Sequence[int]) -> list[int]:
    """How many of the first `samples` samples of a mixture came from each source.

    The sources are halved again and again, and each half gets its rounded share of what the whole has:
    exact integers, so that they always add up to `samples`, never go down as `samples` grows, and are within
    1/2 of proportion for two sources and within 1 for four. At the sum of the weights each source has exactly
    its weight: weighted by their numbers of samples, all sources end their epochs together.
    """
    if len(weights) == 1:
        return [samples]
    middle = len(weights) // 2
    left, total = sum(weights[:middle]), sum(weights)
    first = (2 * samples * left + total) // (2 * total)
    return share(first, weights[:middle]) + share(samples - first, weights[middle:])


class Order:
    """The sequence of global batches.

    Args:
        counts_by_source: for each source the number of samples of each of its shards.
        weights: share of each source, in any unit; None is in proportion to their numbers of samples.
        seed: the run's seed.
        batch_size: samples in a global batch.
        lanes, window: see `SourceOrder`.
        sampling: every sample once an epoch (`SourceOrder`), or each drawn from all (`Draws`).

    Raises:
        DataError: there are no samples, or fewer than a batch takes.
    """

    def __init__(
        self,
        counts_by_source: Sequence[Sequence[int]],
        weights: Sequence[float] | None,
        seed: int,
        batch_size: int,
        lanes: int = 16,
        window: int = 8192,
        sampling: Literal["epoch", "replacement"] = "epoch",
    ) -> None:
        self.sources = [
            Draws(counts, seed, number)
            if sampling == "replacement"
            else SourceOrder(counts, seed, number, lanes, window)
            for number, counts in enumerate(counts_by_source)
        ]
        self.sampling: Literal["epoch", "replacement"] = sampling
        self.origin: tuple[int, int] = (0, 0)
        """A step and the number of the sample with which it begins. It moves where a run goes on with another batch
        size (`--allow-changed`): step k begins with sample `origin[1] + (k - origin[0]) * batch_size`."""
        self.samples = sum(source.samples for source in self.sources)
        if self.samples == 0 or any(source.samples == 0 for source in self.sources):
            raise DataError("a source has no samples: name shards that hold some")
        if batch_size > self.samples and sampling == "epoch":
            raise DataError(
                f"data.batch_size is {batch_size}, but there are only {self.samples} samples: "
                "a batch would hold a sample twice. Lower data.batch_size or add shards."
            )
        self.seed, self.batch_size = seed, batch_size
        self.weights = _as_integers(weights or [source.samples for source in self.sources])

    def batch(self, step: int) -> list[Position]:
        """The global batch of a step, counted from 0."""
        return self.rows(step, 0, self.batch_size)

    def first(self, step: int) -> int:
        """Samples that came before a step.

        Raises:
            DataError: the step lies before the origin: another batch size held then.
        """
        origin, samples = self.origin
        if step < origin:
            raise DataError(f"steps up to {origin} were made with other values: list them with the recipe of that time")
        return samples + (step - origin) * self.batch_size

    def epoch(self, position: Position) -> int:
        """The pass over its source that a position belongs to."""
        whole = self.sources[position.source].samples if self.sampling == "replacement" else 1
        return position.epoch // whole

    def rows(self, step: int, start: int, stop: int) -> list[Position]:
        """Rows `start` to `stop` (exclusive) of the global batch of a step."""
        first = self.first(step)
        if len(self.sources) == 1:
            return self.sources[0].at(np.arange(first + start, first + stop))
        # Before they are permuted, the rows of a batch are those of the first source, then of the second, ...
        before = np.array(share(first, self.weights))
        ends = np.cumsum(np.array(share(first + self.batch_size, self.weights)) - before)
        places = permutation(self.batch_size, self.seed, ROWS, step)[start:stop]
        owners = np.searchsorted(ends, places, side="right")
        found: dict[int, Position] = {}
        for number, source in enumerate(self.sources):
            own = np.sort(places[owners == number])
            begin = ends[number - 1] if number else 0
            found.update(zip(own.tolist(), source.at(before[number] + own - begin), strict=True))
        return [found[place] for place in places.tolist()]


def _as_integers(weights: Sequence[float]) -> list[int]:
    """Weights in their own proportion (floats to 9 digits), as integers: so that shares are exact."""
    parts = [Fraction(weight).limit_denominator(10**9) for weight in weights]
    common = np.lcm.reduce([part.denominator for part in parts], dtype=object)
    return [int(part * int(common)) for part in parts]
