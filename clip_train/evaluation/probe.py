"""What a frozen image tower knows: a linear classifier (CLIP paper, section 3.2) and nearest neighbours.

The classifier is multinomial logistic regression without augmentation, fitted by L-BFGS on the image embedding before
its normalisation, as CLIP's own probe; its L2 weight is swept on a held-out part of the training pictures, and the
classifier then fitted on all of them. Nearest neighbours vote with `exp(cosine / temperature)` (Wu et al. 2018, as DINO
evaluates).

Few shots: so many training pictures of each class, drawn by their keys; several numbers give a curve, several draws a
mean and a standard deviation. Pictures are embedded once for all of them.

Shapes: `n` training and `m` test pictures, `D` dimensions, `C` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from clip_train.data.hashing import SHOTS, mix, text_hash
from clip_train.errors import DataError
from clip_train.evaluation.encode import Gather, Loaded, Rows, alone, evaluating, gathered, in_order
from clip_train.evaluation.metrics import rank_of_label, top
from clip_train.evaluation.reading import Reading
from clip_train.evaluation.zeroshot import SHOWN, EvalResult, check_classes, label_index, summarise

SWEEP = [10.0**exponent for exponent in range(-6, 3)]
"""L2 weights that are tried, of the mean loss."""
HELD_OUT = 0.2
"""Share of the training pictures on which they are compared."""

_Set = tuple[Tensor, Tensor, Rows]


Scores = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, float]]]
"""Training features `(n, D)` and labels `(n,)` -> scores of the test pictures `(m, C)`, and figures of the fit."""


@dataclass(frozen=True)
class Shots:
    """How few training pictures of each class are taken: numbers, the smallest first, and how often each is drawn."""

    numbers: Sequence[int]
    draws: int = 1
    curve: bool = False
    """Report every number by itself."""

    @classmethod
    def of(cls, shots: int | Sequence[int] | None, draws: int) -> Shots | None:
        """As a task gives them. None takes all training pictures."""
        if shots is None:
            return None
        if isinstance(shots, int):
            return cls([shots], draws, curve=draws > 1)
        return cls(list(shots), draws, curve=True)


def evaluate_linear_probe(
    loaded: Loaded,
    training: Reading,
    reading: Reading,
    class_names: Sequence[str],
    *,
    shots: Shots | None,
    device: torch.device,
    precision: str = "fp32",
    gather: Gather = alone,
) -> EvalResult:
    """Fit on `training`, classify `reading`. All ranks call it; each embeds its part and all fit the same.

    Metrics and rows as zero-shot's (`summarise`), and `train_samples`, `l2`. With a curve of shots these are the first
    draw of the largest number, and there are `shots/N/top1`, the mean over draws, and `shots/N/sd` of each number.

    Raises:
        DataError: a label is no class, or the training pictures are of one class.
    """
    train, test = _both(loaded, training, reading, class_names, device, precision, gather)
    seen = test[0].to(device)

    def scores(features: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        weights, bias, l2 = fit_swept(features.to(device), labels.to(device), len(class_names))
        return seen @ weights.T + bias, {"l2": l2}

    return _learned(scores, train, test, training, reading, class_names, shots)


def evaluate_knn(
    loaded: Loaded,
    training: Reading,
    reading: Reading,
    class_names: Sequence[str],
    *,
    neighbours: int,
    temperature: float,
    shots: Shots | None,
    device: torch.device,
    precision: str = "fp32",
    gather: Gather = alone,
) -> EvalResult:
    """Each picture gets the votes of its nearest `neighbours` in `training`; else as `evaluate_linear_probe`."""
    train, test = _both(loaded, training, reading, class_names, device, precision, gather)
    queries = F.normalize(test[0], dim=1).to(device)

    def scores(features: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        memory, of_memory = F.normalize(features, dim=1).to(device), labels.to(device)
        votes = [
            knn_votes(part, memory, of_memory, len(class_names), neighbours, temperature)
            for part in queries.split(1024)
        ]
        return torch.cat(votes), {}

    return _learned(scores, train, test, training, reading, class_names, shots)


def _learned(
    scores: Scores,
    train: _Set,
    test: _Set,
    training: Reading,
    reading: Reading,
    class_names: Sequence[str],
    shots: Shots | None,
) -> EvalResult:
    """What `scores` makes of all training pictures, or of each number of shots and each draw."""
    features, labels, rows = train
    if len(np.unique(rows["labels"])) < 2:
        raise DataError(
            f"{', '.join(training.collection.patterns)}: the training pictures are all of one class: nothing can be "
            "learned"
        )
    if shots is None:
        found, figures = scores(features, labels)
        result = _result(found, test, reading, class_names)
        result.metrics.update(train_samples=float(len(features)), **figures)
        return result
    curve: dict[str, float] = {}
    result: EvalResult | None = None
    for number in shots.numbers:
        right: list[float] = []
        for draw in range(shots.draws):
            taken = draw_shots(rows["keys"].tolist(), rows["labels"], number, draw)
            found, figures = scores(features[taken], labels[taken])
            one = _result(found, test, reading, class_names)
            right.append(one.metrics["top1"])
            if draw == 0:
                result = one
                result.metrics.update(train_samples=float(len(taken)), **figures)
        curve[f"shots/{number}/top1"] = float(np.mean(right))
        if shots.draws > 1:
            curve[f"shots/{number}/sd"] = float(np.std(right, ddof=1))
    assert result is not None
    result.metrics.update(curve if shots.curve else {})
    return result


def fit_swept(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor, float]:
    """Weights `(C, D)`, bias `(C,)` and the L2 weight of `SWEEP` that names most held-out pictures right."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(labels.device)
    held = max(1, round(len(labels) * HELD_OUT))
    out, kept = order[:held], order[held:]
    best, chosen = -1.0, SWEEP[len(SWEEP) // 2]
    if len(kept) > 0:
        for l2 in SWEEP:
            weights, bias = fit_logistic(features[kept], labels[kept], classes, l2)
            right = float(((features[out] @ weights.T + bias).argmax(1) == labels[out]).float().mean())
            if right >= best:  # of equals the most regularised
                best, chosen = right, l2
    weights, bias = fit_logistic(features, labels, classes, chosen)
    return weights, bias, chosen


def fit_logistic(
    features: Tensor, labels: Tensor, classes: int, l2: float, iterations: int = 1000
) -> tuple[Tensor, Tensor]:
    """Minimise `mean cross-entropy + l2 / 2 * |weights|^2`; the bias is free.

    Args:
        features: `(n, D)` fp32.
        labels: `(n,)` int64 below `classes`.

    Returns:
        `(C, D)` and `(C,)`, fp32.
    """
    # On centred features of common scale the problem is well conditioned; the penalty is that of the original ones.
    mean, scale = features.mean(0), features.std().clamp_min(1e-12)
    x = (features - mean) / scale
    with torch.inference_mode(mode=False), torch.enable_grad():
        x, y = x.clone(), labels.clone()
        weights = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
        bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weights, bias], max_iter=iterations, tolerance_grad=1e-6, tolerance_change=1e-10, history_size=10,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ weights.T + bias, y) + l2 / 2 * (weights / scale).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    found = (weights / scale).detach()
    return found, (bias - found @ mean).detach()


