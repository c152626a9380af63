"""The arithmetic of evaluation: ranks, recalls, accuracies and their chance levels. No model, no files.

**Ties count against the model.** The rank of a right answer is the number of wrong answers that score *at least*
as high, so a model that gives everything the same score gets 0, not 100 %, and no result depends on how a sort
breaks ties. A score that is not a number also counts against it.

Shapes: `Q` queries, `N` candidates, `C` classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def rank_of_label(scores: Tensor, labels: Tensor) -> Tensor:
    """Rank (0 is best) of each row's true column: `scores (Q, C)`, `labels (Q,)` int64 -> `(Q,)` int64."""
    true = scores.gather(1, labels[:, None])
    # Not `scores >= true`: with NaN that is False everywhere, and a broken model would be always right.
    not_below = ~(scores < true)
    not_below.scatter_(1, labels[:, None], False)
    return not_below.sum(1)


def rank_of_positives(scores: Tensor, positives: Tensor) -> Tensor:
    """Rank (0 is best) of each row's best positive among the negatives.

    `scores (Q, N)`, `positives (Q, N)` bool with at least one True a row -> `(Q,)` int64. The other positives of
    a query are left out of the count, so with several right answers the first one found is what counts.
    """
    best = scores.masked_fill(~positives, -torch.inf).amax(1, keepdim=True)
    return (~(scores < best) & ~positives).sum(1)


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` (or as many as there are) best scores of each row and their columns, best first: what is shown."""
    best = scores.topk(min(count, scores.shape[1]), dim=1)
    return best.values, best.indices


def recall_at(ranks: Integers, k: int) -> float:
    """Share of queries whose right answer is among the first `k`."""
    return float(np.mean(ranks < k)) if ranks.size else 0.0


def per_class_mean(correct: npt.NDArray[np.bool_], labels: Integers) -> float:
    """Mean over the classes that occur of the share of their samples that are right (mean per-class recall)."""
    if not labels.size:
        return 0.0
    _, inverse = np.unique(labels, return_inverse=True)
    return float(np.mean(np.bincount(inverse, weights=correct) / np.bincount(inverse)))


def chance_recall(positives: Sequence[int] | Integers, candidates: int, k: int) -> float:
    """Expected recall@k of a random order, over queries with `positives` right answers among `candidates`.

    A query with P right ones of N misses with probability C(N-P, k) / C(N, k) (drawing without replacement), so
    this is the mean of 1 - prod_{i<k} (N-P-i) / (N-i); exact, not an estimate.
    """
    right = np.asarray(positives, dtype=np.float64)
    if not right.size:
        return 0.0
    missed: Floats = np.ones_like(right)
    for i in range(min(k, candidates)):
        missed = missed * np.clip((candidates - right - i) / (candidates - i), 0.0, 1.0)
    return float(np.mean(1.0 - missed))
