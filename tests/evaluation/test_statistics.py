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


def test_dependent_correlations_are_the_published_example() -> None:
    # Silver, Hittner and May (2006), the example of their program depcor: r = .3, .4, .5 of 100.
    found = ours.williams(0.3, 0.4, 0.5, 100)
    assert (found.statistic, found.p) == pytest.approx((-1.0767, 0.2843), abs=5e-5)


def test_dependent_correlations_reject_as_often_as_they_say() -> None:
    rng, p = np.random.default_rng(3), []
    for _ in range(3000):
        human = rng.normal(size=60)
        shared = rng.normal(size=60)
        one, two = (human + shared + rng.normal(size=60) for _ in range(2))
        r = np.corrcoef([human, one, two])
        p.append(ours.williams(r[0, 1], r[0, 2], r[1, 2], 60).p)
    rejected = np.mean(np.array(p) < 0.05)
    assert 0.035 < rejected < 0.065


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ours.auc([0.1, 0.2], [1, 1]), "both must occur"),
        (lambda: ours.point_biserial([0.1, 0.2, 0.3], [2, 1, 1]), "must be 0 and 1"),
        (lambda: ours.pearson([1, 2, 3], [5, 5, 5]), "three that vary"),
        (lambda: ours.pearson([1, 2, 3], [1, 2]), "do not pair up"),
        (lambda: ours.auc([1.0, math.nan], [0, 1]), "finite"),
        (lambda: ours.statistic("auc", np.ones(2), None, np.ones((1, 2))), "needs labels"),
        (lambda: ours.williams(1.0, 0.5, 0.5, 50), r"\|r\| < 1"),
    ],
)
def test_what_cannot_be_computed_is_said(call, says: str) -> None:
    with pytest.raises(DataError, match=says):
        call()
