"""Zero-shot classification: the class whose prompts' mean embedding is nearest (CLIP paper, section 3.1.4).

Shapes: `C` classes, `T` templates, `D` width of the joint space, `b` pictures of a batch, `n` pictures in all.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip_train.errors import ConfigError, DataError
from clip_train.evaluation.encode import (
    Encoder,
    Gather,
    Loaded,
    Rows,
    Tokenizer,
    alone,
    encode_images,
    encode_texts,
    evaluating,
    gathered,
    in_order,
    unstride,
)
from clip_train.evaluation.metrics import per_class_mean, rank_of_label, top
from clip_train.evaluation.reading import Reading
from clip_train.evaluation.robustness import Spoiling, corrupted_accuracy, robustness

SHOWN = 5
"""Guesses of each picture that are kept."""


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found: figures by short name, and arrays that the report draws from."""

    metrics: dict[str, float]
    rows: Rows


def evaluate_zeroshot(
    loaded: Loaded,
    reading: Reading,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    device: torch.device,
    precision: str = "fp32",
    gather: Gather = alone,
    spoiling: Spoiling | None = None,
) -> EvalResult:
    """Classify every picture of `reading` by its label, and count. All ranks call it, each with its own `reading`.

    Metrics: `top1`, `top5`, `per_class_mean` (mean over the classes that occur of their recall), `chance` and
    `chance_top5` (1/C, 5/C), `majority` (the share of the commonest class, which a model that ignores the picture
    could reach), `samples`, `classes`. Ties count as wrong (see `metrics`). With `spoiling`, `robustness`' figures too.

    Rows: `keys (n,)`, `shard (n,)` index into `shards`, `labels (n,)`, `ranks (n,)` of the true class,
    `predictions (n, 5)` with their `similarities` (cosines) and `probabilities` (softmax over all classes at the
    model's temperature), `true_probability (n,)`, `classes (C,)`, and the names in `Reading.names`.

    Raises ConfigError for bad classes or templates, DataError for a label that is no class or for no picture.
    """
    check_classes(class_names)
    check_templates(templates)
    scale = _logit_scale(loaded.model)
    with evaluating(loaded.model, device, precision):
        mine = class_names[reading.rank :: reading.world]
        classes = unstride(
            gathered(
                gather,
                lambda: class_embeddings(
                    loaded.model, loaded.tokenizer, mine, templates, device, reading.batch_size
                ).cpu(),
            ),
            device,
        )

        def classify(reading: Reading) -> Rows:
            return _classify(loaded, reading, class_names, classes, scale, device)

        found = gathered(gather, lambda: classify(reading))
        spoiled = {} if spoiling is None else corrupted_accuracy(classify, reading, spoiling, gather)
    rows = in_order(found)
    rows |= {
        "shard": reading.shard_of(np.arange(len(rows["keys"]))),
        **reading.names(),
        "classes": np.array(class_names),
    }
    metrics = summarise(rows["ranks"], rows["labels"], len(class_names))
    return EvalResult(metrics | robustness(metrics["top1"], spoiled), rows)


def summarise(ranks: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], classes: int) -> dict[str, float]:
    """The figures of a classification from the rank of each true class."""
    samples = len(ranks)
    return {
        "top1": float(np.mean(ranks < 1)),
        "top5": float(np.mean(ranks < 5)),
        "per_class_mean": per_class_mean(ranks < 1, labels),
        "chance": 1.0 / classes,
        "chance_top5": min(1.0, 5.0 / classes),
        "majority": float(np.bincount(labels).max() / samples),
        "samples": float(samples),
        "classes": float(classes),
    }


def class_embeddings(
    model: Encoder,
    tokenizer: Tokenizer,
    class_names: Sequence[str],
    templates: Sequence[str],
    device: torch.device,
    batch: int = 256,
) -> Tensor:
    """Mean over templates of the normalised prompt embeddings, normalised again: `(C, D)` float32."""
    if not class_names:  # a rank may have none
        return torch.empty(0, 0, device=device)
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    encoded = encode_texts(model, tokenizer, prompts, device, batch)
    return normalize(encoded.view(len(class_names), len(templates), -1).mean(1), dim=-1)


