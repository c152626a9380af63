"""Encoders beside each other on the same items: differences with paired intervals and corrected tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from clip_train.evaluation import comparison, statistics
from clip_train.evaluation.comparison import Task
from clip_train.evaluation.text.results import TaskResult
from clip_train.evaluation.text.tasks import things_of


@dataclass(frozen=True)
class Difference:
    """One task, one encoder against the first."""

    task: str
    encoder: str
    metric: str
    value: float
    reference: float
    low: float
    high: float
    p: float
    """Over items, and over seeds where there are several; corrected by Holm over all differences of the comparison."""
    williams_p: float | None
    """Of Williams' test for two correlations with one rating, not corrected; None where there is no correlation."""
    less_is_better: bool = False


def kind_of(result: TaskResult) -> statistics.Kind | None:
    """How a figure comes of its items; None where it cannot be drawn again from them (Matthews', F1)."""
    if result.metric in ("auc", "pearson", "spearman"):
        return result.metric
    return "mean" if "" in result.items else None


def compare(results: Mapping[str, Sequence[TaskResult]]) -> list[Difference]:
    """Every encoder after the first against the first, on the tasks that both have and that have a `kind_of`.

    Of experiment 3 each figure once: not on its subsets, and bits not again as bits gained.
    """
    names = list(results)
    reference = {one.name: one for one in results[names[0]]}
    found: list[Difference] = []
    for name in names[1:]:
        for one in results[name]:
            base, kind = reference.get(one.name), kind_of(one)
            if base is None or kind is None or one.name == "exp3/gain" or one.name.endswith(("_seen", "_held")):
                continue
            labels = one.items.get(":label")
            mine, theirs = _scores(one), _scores(base)
            task = Task(mine[:, None], theirs[:, None], labels, kind, things_of(one.name, mine.shape[1]))
            interval = comparison.interval(comparison.paired_difference([task]))
            williams = None
            if kind in ("pearson", "spearman") and len(mine) == 1:
                rank = statistics.spearman if kind == "spearman" else statistics.pearson
                williams = statistics.williams(one.value, base.value, rank(mine[0], theirs[0]).r, one.n).p
            less = bool(one.more.get("less_is_better"))
            found.append(
                Difference(one.name, name, one.metric, one.value, base.value, interval.low, interval.high, interval.p,
                           williams, less)
            )  # fmt: skip
    corrected = statistics.holm([one.p for one in found])
    return [replace(one, p=p) for one, p in zip(found, corrected, strict=True)]


def _scores(result: TaskResult) -> statistics.Floats:
    """`(S, N)`, one seed but for what was fine-tuned."""
    return np.atleast_2d(result.items["" if "" in result.items else ":score"]).astype(np.float64)


def write_comparison(path: Path, encoders: Sequence[str], differences: Sequence[Difference]) -> None:
    """JSON: the encoders, the first being the reference, and a row a difference."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "reference": encoders[0],
        "encoders": list(encoders),
        "differences": [asdict(one) for one in differences],
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
