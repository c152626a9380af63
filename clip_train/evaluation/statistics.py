"""Statistics of items: figures of rank and correlation, resamples of them, p values and their correction.

Intervals of differences are `comparison.py`'s.

Shapes: `N` items, `R` resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from clip_train.errors import DataError

Floats = npt.NDArray[np.float64]
Values = npt.ArrayLike
Kind = Literal["mean", "auc", "pearson", "spearman"]
"""What is taken of items: the mean of their scores, or how scores go with labels (point-biserial is Pearson's)."""


@dataclass(frozen=True)
class Interval:
    """An estimate, its confidence interval, and a two-sided p value of "it is zero"."""

    estimate: float
    low: float
    high: float
    level: float
    p: float


@dataclass(frozen=True)
class Correlation:
    """A coefficient, its two-sided p value and the number of items."""

    r: float
    p: float
    n: int


@dataclass(frozen=True)
class Test:
    """A test's statistic (t or z) and its two-sided p value."""

    __test__ = False  # for pytest: no test class

    statistic: float
    p: float


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): p values adjusted for their family, in the order given."""
    p = np.asarray(p_values, dtype=np.float64)
    if not len(p):
        return []
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


def auc(scores: Values, labels: Values) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting a half.

    `scores (N,)`, `labels (N,)` 0 or 1. Raises DataError for labels of one class.
    """
    x, y = _column(scores, "scores"), _column(labels, "labels")
    two_classes(y)
    return float(statistic("auc", x, y, np.ones((1, len(x))))[0])


def point_biserial(scores: Values, labels: Values) -> Correlation:
    """Pearson's correlation with a variable of two values; its p value is that of the t test of two groups."""
    two_classes(_column(labels, "labels"))
    return pearson(scores, labels)


def pearson(scores: Values, ratings: Values) -> Correlation:
    """Pearson's correlation of `(N,)` and `(N,)`. Scores that are all equal go with nothing: r = 0, p = 1."""
    return _correlation(stats.pearsonr, scores, ratings)


def spearman(scores: Values, ratings: Values) -> Correlation:
    """Pearson's correlation of ranks, ties at their mean rank. Scores that are all equal: r = 0, p = 1."""
    return _correlation(stats.spearmanr, scores, ratings)


def williams(r12: float, r13: float, r23: float, n: int) -> Test:
    """Williams' t of r12 = r13, two correlations of the same `n` items that share variable 1; n - 3 degrees of freedom.

    Steiger (1980, equation 7) prefers it to Hotelling's. With variable 1 the human ratings, 2 and 3 two models.
    """
    _check_correlations(r12, r13, r23, n)
    determinant = 1 - r12**2 - r13**2 - r23**2 + 2 * r12 * r13 * r23
    spread = 2 * determinant * (n - 1) / (n - 3) + ((r12 + r13) / 2) ** 2 * (1 - r23) ** 3
    if r12 == r13 or spread <= 0:
        return Test(0.0, 1.0)
    t = (r12 - r13) * math.sqrt((n - 1) * (1 + r23) / spread)
    return Test(t, float(2 * stats.t.sf(abs(t), n - 3)))


def two_classes(labels: Floats) -> None:
    """Raises DataError where labels are not 0 and 1, both of them."""
    found = np.unique(labels)
    if found.tolist() != [0.0, 1.0]:
        raise DataError(f"labels must be 0 and 1, and both must occur: found {found[:5].tolist()}")


def statistic(kind: Kind, scores: Floats, labels: Floats | None, weights: Floats) -> Floats:
    """`scores (N,)`, `labels (N,)`, how often each item was drawn `weights (R, N)` -> `(R,)`."""
    if kind == "mean":
        return weights @ scores / weights.sum(axis=1)
    if labels is None:
        raise DataError(f"kind={kind!r} needs labels")
    if kind == "auc":
        positive = weights @ labels
        ranks = _ranks(scores, weights)
        area = np.sum(ranks * weights * labels, axis=1) - positive * (positive + 1) / 2
        pairs = positive * (weights.sum(axis=1) - positive)
        return np.divide(area, pairs, out=np.full(len(weights), 0.5), where=pairs > 0)
    if kind == "spearman":
        return _weighted_correlation(_ranks(scores, weights), _ranks(labels, weights), weights)
    return _weighted_correlation(scores[None], labels[None], weights)


def _ranks(values: Floats, weights: Floats) -> Floats:
    """Mean rank (from 1) of each item among those drawn, `(R, N)`: what ranking the drawn copies would give."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    sizes = np.add.reduceat(weights[:, order], starts, axis=1)  # copies of each distinct value
    mean_rank = np.cumsum(sizes, axis=1) - (sizes - 1) / 2
    group = np.empty(len(values), dtype=np.int64)
    group[order] = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(values))))
    return mean_rank[:, group]


def _weighted_correlation(x: Floats, y: Floats, weights: Floats) -> Floats:
    share = weights / weights.sum(axis=1, keepdims=True)
    x = x - np.sum(share * x, axis=1, keepdims=True)
    y = y - np.sum(share * y, axis=1, keepdims=True)
    scale = np.sqrt(np.sum(share * x * x, axis=1) * np.sum(share * y * y, axis=1))
    return np.divide(np.sum(share * x * y, axis=1), scale, out=np.zeros(len(weights)), where=scale > 1e-12)


def draws(rng: np.random.Generator, count: int, resamples: int) -> Floats:
    """How often each of `count` was drawn in `count` draws with replacement, `(R, count)`."""
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)


def _correlation(of: Callable[..., Any], scores: Values, ratings: Values) -> Correlation:
    x, y = _column(scores, "scores"), _column(ratings, "ratings")
    if len(x) != len(y):
        raise DataError(f"{len(x)} scores and {len(y)} ratings do not pair up")
    if len(y) < 3 or np.ptp(y) == 0:
        raise DataError(f"{len(y)} ratings from {y.min():g} to {y.max():g}: a correlation needs three that vary")
    if np.ptp(x) == 0:
        return Correlation(0.0, 1.0, len(x))
    result = of(x, y)
    return Correlation(float(result.statistic), float(result.pvalue), len(x))


def _check_correlations(r12: float, r13: float, r23: float, n: int) -> None:
    if not (n > 3 and max(abs(r12), abs(r13)) < 1 and abs(r23) <= 1):
        raise DataError(
            f"r12 = {r12:g}, r13 = {r13:g}, r23 = {r23:g} of {n} items: needs |r| < 1 and more than 3 items"
        )


def _column(values: Values, what: str) -> Floats:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or not column.size or not np.isfinite(column).all():
        raise DataError(f"{what} of shape {column.shape}: needs finite numbers in one dimension")
    return column