def check_classes(names: Sequence[str]) -> None:
    """Raise ConfigError for no class, a blank line, or a name given twice (its two classes could not be told apart)."""
    if not names:
        raise ConfigError("the file of classes is empty: it needs one class name a line")
    if "" in names:
        raise ConfigError(f"line {list(names).index('') + 1} of the classes is blank; remove it, labels count lines")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        lines = [i + 1 for i, name in enumerate(names) if name == twice[0]]
        more = f" (and {len(twice) - 1} other names)" if len(twice) > 1 else ""
        raise ConfigError(
            f"class {twice[0]!r} is on lines {', '.join(map(str, lines))} of the classes{more}: two classes with one "
            "name have one prompt; rename or merge them"
        )


def check_templates(templates: Sequence[str]) -> None:
    """Raise ConfigError for no template or one without a place for the class name."""
    if not templates:
        raise ConfigError('there is no template; the plainest is "{}"')
    for template in templates:
        if "{}" not in template:
            raise ConfigError(f"template {template!r} has no {{}} where the class name goes")


def label_index(label: int | str, index_of: dict[str, int], where: str) -> int:
    """A class's index from its name, or from its index; a number is always an index.

    Raises DataError naming the label, the sample (`where`) and the nearest class.
    """
    if isinstance(label, int):
        if 0 <= label < len(index_of):
            return label
        raise DataError(f"{where}: label {label} is not among the {len(index_of)} classes, numbered from 0")
    if label in index_of:
        return index_of[label]
    near = difflib.get_close_matches(label, index_of, n=1)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    raise DataError(
        f"{where}: label {label!r} is not among the {len(index_of)} classes{hint}. It must be a line of "
        "`classes`, or a line's number counted from 0; does `label` name the right member?"
    )


def _classify(
    loaded: Loaded,
    reading: Reading,
    class_names: Sequence[str],
    classes: Tensor,
    scale: float,
    device: torch.device,
) -> Rows:
    """This rank's rows, and where in the whole set each belongs (`number`)."""
    index_of = {name: i for i, name in enumerate(class_names)}
    shown = min(SHOWN, len(class_names))
    parts: list[Rows] = [  # an empty part first: a rank may have no sample at all
        {
            "number": np.empty(0, np.int64),
            "keys": np.empty(0, "U1"),
            "labels": np.empty(0, np.int64),
            "ranks": np.empty(0, np.int64),
            "predictions": np.empty((0, shown), np.int64),
            "similarities": np.empty((0, shown), np.float32),
            "probabilities": np.empty((0, shown), np.float32),
            "true_probability": np.empty(0, np.float32),
        }
    ]
    for pictures in reading.batches(device):
        where = [reading.shards[shard] for shard in reading.shard_of(pictures.numbers)]
        labels = torch.tensor(
            [
                label_index(label, index_of, f"{shard}: sample {key!r}")
                for label, shard, key in zip(pictures.labels, where, pictures.keys, strict=True)
            ],
            device=device,
        )
        features = encode_images(loaded.model, pictures.images)
        with torch.autocast(device.type, enabled=False):
            similarities = features @ classes.T
        probabilities = (scale * similarities).softmax(1)
        values, columns = top(similarities, SHOWN)
        parts.append(
            {
                "number": pictures.numbers,
                "keys": np.array(pictures.keys),
                "labels": labels.cpu().numpy(),
                "ranks": rank_of_label(similarities, labels).cpu().numpy(),
                "predictions": columns.cpu().numpy(),
                "similarities": values.cpu().numpy(),
                "probabilities": probabilities.gather(1, columns).cpu().numpy(),
                "true_probability": probabilities.gather(1, labels[:, None])[:, 0].cpu().numpy(),
            }
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _logit_scale(model: Any) -> float:
    """exp of the model's learned log scale; 1 for one that has none."""
    scale = getattr(model, "logit_scale", None)
    return float(scale.detach().float().exp()) if isinstance(scale, Tensor) else 1.0
