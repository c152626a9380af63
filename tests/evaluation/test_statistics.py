"""Statistics against scipy, scikit-learn, published worked examples and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from clip_train.errors import DataError
from clip_train.evaluation import statistics as ours


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_interval_of_a_mean_is_scipys(rng: np.random.Generator) -> None:
    a, b = rng.exponential(1.0, 60), rng.exponential(0.8, 60)  # skewed: percentile and BCa differ
    for method, theirs in (("percentile", "percentile"), ("bca", "BCa")):
        found = ours.paired_bootstrap(a, b, method=method, resamples=40_000)  # type: ignore[arg-type]
        expected = stats.bootstrap(
            (a, b),
            lambda x, y, axis: np.mean(x - y, axis=axis),
            paired=True,
            method=theirs,
            n_resamples=40_000,
            rng=rng,
        ).confidence_interval
        assert found.estimate == pytest.approx(float(np.mean(a - b)))
        assert [found.low, found.high] == pytest.approx([expected.low, expected.high], abs=0.012)


@pytest.mark.parametrize("kind", ["auc", "pearson", "spearman"])
def test_resamples_are_those_of_a_plain_loop(kind: str, rng: np.random.Generator) -> None:
    count = 80
    labels = rng.integers(0, 2, count).astype(float) if kind == "auc" else np.round(rng.normal(size=count), 1)
    scores = np.round(labels + rng.normal(size=count), 1)  # rounded: ties
    weights = ours.draws(rng, count, 20)
    found = ours.statistic(kind, scores, labels, weights)  # type: ignore[arg-type]
    reference = {
        "auc": lambda x, y: roc_auc_score(y, x),
        "pearson": lambda x, y: stats.pearsonr(x, y).statistic,
        "spearman": lambda x, y: stats.spearmanr(x, y).statistic,
    }[kind]
    copies = [np.repeat(np.arange(count), row.astype(int)) for row in weights]
    assert found == pytest.approx([reference(scores[i], labels[i]) for i in copies], abs=1e-9)


def mann_whitney(scores: np.ndarray, labels: np.ndarray) -> float:
    above = scores[labels == 1][:, None] - scores[labels == 0][None]
    return float(np.mean(above > 0) + np.mean(above == 0) / 2)


def test_interval_of_an_auc_difference_is_scipys(rng: np.random.Generator) -> None:
    labels = np.repeat([0.0, 1.0], 80)
    a, b = labels + rng.normal(size=160), 0.2 * labels + rng.normal(size=160)
    found = ours.paired_bootstrap(a, b, labels, kind="auc", resamples=10_000)
    expected = stats.bootstrap(
        (a, b, labels), lambda x, y, z: mann_whitney(x, z) - mann_whitney(y, z), paired=True, vectorized=False,
        method="percentile", n_resamples=400, rng=rng,
    ).confidence_interval  # fmt: skip
    assert [found.low, found.high] == pytest.approx([expected.low, expected.high], abs=0.03)
    assert found.p < 0.01


def test_interval_over_seeds_covers_the_seeds_variance() -> None:
    """Items all alike within a seed: what varies is seeds, so the spread must be s/sqrt(S), not smaller."""
    means = np.array([0.1, 0.4, 0.2, 0.7, 0.35])
    a, b = np.repeat(means[:, None], 400, axis=1), np.zeros((5, 400))
    found = ours.paired_bootstrap(a, b, resamples=40_000, level=0.6827)
    assert (found.high - found.low) / 2 == pytest.approx(means.std(ddof=1) / math.sqrt(5), rel=0.08)


def test_intervals_over_seeds_and_items_hold_what_they_promise() -> None:
    """Crossed normal effects of seeds and items with a known mean: 8 seeds, 60 trials, 95 % intervals."""
    rng, held = np.random.default_rng(1), 0
    for trial in range(150):
        items, seeds = rng.normal(0, 1, (1, 40)), rng.normal(0, 0.3, (8, 1))
        a = 0.5 + items + seeds + rng.normal(0, 0.5, (8, 40))
        found = ours.paired_bootstrap(a, np.zeros_like(a), resamples=600, seed=trial)
        held += found.low <= 0.5 <= found.high
    assert 0.87 <= held / 150 <= 0.99


def test_sign_flips_are_scipys_permutations(rng: np.random.Generator) -> None:
    for count in (9, 40):  # exact, and drawn
        d = rng.normal(0.35, 1.0, count)
        expected = stats.permutation_test(
            (d, np.zeros(count)), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples",
            vectorized=True, n_resamples=20_000, rng=rng,
        ).pvalue  # fmt: skip
        assert ours.sign_flip(d, resamples=20_000) == pytest.approx(expected, abs=0 if count == 9 else 0.015)
    assert ours.sign_flip([1.0] * 5) == 2 / 2**5


def test_holm_by_hand() -> None:
    # 0.01 × 4, 0.02 × 3, 0.03 × 2, then never below what came before
    assert ours.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert ours.holm([0.6, 0.9]) == [1.0, 1.0]
    assert ours.holm([]) == []


def test_auc_and_correlations_are_the_libraries(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 2, 300)
    scores = np.round(labels + rng.normal(size=300), 1)
    ratings = scores**3 + rng.normal(size=300)
    assert ours.auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))
    for found, expected in (
        (ours.point_biserial(scores, labels), stats.pointbiserialr(labels, scores)),
        (ours.pearson(scores, ratings), stats.pearsonr(scores, ratings)),
        (ours.spearman(scores, ratings), stats.spearmanr(scores, ratings)),
    ):
        assert (found.r, found.p) == pytest.approx((expected.statistic, expected.pvalue))
    assert ours.spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) == ours.Correlation(0.0, 1.0, 3)


def test_dependent_correlations_are_the_published_examples() -> None:
    # Silver, Hittner and May (2006), the example of their program depcor: r = .3, .4, .5 of 100.
    found = ours.williams(0.3, 0.4, 0.5, 100)
    assert (found.statistic, found.p) == pytest.approx((-1.0767, 0.2843), abs=5e-5)
    found = ours.steiger(0.3, 0.4, 0.5, 100)
    assert (found.statistic, found.p) == pytest.approx((-1.0718, 0.2838), abs=5e-5)
    # Steiger (1980), case A on page 249: -0.8913 from a covariance rounded to .0042, -0.8887185 without rounding.
    assert ours.steiger(0.4, 0.5, 0.1, 103).statistic == pytest.approx(-0.8887185, abs=5e-8)


def test_dependent_correlations_reject_as_often_as_they_say() -> None:
    rng, p = np.random.default_rng(3), []
    for _ in range(3000):
        human = rng.normal(size=60)
        shared = rng.normal(size=60)
        one, two = (human + shared + rng.normal(size=60) for _ in range(2))
        r = np.corrcoef([human, one, two])
        p.append([test(r[0, 1], r[0, 2], r[1, 2], 60).p for test in (ours.williams, ours.steiger)])
    rejected = np.mean(np.array(p) < 0.05, axis=0)
    assert np.all((rejected > 0.035) & (rejected < 0.065)), rejected


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ours.auc([0.1, 0.2], [1, 1]), "both must occur"),
        (lambda: ours.point_biserial([0.1, 0.2, 0.3], [2, 1, 1]), "must be 0 and 1"),
        (lambda: ours.pearson([1, 2, 3], [5, 5, 5]), "three that vary"),
        (lambda: ours.paired_bootstrap([1.0, 2.0], [1.0]), "do not pair up"),
        (lambda: ours.paired_bootstrap([1.0, math.nan], [1.0, 2.0]), "finite"),
        (lambda: ours.paired_bootstrap([1.0, 2.0], [1.0, 2.0], kind="auc"), "needs labels"),
        (lambda: ours.williams(1.0, 0.5, 0.5, 50), r"\|r\| < 1"),
    ],
)
def test_what_cannot_be_computed_is_said(call, says: str) -> None:
    with pytest.raises(DataError, match=says):
        call()
