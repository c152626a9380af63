"""Encoders beside each other on the same items: differences with paired intervals and corrected tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from clip_train.evaluation import statistics
from clip_train.evaluation.text.results import TaskResult

_KINDS: dict[str, statistics.Kind] = {
    "accuracy": "mean", "auc": "auc", "pearson": "pearson", "spearman": "spearman"
}  # fmt: skip


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
    """Of the paired bootstrap, corrected by Holm over all differences of the comparison."""
    williams_p: float | None
    """Of Williams' test for two correlations with one rating, not corrected; None where there is no correlation."""


def compare(results: Mapping[str, Sequence[TaskResult]]) -> list[Difference]:
    """Every encoder after the first against the first, on the tasks that both have.

    Metrics that are no mean, area or correlation (Matthews', F1) are left out.
    """
    names = list(results)
    reference = {one.name: one for one in results[names[0]]}
    found: list[Difference] = []
    for name in names[1:]:
        for one in results[name]:
            base = reference.get(one.name)
            kind = _KINDS.get(one.metric)
            if base is None or kind is None:
                continue
            suffix = "" if kind == "mean" else ":score"
            labels = None if kind == "mean" else one.items[":label"]
            interval = statistics.paired_bootstrap(
                one.items[suffix], base.items[suffix], labels, kind=kind, resamples=2000
            )
            williams = None
            if kind in ("pearson", "spearman"):
                rank = statistics.spearman if kind == "spearman" else statistics.pearson
                mine, theirs = one.items[":score"], base.items[":score"]
                between = rank(mine, theirs).r
                williams = statistics.williams(one.value, base.value, between, one.n).p
            found.append(
                Difference(one.name, name, one.metric, one.value, base.value, interval.low, interval.high, interval.p,
                           williams)
            )  # fmt: skip
    corrected = statistics.holm([one.p for one in found])
    return [replace(one, p=p) for one, p in zip(found, corrected, strict=True)]


def write_comparison(path: Path, encoders: Sequence[str], differences: Sequence[Difference]) -> None:
    """JSON: the encoders, the first being the reference, and a row a difference."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "reference": encoders[0],
        "encoders": list(encoders),
        "differences": [asdict(one) for one in differences],
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
