"""Text tasks: rows of texts with answers, in splits that were fixed when the data was made."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from clip_train import embedded
from clip_train.data.hashing import text_hash
from clip_train.errors import DataError

Kind = Literal["labels", "ratings", "same"]


@dataclass(frozen=True)
class Split:
    """`n` items."""

    first: list[str]
    second: list[str] | None
    """The other text of pairs."""
    answers: NDArray[np.float64]
    """`(n,)`: number of the class, rating, or 0 and 1."""

    def __len__(self) -> int:
        return len(self.first)


@dataclass(frozen=True)
class TextTask:
    """A named task with its splits."""

    name: str
    kind: Kind
    """`labels` and `ratings` are learned from `train`; `same`, and `ratings` without `train`, are asked of cosines."""
    splits: dict[str, Split]
    classes: tuple[str, ...] = ()
    metric: str = "accuracy"
    about: str = ""
    also: tuple[str, ...] = ()
    """Other figures of the same predictions, reported beside `metric`."""

    @property
    def pairs(self) -> bool:
        return next(iter(self.splits.values())).second is not None

    def texts(self) -> tuple[list[str], list[str] | None]:
        """First texts of all splits, one after the other, and the second ones of pairs."""
        first = [text for split in self.splits.values() for text in split.first]
        second = [text for split in self.splits.values() for text in split.second or []]
        return first, second if self.pairs else None


EMBEDDED = {
    "exp1": ("topic", "acceptability", "word_in_context", "entailment"),
    "exp2": (
        "same_picture", "same_picture_near", "same_picture_word", "same_picture_clipart", "keywords", "wordnet_names",
        "wordnet_definitions",
    ),
}  # fmt: skip
"""Tasks that ship with the project, by experiment."""


def load_embedded(name: str) -> TextTask:
    """A task that ships with the project."""
    return read_task(embedded.path("texts") / f"{name}.json.gz")


@lru_cache(maxsize=64)
def things_of(name: str, items: int) -> NDArray[np.int64] | None:
    """What each test item of a figure is about: its texts' words, in whatever order, as numbers `(items, 1)`, of pairs
    `(items, 2)`. None for figures of other tasks than the embedded ones.

    Args:
        name: `exp2/keywords/centred`.
        items: how many the figure was measured on.
    """
    experiment, task, *_ = [*name.split("/"), ""]
    if task not in EMBEDDED.get(experiment, ()):
        return None
    split = load_embedded(task).splits["test"]
    if len(split) != items:
        return None
    sides = [split.first] if split.second is None else [split.first, split.second]
    return np.array([[text_hash(" ".join(sorted(text.lower().split()))) for text in side] for side in sides]).T


def read_task(path: Path) -> TextTask:
    """A task's file. Raises DataError where it is none."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            content: dict[str, Any] = json.load(stream)
        splits = {name: split_of(rows) for name, rows in content["splits"].items()}
        task = TextTask(
            content["name"], content["kind"], splits, tuple(content["classes"]),
            "accuracy" if content["kind"] == "labels" else "auc" if content["kind"] == "same" else "spearman",
            content["about"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path}: no text task: {error}") from error
    check_task(task)
    return task


def split_of(rows: Sequence[Sequence[Any]]) -> Split:
    """Rows `[text, answer]` or `[first, second, answer]`."""
    second = [row[1] for row in rows] if rows and len(rows[0]) == 3 else None
    return Split([row[0] for row in rows], second, np.array([float(row[-1]) for row in rows]))


def check_task(task: TextTask) -> None:
    """Raises DataError for what cannot be asked: an empty split, labels of one class, ratings that are all equal."""
    for name in ("train", "dev", "test") if task.kind == "labels" else ("dev", "test"):
        if name not in task.splits or not len(task.splits[name]):
            raise DataError(f"{task.name}: its split {name!r} is empty: nothing can be learned or measured")
    for name, split in task.splits.items():
        answers = np.unique(split.answers)
        if not np.isfinite(answers).all():
            raise DataError(f"{task.name}: an answer of {name!r} is no finite number")
        if len(answers) < 2:
            what = "all ratings are" if task.kind == "ratings" else "all labels are of one class,"
            raise DataError(f"{task.name}: {what} {answers[0]:g} in {name!r}: nothing can be learned or measured")
        if task.kind == "labels" and not set(answers) <= set(range(len(task.classes))):
            raise DataError(f"{task.name}: labels of {name!r} are {answers[:5]}, its classes {len(task.classes)}")
        if task.kind == "same" and answers.tolist() != [0.0, 1.0]:
            raise DataError(f"{task.name}: answers of {name!r} are {answers[:5]}: they must be 0 and 1")
