"""The figures of text tasks: predictions against answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from clip_train.errors import DataError
from clip_train.evaluation import statistics
from clip_train.evaluation.text.tasks import TextTask

Floats = NDArray[np.float64]


def accuracy(predicted: Floats, answers: Floats) -> float:
    return float(np.mean(predicted == answers))


def matthews(predicted: Floats, answers: Floats) -> float:
    """Matthews' correlation of two classes (1975); 0 where the predictions are all of one."""
    p, y = predicted == 1, answers == 1
    true, false = float(np.sum(p & y)), float(np.sum(p & ~y))
    missed, right = float(np.sum(~p & y)), float(np.sum(~p & ~y))
    norm = ((true + false) * (true + missed) * (right + false) * (right + missed)) ** 0.5
    return (true * right - false * missed) / norm if norm else 0.0


def f1(predicted: Floats, answers: Floats) -> float:
    """Of class 1: harmonic mean of precision and recall; 0 where nothing was found."""
    hit = float(np.sum((predicted == 1) & (answers == 1)))
    either = float(np.sum(predicted == 1) + np.sum(answers == 1))
    return 2 * hit / either if either else 0.0


METRICS: dict[str, Callable[[Floats, Floats], float]] = {
    "accuracy": accuracy,
    "matthews": matthews,
    "f1": f1,
    "pearson": lambda scores, ratings: statistics.pearson(scores, ratings).r,
    "spearman": lambda scores, ratings: statistics.spearman(scores, ratings).r,
    "auc": statistics.auc,
}


def measure(metric: str, predicted: Floats, answers: Floats) -> float:
    """A figure by its name. Raises DataError for an unknown one."""
    if metric not in METRICS:
        raise DataError(f"metric {metric!r} is unknown: choose one of {', '.join(METRICS)}")
    return float(METRICS[metric](predicted, answers))


def chance_of(task: TextTask) -> float:
    """What knowing nothing gets on test: the most frequent class of train, 0.5 of an AUC, 0 of a correlation."""
    if task.metric == "auc":
        return 0.5
    if task.kind != "labels" or task.metric == "matthews":
        return 0.0
    values, counts = np.unique(task.splits["train"].answers, return_counts=True)
    answers = task.splits["test"].answers
    return measure(task.metric, np.full(len(answers), values[counts.argmax()]), answers)
