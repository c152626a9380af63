"""What a frozen image tower knows: a linear classifier (CLIP paper, section 3.2) and nearest neighbours.

The classifier is multinomial logistic regression without augmentation, fitted by L-BFGS on the image embedding before
its normalisation, as CLIP's own probe; its L2 weight is swept on a held-out part of the training pictures, and the
classifier then fitted on all of them. Nearest neighbours vote with `exp(cosine / temperature)` (Wu et al. 2018, as DINO
evaluates).

Shapes: `n` training and `m` test pictures, `D` dimensions, `C` classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from clip_train.errors import DataError
from clip_train.evaluation.encode import Gather, Loaded, Rows, alone, evaluating, gathered, in_order
from clip_train.evaluation.metrics import rank_of_label, top
from clip_train.evaluation.reading import Reading
from clip_train.evaluation.zeroshot import SHOWN, EvalResult, check_classes, label_index, summarise

SWEEP = [10.0**exponent for exponent in range(-6, 3)]
"""L2 weights that are tried, of the mean loss."""
HELD_OUT = 0.2
"""Share of the training pictures on which they are compared."""


def evaluate_linear_probe(
    loaded: Loaded,
    training: Reading,
    reading: Reading,
    class_names: Sequence[str],
    *,
    shots: int | None,
    device: torch.device,
    precision: str = "fp32",
    gather: Gather = alone,
) -> EvalResult:
    """Fit on `training`, classify `reading`. All ranks call it; each embeds its part and all fit the same.

    Args:
        shots: pictures of each class to train on, drawn by their keys; None takes all.

    Metrics and rows as zero-shot's (`summarise`), and `train_samples`, `l2`.

    Raises:
        DataError: a label is no class, or the training pictures are of one class.
    """
    train, test = _both(loaded, training, reading, class_names, shots, device, precision, gather)
    weights, bias, l2 = fit_swept(train[0].to(device), train[1].to(device), len(class_names))
    logits = test[0].to(device) @ weights.T + bias
    result = _result(logits, test, reading, class_names)
    result.metrics.update(train_samples=float(len(train[0])), l2=l2)
    return result


def evaluate_knn(
    loaded: Loaded,
    training: Reading,
    reading: Reading,
    class_names: Sequence[str],
    *,
    neighbours: int,
    temperature: float,
    shots: int | None,
    device: torch.device,
    precision: str = "fp32",
    gather: Gather = alone,
) -> EvalResult:
    """Each picture gets the votes of its nearest `neighbours` in `training`; else as `evaluate_linear_probe`."""
    train, test = _both(loaded, training, reading, class_names, shots, device, precision, gather)
    memory = F.normalize(train[0], dim=1).to(device)
    votes = torch.cat(
        [
            knn_votes(F.normalize(part, dim=1).to(device), memory, train[1].to(device), len(class_names), neighbours,
                      temperature)
            for part in test[0].split(1024)
        ]
    )  # fmt: skip
    result = _result(votes, test, reading, class_names)
    result.metrics.update(train_samples=float(len(train[0])))
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


def draw_shots(keys: Sequence[str], labels: npt.NDArray[np.int64], shots: int) -> npt.NDArray[np.int64]:
    """Rows of the first `shots` pictures of each class in an order that depends on their keys alone."""
    from clip_train.data.hashing import text_hash

    order = np.argsort(np.array([text_hash(key) for key in keys]), kind="stable")
    taken: dict[int, int] = {}
    rows: list[int] = []
    for row in order.tolist():
        label = int(labels[row])
        if taken.get(label, 0) < shots:
            taken[label] = taken.get(label, 0) + 1
            rows.append(row)
    return np.sort(np.array(rows, dtype=np.int64))


_Set = tuple[Tensor, Tensor, Rows]


def _both(
    loaded: Loaded,
    training: Reading,
    reading: Reading,
    class_names: Sequence[str],
    shots: int | None,
    device: torch.device,
    precision: str,
    gather: Gather,
) -> tuple[_Set, _Set]:
    """Training and test embeddings, on every rank: features `(n, D)` fp32, labels `(n,)`, rows."""
    check_classes(class_names)
    with evaluating(loaded.model, device, precision):
        train = in_order(gathered(gather, lambda: _embed(loaded, training, class_names, device)))
        test = in_order(gathered(gather, lambda: _embed(loaded, reading, class_names, device)))
    if shots is not None:
        rows = draw_shots(train["keys"].tolist(), train["labels"], shots)
        train = {name: array[rows] for name, array in train.items()}
    if len(np.unique(train["labels"])) < 2:
        raise DataError(
            f"{', '.join(training.patterns)}: the training pictures are all of one class: nothing can be learned"
        )
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
