"""Differences between two arms that were trained with several seeds and asked the same items.

What is claimed is about other seeds *and* other items, so a difference has two errors: from the items, by paired
bootstrap, and from the seeds, by how far an arm's figure moves from seed to seed. Both hold the noise that a seed has
on single items (arm × seed × item), so it is taken off once. t takes Satterthwaite's degrees of freedom.

Items that are about the same thing are not independent: captions of one picture, pairs that share a text. The things
are drawn, and an item counts as often as all of its things together; of pairs that counts what an item has of its own
three times instead of once, which is taken off again (the variance of Aronow, Samii and Assenova 2015 for dyads; Owen
2007 for the bootstrap).

Three seeds of one difference say little of how far seeds move it (2 degrees of freedom). Where a grid has many arms
with the same seeds, `pooled_spread` takes the spread of all of them, as the analysis of a randomised block design does,
with the seeds as blocks (Montgomery, *Design and Analysis of Experiments*, chapter 4).

Shapes: `A` arms, `S` seeds, `C` cells of a side (pools, say), `N` items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from scipy import stats

from clip_train.errors import DataError
from clip_train.evaluation.statistics import Floats, Interval, Kind, draws, statistic

Groups = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Spread:
    """How an arm's figure moves from seed to seed."""

    variance: float
    """Of one arm and seed, what all arms have in common with the seed taken out."""
    freedom: float


@dataclass(frozen=True)
class Task:
    """One figure of both sides: scores `(S, C, N)` of the first and of the second."""

    first: Floats
    second: Floats
    labels: Floats | None = None
    """`(N,)` for the kinds that need them."""
    kind: Kind = "mean"
    groups: Groups | None = None
    """`(N, 1)`, or `(N, 2)` of pairs: numbers of the things that an item is about, the same in all tasks."""
    factor: float = 1.0
    """What a unit counts: 1 / (1 - chance) from chance to perfect, -1 where less is better."""


@dataclass(frozen=True)
class Difference:
    """First side less second."""

    by_seed: Floats
    """`(S,)`: the difference of each seed."""
    item_variance: float
    """Of the mean over seeds, from drawing other items."""
    counted_twice: float
    """The part of it that the spread over seeds holds as well: arm × seed × item."""
    items: int
    """Things that are drawn, of the task that has fewest."""

    @property
    def estimate(self) -> float:
        return float(self.by_seed.mean())


def paired_difference(tasks: Sequence[Task], *, resamples: int = 1000) -> Difference:
    """The difference, mean over cells and tasks. An item that several tasks share is drawn for all of them at once.

    Raises DataError where sides do not pair up.
    """
    shape = tasks[0].first.shape
    for task in tasks:
        fits = all(one is None or len(one) == task.first.shape[-1] for one in (task.labels, task.groups))
        same = task.first.shape == task.second.shape and task.first.shape[:2] == shape[:2]
        if task.first.ndim != 3 or not fits or not same:
            lengths = [f"{len(one)}" for one in (task.labels, task.groups) if one is not None]
            beside = f", {' and '.join(lengths)} labels and groups" if lengths else ""
            raise DataError(f"these do not pair up: {task.first.shape} and {task.second.shape}{beside}")
    seeds = shape[0]
    counts = [task.first.shape[2] for task in tasks]
    by_task = [_differences(task, np.ones((1, count))) for task, count in zip(tasks, counts, strict=True)]
    by_seed = np.mean(by_task, axis=0)[0]
    edges = np.cumsum([0, *counts])
    items = [np.arange(low, high)[:, None] for low, high in pairwise(edges)]
    single = _drawn(tasks, items, resamples)
    of_mean, of_each = _variance(single), float(np.mean(single, axis=0).var(axis=0, ddof=1).mean())
    twice = max(0.0, of_each - of_mean) / (seeds - 1) if seeds > 1 else 0.0
    things = _things(tasks)
    if any(task.groups is not None for task in tasks):
        pairs = [drawn if one.shape[1] == 2 else alone
                 for drawn, alone, one in zip(single, by_task, things, strict=True)]  # fmt: skip
        of_mean = max(of_mean, _variance(_drawn(tasks, things, resamples)) - 2 * _variance(pairs))
    return Difference(by_seed, of_mean, twice, min(len(np.unique(one)) for one in things))


