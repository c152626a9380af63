"""Differences over seeds and items against scipy, scikit-learn and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from clip_train.errors import DataError
from clip_train.evaluation.comparison import Difference, interval, mean_difference, paired_difference, scaled


def test_one_seed_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(0.2, 1, (2, 120))
    found = interval(paired_difference(a[None, None], b[None, None], resamples=20_000))
    expected = stats.ttest_rel(a, b)
    bounds = expected.confidence_interval()
    assert found.estimate == pytest.approx(float(np.mean(a - b)))
    assert [found.low, found.high] == pytest.approx([bounds.low, bounds.high], abs=0.01)
    assert found.p == pytest.approx(expected.pvalue, abs=0.01)


def test_seeds_alone_are_the_t_test_of_seeds() -> None:
    """Items all alike: nothing is left but the spread of seeds, 2 degrees of freedom of three."""
    by_seed = np.array([0.3, 0.5, 0.1])
    a = np.repeat(by_seed[:, None, None], 50, axis=2)
    found = interval(paired_difference(a, np.zeros_like(a)))
    assert found.p == pytest.approx(stats.ttest_1samp(by_seed, 0).pvalue)


def test_95_percent_intervals_of_three_seeds_hold_95_percent() -> None:
    rng, held, trials = np.random.default_rng(2), 0, 400
    for _ in range(trials):
        items, seeds = rng.normal(0, 1, (1, 1, 60)), rng.normal(0, 0.15, (3, 1, 1))
        a = 0.4 + items + seeds + rng.normal(0, 0.5, (3, 1, 60))
        found = interval(paired_difference(a, np.zeros_like(a), resamples=200))
        held += found.low <= 0.4 <= found.high
    assert 0.93 <= held / trials <= 0.995  # a little wide, never narrow: what items and seeds share counts twice


def test_cells_are_averaged_and_labels_used() -> None:
    rng = np.random.default_rng(9)
    labels = np.repeat([0.0, 1.0], 40)
    first, second = (strength * labels + rng.normal(size=(2, 3, 80)) for strength in (1.0, 0.3))
    found = paired_difference(first, second, labels, kind="auc", resamples=50)
    expected = [
        np.mean([roc_auc_score(labels, a) for a in x]) - np.mean([roc_auc_score(labels, b) for b in y])
        for x, y in zip(first, second, strict=True)
    ]
    assert found.by_seed == pytest.approx(expected)


def test_means_and_units_of_differences() -> None:
    parts = [Difference(np.array([0.1, 0.3]), 0.04, 100), Difference(np.array([0.5, 0.5]), 0.12, 50)]
    both = mean_difference(parts)
    assert both.by_seed == pytest.approx([0.3, 0.4])
    assert both.item_variance == pytest.approx((0.04 + 0.12) / 4)
    assert both.items == 50
    doubled = scaled(both, -2)
    assert (doubled.estimate, doubled.item_variance) == pytest.approx((-0.7, 0.16))
    assert math.isclose(interval(doubled).p, interval(both).p)


def test_what_does_not_pair_up_is_refused() -> None:
    with pytest.raises(DataError, match="pair up"):
        paired_difference(np.zeros((2, 1, 5)), np.zeros((3, 1, 5)))