def knn_votes(
    queries: Tensor, memory: Tensor, labels: Tensor, classes: int, neighbours: int, temperature: float
) -> Tensor:
    """`(m, C)` summed votes of each query's nearest rows of `memory (n, D)`, all of unit length."""
    cosines = queries @ memory.T
    nearest = cosines.topk(min(neighbours, len(memory)), dim=1)
    votes = torch.zeros(len(queries), classes, device=queries.device)
    return votes.scatter_add_(1, labels[nearest.indices], (nearest.values / temperature).exp())


def draw_shots(keys: Sequence[str], labels: npt.NDArray[np.int64], shots: int, draw: int = 0) -> npt.NDArray[np.int64]:
    """Rows of the first `shots` pictures of each class in an order that depends on their keys and the draw alone.

    So the pictures of 4 shots are among those of 8. A class with fewer pictures gives all it has.
    """
    hashes = mix(SHOTS, draw, np.array([text_hash(key) for key in keys], dtype=np.int64))
    order = np.argsort(hashes, kind="stable")
    taken: dict[int, int] = {}
    rows: list[int] = []
    for row in order.tolist():
        label = int(labels[row])
        if taken.get(label, 0) < shots:
            taken[label] = taken.get(label, 0) + 1
            rows.append(row)
    return np.sort(np.array(rows, dtype=np.int64))


def _both(
    loaded: Loaded,
    training: Reading,
    reading: Reading,
    class_names: Sequence[str],
    device: torch.device,
    precision: str,
    gather: Gather,
) -> tuple[_Set, _Set]:
    """Training and test embeddings, on every rank: features `(n, D)` fp32, labels `(n,)`, rows."""
    check_classes(class_names)
    with evaluating(loaded.model, device, precision):
        train = in_order(gathered(gather, lambda: _embed(loaded, training, class_names, device)))
        test = in_order(gathered(gather, lambda: _embed(loaded, reading, class_names, device)))
    return _as_tensors(train), _as_tensors(test)


def _as_tensors(rows: Rows) -> _Set:
    return torch.from_numpy(rows["features"]), torch.from_numpy(rows["labels"]), rows


def _embed(loaded: Loaded, reading: Reading, class_names: Sequence[str], device: torch.device) -> Rows:
    """This rank's embeddings, not normalised, with labels and places."""
    index_of = {name: number for number, name in enumerate(class_names)}
    parts: list[Rows] = []
    for pictures in reading.batches(device):
        labels = [
            label_index(label, index_of, f"sample {key!r}")
            for label, key in zip(pictures.labels, pictures.keys, strict=True)
        ]
        parts.append(
            {
                "number": pictures.numbers,
                "keys": np.array(pictures.keys),
                "labels": np.array(labels, dtype=np.int64),
                "features": loaded.model.encode_image(pictures.images, normalize=False).float().cpu().numpy(),
            }
        )
    if not parts:  # a rank may have no sample at all
        empty = np.empty((0, loaded.model.embed_dim), np.float32)
        return {"number": np.empty(0, np.int64), "keys": np.empty(0, "U1"), "labels": np.empty(0, np.int64),
                "features": empty}  # fmt: skip
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _result(scores: Tensor, test: _Set, reading: Reading, class_names: Sequence[str]) -> EvalResult:
    scores = scores.cpu()
    _, labels, rows = test
    ranks = rank_of_label(scores, labels).numpy()
    probabilities = scores.softmax(1)
    values, columns = top(probabilities, SHOWN)
    found: Rows = {
        "keys": rows["keys"],
        "labels": rows["labels"],
        "ranks": ranks,
        "predictions": columns.numpy(),
        "probabilities": values.numpy(),
        "shard": reading.shard_of(np.arange(len(ranks))),
        **reading.names(),
        "classes": np.array(class_names),
    }
    return EvalResult(summarise(ranks, rows["labels"], len(class_names)), found)