def _things(tasks: Sequence[Task]) -> list[Groups]:
    """For each task `(N, 1 or 2)`: which draws its items hang on. Items without a group are their own."""
    known = [task.groups.flatten() for task in tasks if task.groups is not None]
    names = np.unique(np.concatenate(known)) if known else np.array([], dtype=np.int64)
    places, count = list[Groups](), len(names)
    for task in tasks:
        if task.groups is None:
            places.append(np.arange(count, count + task.first.shape[2])[:, None])
            count += task.first.shape[2]
        else:
            places.append(np.searchsorted(names, task.groups))
    return places


def _drawn(tasks: Sequence[Task], places: Sequence[Groups], resamples: int) -> list[Floats]:
    """`(R, S)` of each task, everything that items hang on being drawn with replacement."""
    weights = _kept_draws(1 + max(int(one.max()) for one in places), resamples)
    return [_differences(task, weights[:, at].prod(axis=2)) for task, at in zip(tasks, places, strict=True)]


def _variance(drawn: Sequence[Floats]) -> float:
    """Of the mean over tasks and seeds."""
    parts = np.broadcast_arrays(*drawn)
    return float(np.mean(parts, axis=0).mean(axis=1).var(ddof=1)) if len(parts[0]) > 1 else 0.0


def _differences(task: Task, weights: Floats) -> Floats:
    """How often each item was drawn `(R, N)` -> `(R, S)`, in the task's units."""
    if task.kind == "mean":  # linear: the mean over cells may come first
        found = weights @ (task.first - task.second).mean(axis=1).T / weights.sum(axis=1, keepdims=True)
        return found * task.factor
    seeds, cells, _ = task.first.shape
    values = [
        [statistic(task.kind, one[s, c], task.labels, weights) for c in range(cells)]
        for one in (task.first, task.second)
        for s in range(seeds)
    ]
    both = np.mean(values, axis=1).reshape(2, seeds, -1)
    return (both[0] - both[1]).T * task.factor


def pooled_spread(values: Floats) -> Spread | None:
    """Of a figure of all arms `(A, S)`, means of arms and of seeds taken out; None for one arm or one seed."""
    arms, seeds = values.shape
    if arms < 2 or seeds < 2:
        return None
    left = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0, keepdims=True) + values.mean()
    freedom = (arms - 1) * (seeds - 1)
    return Spread(float((left**2).sum()) / freedom, freedom)


def interval(difference: Difference, spread: Spread | None = None, level: float = 0.95) -> Interval:
    """t interval and two-sided p value over items and seeds; over items alone where there is one seed.

    Args:
        spread: of all arms; without it, that of the difference's own seeds is taken.
    """
    seeds, found = len(difference.by_seed), difference.estimate
    from_seeds, freedom = 0.0, 1.0
    if seeds > 1 and spread is None:
        from_seeds, freedom = float(difference.by_seed.var(ddof=1)) / seeds, seeds - 1
    elif seeds > 1 and spread is not None:  # arms of one side have much in common: as if they moved together
        from_seeds, freedom = 2 * spread.variance / seeds, spread.freedom
    whole = difference.item_variance + from_seeds - difference.counted_twice
    variance = max(whole, difference.item_variance, from_seeds)
    if variance <= 0:
        return Interval(found, found, found, level, 1.0 if found == 0 else 0.0)
    parts = difference.item_variance**2 / max(1, difference.items - 1) + from_seeds**2 / freedom
    freedom = variance**2 / parts
    error = math.sqrt(variance)
    reach = float(stats.t.ppf((1 + level) / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(found) / error, freedom))
    return Interval(found, found - reach, found + reach, level, p)


@lru_cache(maxsize=2)
def _kept_draws(items: int, resamples: int) -> Floats:
    # The same for all comparisons on these items, which come one after the other.
    return draws(np.random.default_rng(0), items, resamples)
