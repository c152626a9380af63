"""Differences between two arms that were trained with several seeds and asked the same items.

What is claimed is about other seeds *and* other items, so a difference has two errors: from the items, by paired
bootstrap, and from the seeds, by their spread. They are added, and t takes Satterthwaite's degrees of freedom: where
three seeds disagree it is 2, and the interval as wide as it must be.

Shapes: `S` seeds, `C` cells of an arm (pools, say), `N` items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

from clip_train.errors import DataError
from clip_train.evaluation.statistics import Floats, Interval, Kind, draws, statistic


@dataclass(frozen=True)
class Difference:
    """First arm less second."""

    by_seed: Floats
    """`(S,)`: the difference of each seed."""
    item_variance: float
    """Of the mean over seeds, from drawing other items."""
    items: int

    @property
    def estimate(self) -> float:
        return float(self.by_seed.mean())


def paired_difference(
    first: Floats, second: Floats, labels: Floats | None = None, *, kind: Kind = "mean", resamples: int = 1000
) -> Difference:
    """`first`, `second` `(S, C, N)` scores, `labels (N,)` -> the difference, mean over cells.

    Raises DataError where they do not pair up.
    """
    if first.shape != second.shape or first.ndim != 3 or (labels is not None and len(labels) != first.shape[2]):
        raise DataError(f"these do not pair up: {first.shape} and {second.shape}")
    seeds, cells, items = first.shape

    def differences(weights: Floats) -> Floats:  # (R, N) -> (R, S)
        if kind == "mean":  # linear: the mean over cells may come first
            return weights @ (first - second).mean(axis=1).T / weights.sum(axis=1, keepdims=True)
        found = [
            [statistic(kind, one[s, c], labels, weights) for c in range(cells)]
            for one in (first, second)
            for s in range(seeds)
        ]
        both = np.mean(found, axis=1).reshape(2, seeds, -1)
        return (both[0] - both[1]).T

    by_seed = differences(np.ones((1, items)))[0]
    drawn = differences(_kept_draws(items, resamples)).mean(axis=1)
    return Difference(by_seed, float(drawn.var(ddof=1)), items)


def mean_difference(parts: Sequence[Difference]) -> Difference:
    """The mean over several tasks, whose items are others: their item variances add up."""
    return Difference(
        np.mean([part.by_seed for part in parts], axis=0),
        sum(part.item_variance for part in parts) / len(parts) ** 2,
        min(part.items for part in parts),
    )


def scaled(difference: Difference, factor: float) -> Difference:
    """In other units: by 1 / (1 - chance), say, or by -1 where less is better."""
    return Difference(difference.by_seed * factor, difference.item_variance * factor**2, difference.items)


def interval(difference: Difference, level: float = 0.95) -> Interval:
    """t interval and two-sided p value over items and seeds; over items alone where there is one seed."""
    seeds = len(difference.by_seed)
    from_seeds = float(difference.by_seed.var(ddof=1)) / seeds if seeds > 1 else 0.0
    variance = difference.item_variance + from_seeds
    if variance <= 0:
        same = difference.estimate == 0
        return Interval(difference.estimate, difference.estimate, difference.estimate, level, 1.0 if same else 0.0)
    parts = difference.item_variance**2 / max(1, difference.items - 1) + from_seeds**2 / max(1, seeds - 1)
    freedom = variance**2 / parts
    error = math.sqrt(variance)
    reach = float(stats.t.ppf((1 + level) / 2, freedom)) * error
    p = float(2 * stats.t.sf(abs(difference.estimate) / error, freedom))
    return Interval(difference.estimate, difference.estimate - reach, difference.estimate + reach, level, p)


@lru_cache(maxsize=2)
def _kept_draws(items: int, resamples: int) -> Floats:
    # The same for all comparisons on these items, which come one after the other.
    return draws(np.random.default_rng(0), items, resamples)
