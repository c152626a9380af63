"""Experiment 2, "synesthesia": do cosines of texts know what was seen, without being taught anything more?

`same` tasks: captions of one picture against captions of two (AUC; the point-biserial correlation beside it).
`ratings` tasks: cosines against ratings (Spearman; Pearson beside it).

Four figures an encoder, because raw cosines of language models are known to be poor for a reason that has nothing to do
with what they know: their features share a common direction (Ethayarajh 2019; Mu and Viswanath 2018).

    NAME                cosine of the tower's features, by the pool that is best on dev
    NAME/centred        the same after the mean of dev's features is subtracted
    NAME/joint          cosine in CLIP's joint space, where there is one
    NAME/joint_centred  both

Shapes: `n` pairs, `W` features.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from clip_train.evaluation import statistics
from clip_train.evaluation.text import bag_of_words
from clip_train.evaluation.text.encoder import OWN, TextEncoder, Vectors, acting_pools, distinct_pools
from clip_train.evaluation.text.metrics import measure
from clip_train.evaluation.text.results import TaskResult
from clip_train.evaluation.text.tasks import Split, TextTask

Floats = NDArray[np.float64]
JOINT = "joint"


def compare_task(encoder: TextEncoder, task: TextTask) -> list[TaskResult]:
    """Two figures, or four where the encoder has a joint space."""
    started = time.perf_counter()
    splits = [task.splits["dev"], task.splits["test"]]
    texts = [text for split in splits for text in (*split.first, *(split.second or []))]
    found = encoder.features(texts)
    acting = {pool: found[pool] for pool in acting_pools(encoder, pairs=False)}
    spaces = {"": {pool: acting[pool] for pool in distinct_pools(acting)}}
    joint = joint_of(encoder, found[OWN], texts)
    if joint is not None:
        spaces["/joint"] = {JOINT: joint}
    results: list[TaskResult] = []
    for space, by_pool in spaces.items():
        for centred in (False, True):
            suffix = space + ("" if not centred else "_centred" if space else "/centred")
            results.append(_best(f"exp2/{task.name}{suffix}", task, by_pool, centred, started))
            started = time.perf_counter()
    return results


def joint_of(encoder: TextEncoder, own: Vectors, texts: list[str]) -> Vectors | None:
    """Joint vectors, made of features where the encoder can, so that nothing is encoded twice."""
    made = getattr(encoder, "joint_of", None)
    return encoder.joint(texts) if made is None else made(own)


def pair_cosines(vectors: Vectors, dev: int, test: int, *, centred: bool) -> tuple[Floats, Floats]:
    """Cosines of dev's and test's pairs; `vectors` holds dev's first and second texts, then test's.

    Args:
        dev, test: how many pairs each has.
        centred: subtract the mean of dev's texts first.
    """
    x = vectors.astype(np.float64)
    if centred:
        x = x - x[: 2 * dev].mean(axis=0)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    a, b, c, d = np.split(x, [dev, 2 * dev, 2 * dev + test])
    return np.sum(a * b, axis=1), np.sum(c * d, axis=1)


def _best(name: str, task: TextTask, by_pool: dict[str, Vectors], centred: bool, started: float) -> TaskResult:
    dev, test = task.splits["dev"], task.splits["test"]
    tried: dict[str, tuple[float, Floats]] = {}
    for pool, vectors in by_pool.items():
        on_dev, on_test = pair_cosines(vectors, len(dev), len(test), centred=centred)
        tried[pool] = measure(task.metric, on_dev, dev.answers), on_test
    pool = max(tried, key=lambda one: tried[one][0])
    scores = tried[pool][1]
    more = {
        "bag_of_words": measure(task.metric, bag_of_words.cosines(test), test.answers),
        "dev": tried[pool][0],
        "dev_by_pool": {one: value for one, (value, _) in tried.items()},
        **beside(task, scores, test),
    }
    chance = 0.5 if task.metric == "auc" else 0.0
    return TaskResult(
        name, task.metric, measure(task.metric, scores, test.answers), chance, pool, len(test),
        time.perf_counter() - started, {":score": scores, ":label": test.answers}, more,
    )  # fmt: skip


def beside(task: TextTask, scores: Floats, test: Split) -> dict[str, float]:
    """The other figure of a kind of task."""
    if task.kind == "same":
        return {"point_biserial": statistics.point_biserial(scores, test.answers).r}
    return {"pearson": statistics.pearson(scores, test.answers).r}
