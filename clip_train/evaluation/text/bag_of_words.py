"""Bags of words: what a task gives away without any order or meaning. References beside every encoder's figures.

Shapes: `n` training and `m` test texts, `V` words of the training texts, `C` classes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clip_train.evaluation.text.tasks import Split

Floats = NDArray[np.float64]


def words(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower())


def tokens(split: Split) -> list[set[str]]:
    """The bag of each item. In pairs a word says in which text it stands, and besides whether it stands in both."""
    if split.second is None:
        return [set(words(text)) for text in split.first]
    bags: list[set[str]] = []
    for one, two in zip(split.first, split.second, strict=True):
        a, b = set(words(one)), set(words(two))
        bags.append({f"1 {word}" for word in a} | {f"2 {word}" for word in b} | {f"= {word}" for word in a & b})
    return bags


def naive_bayes(train: Split, test: Split, classes: int) -> NDArray[np.int64]:
    """`(m,)` predictions of multinomial naive Bayes over which words occur, add-one smoothed.

    Strong on short texts (Wang and Manning 2012), and without anything to tune.
    """
    vocabulary, bags = _vocabulary(tokens(train))
    labels = train.answers.astype(np.int64)
    counts = np.ones((classes, len(vocabulary)))
    for bag, label in zip(bags, labels, strict=True):
        counts[label, bag] += 1
    weights = np.log(counts / counts.sum(axis=1, keepdims=True))
    prior = np.log(np.maximum(np.bincount(labels, minlength=classes), 1e-9) / len(labels))
    scores = np.array(
        [prior + weights[:, [vocabulary[word] for word in bag if word in vocabulary]].sum(axis=1)
         for bag in map(sorted, tokens(test))]
    )  # fmt: skip
    return scores.argmax(axis=1)


def ridge(train: Split, test: Split, penalty: float = 1.0) -> Floats:
    """`(m,)` ratings that ridge regression on bags of unit length predicts, in its dual form."""
    vocabulary, bags = _vocabulary(tokens(train))
    x = np.zeros((len(bags), len(vocabulary)), np.float32)
    for row, bag in zip(x, bags, strict=True):
        row[bag] = 1 / max(1.0, len(bag) ** 0.5)
    mean = train.answers.mean()
    dual = np.linalg.solve((x @ x.T).astype(np.float64) + penalty * np.eye(len(x)), train.answers - mean)
    weights = x.T @ dual
    found = []
    for bag in map(sorted, tokens(test)):
        known = [vocabulary[word] for word in bag if word in vocabulary]
        found.append(mean + weights[known].sum() / max(1.0, len(bag) ** 0.5))
    return np.array(found)


def cosines(split: Split) -> Floats:
    """`(n,)` cosines of the two texts' word counts; 0 where one has no word."""
    assert split.second is not None
    found: list[float] = []
    for one, two in zip(split.first, split.second, strict=True):
        a, b = Counter(words(one)), Counter(words(two))
        norm = (sum(v * v for v in a.values()) * sum(v * v for v in b.values())) ** 0.5
        found.append(sum(a[word] * b[word] for word in a) / norm if norm else 0.0)
    return np.array(found)


def _vocabulary(bags: Sequence[set[str]]) -> tuple[dict[str, int], list[list[int]]]:
    vocabulary: dict[str, int] = {}
    numbered = [[vocabulary.setdefault(word, len(vocabulary)) for word in sorted(bag)] for bag in bags]
    return vocabulary, numbered
