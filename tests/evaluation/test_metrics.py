from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from clip_train.evaluation.metrics import (
    chance_recall,
    per_class_mean,
    rank_of_label,
    rank_of_positives,
    recall_at,
    top,
)


def test_rank_of_label_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.9, 0.1, 0.5]])
    assert rank_of_label(scores, torch.tensor([0, 1, 2])).tolist() == [0, 2, 1]


def test_ties_count_against_the_model() -> None:
    equal = torch.zeros(4, 10)
    assert rank_of_label(equal, torch.tensor([0, 3, 5, 9])).tolist() == [9, 9, 9, 9]
    positives = torch.zeros(4, 10, dtype=torch.bool)
    positives[:, :3] = True
    assert rank_of_positives(equal, positives).tolist() == [7, 7, 7, 7]


def test_scores_that_are_not_numbers_are_never_right() -> None:
    broken = torch.full((2, 6), float("nan"))
    assert rank_of_label(broken, torch.tensor([0, 5])).tolist() == [5, 5]
    positives = torch.eye(2, 6, dtype=torch.bool)
    assert rank_of_positives(broken, positives).tolist() == [5, 5]


def test_other_positives_are_not_errors() -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    assert rank_of_positives(scores, torch.tensor([[False, True, False, True]])).item() == 1
    assert rank_of_positives(scores, torch.tensor([[True, True, True, False]])).item() == 0


def test_rank_of_positives_is_a_naive_search() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(0, 20, (50, 40), generator=generator).float()  # many ties
    positives = torch.rand(50, 40, generator=generator) < 0.1
    positives[torch.arange(50), torch.randint(0, 40, (50,), generator=generator)] = True
    expected = []
    for row, right in zip(scores.tolist(), positives.tolist(), strict=True):
        best = max(s for s, r in zip(row, right, strict=True) if r)
        expected.append(sum(s >= best for s, r in zip(row, right, strict=True) if not r))
    assert rank_of_positives(scores, positives).tolist() == expected


def test_per_class_mean_weighs_classes_not_samples() -> None:
    labels = np.array([0, 0, 0, 0, 2, 7])  # classes 1, 3…6 do not occur
    correct = np.array([True, True, True, False, True, False])
    assert per_class_mean(correct, labels) == pytest.approx((3 / 4 + 1 + 0) / 3)


def test_recall_at_counts_the_first_k() -> None:
    ranks = np.array([0, 1, 4, 5, 10])
    assert [recall_at(ranks, k) for k in (1, 5, 10)] == [0.2, 0.6, 0.8]


@pytest.mark.parametrize(("right", "candidates", "k"), [(1, 5, 1), (2, 6, 3), (3, 7, 5), (4, 5, 2), (2, 3, 10)])
def test_chance_is_the_share_of_all_draws_that_hit(right: int, candidates: int, k: int) -> None:
    draws = list(itertools.combinations(range(candidates), min(k, candidates)))
    hits = sum(any(c < right for c in draw) for draw in draws)
    assert chance_recall([right], candidates, k) == pytest.approx(hits / len(draws))


def test_chance_is_the_recall_of_a_random_order() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 6, size=300)
    candidates = 40
    trials = []
    for _ in range(60):
        scores = torch.from_numpy(rng.random((300, candidates)))
        positives = torch.arange(candidates)[None] < torch.from_numpy(counts)[:, None]
        trials.append(recall_at(rank_of_positives(scores, positives).numpy(), 5))
    error = np.std(trials) / np.sqrt(len(trials))
    assert chance_recall(counts, candidates, 5) == pytest.approx(np.mean(trials), abs=5 * error)


def test_top_gives_what_there_is() -> None:
    values, columns = top(torch.tensor([[0.1, 0.9, 0.5]]), 5)
    assert columns.tolist() == [[1, 2, 0]]
    assert values[0].tolist() == pytest.approx([0.9, 0.5, 0.1])
