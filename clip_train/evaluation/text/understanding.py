"""Experiment 1, general text understanding: linear probes on frozen features.

A probe is logistic regression (ridge regression for ratings) on features of zero mean and unit variance. Its L2 weight
and its pool are those that are best on dev; test is looked at once.

A pair is read in one sequence (`NAME`). CLIPs never saw two texts in one, so a second figure reads them apart
(`NAME/apart`): `|u - v|` and `u * v` of each text's feature, as SentEval does (Conneau and Kiela 2018).

Shapes: `n` items, `W` features, `C` classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from clip_train.errors import DataError
from clip_train.evaluation.probe import fit_logistic
from clip_train.evaluation.text import bag_of_words
from clip_train.evaluation.text.encoder import TextEncoder, Vectors, acting_pools, distinct_pools
from clip_train.evaluation.text.metrics import chance_of, measure
from clip_train.evaluation.text.results import TaskResult
from clip_train.evaluation.text.tasks import Split, TextTask

SWEEP = (1e-3, 1e-2, 1e-1, 1.0)
"""L2 weights that are tried, of the mean loss on standardised features."""
ITERATIONS = 100

Floats = NDArray[np.float64]
Features = dict[str, dict[str, Vectors]]
"""By pool, then by split."""


@dataclass(frozen=True)
class Probe:
    """The best on dev."""

    pool: str
    l2: float
    dev: float
    by_pool: dict[str, float]
    """Each pool's best on dev."""
    predicted: Floats
    """`(n,)` of test: classes, or ratings."""


def probe_task(encoder: TextEncoder, task: TextTask) -> list[TaskResult]:
    """One figure, or two for pairs: in one sequence, and apart."""
    check_learnable(task)
    started = time.perf_counter()
    results: list[TaskResult] = []
    readings: list[tuple[str, Callable[[TextEncoder, TextTask], Features]]] = [("", read_together)]
    if task.pairs:
        readings.append(("/apart", read_apart))
    for suffix, read in readings:
        probe = fit_probe(read(encoder, task), task)
        results.append(_result(f"exp1/{task.name}{suffix}", task, probe, time.perf_counter() - started))
        started = time.perf_counter()
    return results


def check_learnable(task: TextTask) -> None:
    """Raises DataError where there is nothing to learn from."""
    if "train" not in task.splits:
        raise DataError(f"{task.name}: it has no split 'train' for a probe to learn from")


def read_together(encoder: TextEncoder, task: TextTask) -> Features:
    """Features of texts, or of pairs in one sequence, by the pools that see all of it."""
    pools = acting_pools(encoder, pairs=task.pairs)
    names, sizes = list(task.splits), [len(split) for split in task.splits.values()]
    found = encoder.features(*task.texts())
    ends = np.cumsum(sizes)[:-1]
    kept = distinct_pools({pool: found[pool] for pool in pools})
    return {pool: dict(zip(names, np.split(found[pool], ends), strict=True)) for pool in kept}


def read_apart(encoder: TextEncoder, task: TextTask) -> Features:
    """`|u - v|` and `u * v`, `(n, 2 W)`, by the pools that see the text."""
    pools = acting_pools(encoder, pairs=False)
    names, sizes = list(task.splits), [len(split) for split in task.splits.values()]
    first, second = task.texts()
    found = encoder.features([*first, *(second or [])])
    ends = np.cumsum(sizes)[:-1]
    features: Features = {}
    for pool in distinct_pools({pool: found[pool] for pool in pools}):
        u, v = found[pool][: len(first)], found[pool][len(first) :]
        both = np.concatenate([np.abs(u - v), u * v], axis=1)
        features[pool] = dict(zip(names, np.split(both, ends), strict=True))
    return features


def fit_probe(features: Features, task: TextTask) -> Probe:
    """Fit on train for every pool and L2 weight, choose on dev (of equals the more regularised), predict test."""
    best: tuple[float, str, float, Floats] | None = None
    by_pool: dict[str, float] = {}
    dev, train = task.splits["dev"], task.splits["train"]
    for pool, splits in features.items():
        x = standardised(splits)
        for l2 in SWEEP:
            predict = _fit(x["train"], train, task, l2)
            value = measure(task.metric, predict(x["dev"]), dev.answers)
            by_pool[pool] = max(by_pool.get(pool, -np.inf), value)
            if best is None or value > best[0] or (value == best[0] and pool == best[1]):
                best = value, pool, l2, predict(x["test"])
    assert best is not None
    return Probe(best[1], best[2], best[0], by_pool, best[3])


def standardised(splits: dict[str, Vectors]) -> dict[str, Vectors]:
    """Zero mean and unit variance on train; a feature that does not vary there becomes 0."""
    mean, deviation = splits["train"].mean(0), splits["train"].std(0)
    scale = np.where(deviation > 1e-6 * np.abs(mean).max(initial=0) + 1e-12, 1 / np.maximum(deviation, 1e-12), 0)
    return {name: ((x - mean) * scale).astype(np.float32) for name, x in splits.items()}


def _fit(x: Vectors, train: Split, task: TextTask, l2: float) -> Callable[[Vectors], Floats]:
    if task.kind == "ratings":
        mean = train.answers.mean()
        gram = (x.T @ x).astype(np.float64) / len(x) + l2 * np.eye(x.shape[1])
        slope = np.linalg.solve(gram, x.T.astype(np.float64) @ (train.answers - mean) / len(x))
        return lambda other: mean + other @ slope
    labels = torch.from_numpy(train.answers.astype(np.int64))
    weights, bias = fit_logistic(torch.from_numpy(x), labels, len(task.classes), l2, ITERATIONS)
    w, b = weights.numpy(), bias.numpy()
    return lambda other: (other @ w.T + b).argmax(axis=1).astype(np.float64)


def _result(name: str, task: TextTask, probe: Probe, seconds: float) -> TaskResult:
    train, test = task.splits["train"], task.splits["test"]
    if task.kind == "ratings":
        bag = bag_of_words.ridge(train, test)
    else:
        bag = bag_of_words.naive_bayes(train, test, len(task.classes)).astype(np.float64)
    if task.metric == "accuracy":
        items = {"": (probe.predicted == test.answers).astype(np.float32)}
    else:
        items = {":score": probe.predicted, ":label": test.answers}
    more = {
        "bag_of_words": measure(task.metric, bag, test.answers), "dev": probe.dev, "dev_by_pool": probe.by_pool,
        "l2": probe.l2, "train": len(train),
    }  # fmt: skip
    more |= {name: measure(name, probe.predicted, test.answers) for name in task.also}
    value = measure(task.metric, probe.predicted, test.answers)
    return TaskResult(name, task.metric, value, chance_of(task), probe.pool, len(test), seconds, items, more)
