"""Differences over seeds and items against scipy, scikit-learn and simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from clip_train.errors import DataError
from clip_train.evaluation.comparison import Difference, Spread, Task, interval, paired_difference, pooled_spread
from clip_train.evaluation.statistics import Floats


def difference(first: Floats, second: Floats, resamples: int = 1000, **task: Any) -> Difference:
    return paired_difference([Task(first, second, **task)], resamples=resamples)


def test_one_seed_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(0.2, 1, (2, 120))
    found = interval(difference(a[None, None], b[None, None], 20_000))
    expected = stats.ttest_rel(a, b)
    bounds = expected.confidence_interval()
    assert found.estimate == pytest.approx(float(np.mean(a - b)))
    assert [found.low, found.high] == pytest.approx([bounds.low, bounds.high], abs=0.01)
    assert found.p == pytest.approx(expected.pvalue, abs=0.01)


def test_seeds_alone_are_the_t_test_of_seeds() -> None:
    """Items all alike: nothing is left but the spread of seeds, 2 degrees of freedom of three."""
    by_seed = np.array([0.3, 0.5, 0.1])
    a = np.repeat(by_seed[:, None, None], 50, axis=2)
    found = interval(difference(a, np.zeros_like(a)))
    assert found.p == pytest.approx(stats.ttest_1samp(by_seed, 0).pvalue)


@pytest.mark.parametrize("pooled", [True, False])
def test_95_percent_intervals_of_three_seeds_hold_95_percent(pooled: bool) -> None:
    """Items, seeds and what seeds do to single items; the arms are eight, of which two are compared."""
    rng, held, trials, width = np.random.default_rng(2), 0, 400, 0.0
    for _ in range(trials):
        items, seeds = rng.normal(0, 1, (8, 1, 60)), rng.normal(0, 0.15, (8, 3, 1))
        scores = items + seeds + rng.normal(0, 0.5, (8, 3, 60)) + rng.normal(0, 1, (1, 3, 1))
        scores[0] += 0.4
        spread = pooled_spread(scores.mean(axis=2)) if pooled else None
        found = interval(difference(scores[:1].swapaxes(0, 1), scores[1:2].swapaxes(0, 1), 200), spread)
        held += found.low <= 0.4 <= found.high
        width += (found.high - found.low) / trials
    assert 0.93 <= held / trials <= 0.985
    assert width < 1.2


def test_pooled_spread_is_the_error_of_a_block_design() -> None:
    """Of the analysis of variance with seeds as blocks, by its textbook sums of squares."""
    values = np.random.default_rng(3).normal(0, 1, (5, 3)) + np.arange(5)[:, None] + 7 * np.arange(3)
    total = ((values - values.mean()) ** 2).sum()
    arms = 3 * ((values.mean(axis=1) - values.mean()) ** 2).sum()
    seeds = 5 * ((values.mean(axis=0) - values.mean()) ** 2).sum()
    assert pooled_spread(values) == Spread(pytest.approx((total - arms - seeds) / 8), 8)
    assert pooled_spread(values[:, :1]) is None


def test_a_pooled_spread_counts_for_both_sides_whose_arms_move_together() -> None:
    first = np.zeros((3, 4, 50)) + np.array([0.1, 0.2, 0.3])[:, None, None]
    found = interval(difference(first, np.zeros_like(first)), Spread(0.09, 28))
    error = np.sqrt(2 * 0.09 / 3)
    assert found.p == pytest.approx(2 * stats.t.sf(0.2 / error, 28))


def test_cells_are_averaged_and_labels_used() -> None:
    rng = np.random.default_rng(9)
    labels = np.repeat([0.0, 1.0], 40)
    first, second = (strength * labels + rng.normal(size=(2, 3, 80)) for strength in (1.0, 0.3))
    found = difference(first, second, 50, labels=labels, kind="auc", factor=2.0)
    expected = [
        np.mean([roc_auc_score(labels, a) for a in x]) - np.mean([roc_auc_score(labels, b) for b in y])
        for x, y in zip(first, second, strict=True)
    ]
    assert found.by_seed / 2 == pytest.approx(expected)


def test_what_seeds_do_to_single_items_counts_once() -> None:
    """Nothing but noise of each seed on each item: its variance is 1 / (S N), not twice that."""
    rng, variances = np.random.default_rng(8), list[float]()
    for _ in range(60):
        scores = rng.normal(0, 1, (3, 1, 200))
        found = difference(scores, np.zeros_like(scores), 400)
        assert found.counted_twice > 0
        from_seeds = float(found.by_seed.var(ddof=1)) / 3
        variances.append(found.item_variance + from_seeds - found.counted_twice)
    assert np.mean(variances) == pytest.approx(1 / 600, rel=0.2)


def test_items_of_a_group_count_once() -> None:
    """Every item four times: the error is that of the items once, not half of it."""
    rng = np.random.default_rng(6)
    once = rng.normal(0, 1, (1, 1, 100))
    four, groups = np.tile(once, 4), np.tile(np.arange(100) * 31, 4)[:, None]
    expected = difference(once, np.zeros_like(once), 4000)
    grouped = difference(four, np.zeros_like(four), 4000, groups=groups)
    assert grouped.item_variance == pytest.approx(expected.item_variance, rel=0.1)
    assert grouped.items == 100
    assert difference(four, np.zeros_like(four), 4000).item_variance < 0.35 * expected.item_variance


def test_pairs_hang_on_both_of_their_texts() -> None:
    """Every pair of 30 texts, each of which moves all of its pairs: the standard error that simulation finds."""
    rng = np.random.default_rng(12)
    pairs = np.array([(a, b) for a in range(30) for b in range(a)])
    means, found = list[float](), list[float]()
    for _ in range(150):
        effect = rng.normal(0, 1, 30)
        scores = (effect[pairs].sum(axis=1) + rng.normal(0, 1, len(pairs)))[None, None]
        means.append(float(scores.mean()))
        found.append(difference(scores, np.zeros_like(scores), 300, groups=pairs).item_variance)
    assert np.mean(found) == pytest.approx(np.var(means), rel=0.25)
    alone = difference(scores, np.zeros_like(scores), 300).item_variance
    assert alone < 0.2 * np.mean(found)


def test_tasks_with_the_same_items_are_drawn_together() -> None:
    rng = np.random.default_rng(7)
    one, other = (rng.normal(0, 1, (1, 1, 100)) for _ in range(2))
    zero, groups = np.zeros((1, 1, 100)), np.arange(100)[:, None]
    alone = difference(one, zero, 4000)
    twice = paired_difference([Task(one, zero, groups=groups), Task(one, zero, groups=groups)], resamples=4000)
    assert twice.estimate == pytest.approx(alone.estimate)
    assert twice.item_variance == pytest.approx(alone.item_variance, rel=0.1)
    apart = paired_difference([Task(one, zero), Task(other, zero)], resamples=4000)
    expected = (alone.item_variance + difference(other, zero, 4000).item_variance) / 4
    assert apart.item_variance == pytest.approx(expected, rel=0.1)


def test_what_does_not_pair_up_is_refused() -> None:
    with pytest.raises(DataError, match="pair up"):
        difference(np.zeros((2, 1, 5)), np.zeros((3, 1, 5)))
    with pytest.raises(DataError, match="pair up"):
        difference(np.zeros((2, 1, 5)), np.zeros((2, 1, 5)), groups=np.arange(4)[:, None])
