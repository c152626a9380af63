"""Experiment 3 on one encoder: likelihoods of real test pictures, and an independent judge's verdict on generated ones.

Shapes: `N` test pictures, `J` of them whose captions hold a word the judge knows, `L` codes of a picture.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clip_train.errors import DataError
from clip_train.evaluation.text.results import TaskResult
from clip_train.evaluation.text_to_image.classifier import rank_scores, recall_at, targets_of
from clip_train.evaluation.text_to_image.colours import ASKED, CAPTIONS, colour_scores
from clip_train.evaluation.text_to_image.generator import Generator, Part
from clip_train.evaluation.text_to_image.grid import picture_grid
from clip_train.evaluation.text_to_image.pictures import fold, share
from clip_train.evaluation.text_to_image.prefix import Fit, fit_prefix

GRID = (
    "red heart", "blue heart", "green circle", "yellow star", "grinning face", "cat face", "flag of France", "clock",
    "blue car", "house", "tree", "person running",
)  # fmt: skip
"""Captions of the picture grid."""
OF_EACH = 3
"""Pictures of a caption in the grid."""
BUDGETS = {
    "full": {"texts": 4000, "dev": 256, "test": 900, "judged": 480, "steps": 60, "of_each": 2},
    "small": {"texts": 1500, "dev": 96, "test": 250, "judged": 120, "steps": 20, "of_each": 1},
}
"""Pictures that the map is fitted to, chosen on and measured on, steps of its fit, pictures of a colour caption."""


class Encoder(Protocol):
    """What is asked of an encoder; every `TextEncoder` has it."""

    @property
    def name(self) -> str: ...
    def features(self, texts: Sequence[str], /) -> dict[str, NDArray[np.float32]]: ...


def exp3(
    encoder: Encoder, generator: Generator, *, budget: str = "full", grid: Path | None = None, seed: int = 0
) -> list[TaskResult]:
    """Fit the encoder's prefix and score it.

    Args:
        budget: a key of `BUDGETS`; figures compare within one budget and one generator.
        grid: write a PNG of generated pictures there.

    Returns:
        exp3/nll (bits a code, less is better), exp3/gain (bits that the caption saves), exp3/caption (bits that the
        right caption saves against another's), exp3/concept (rank score of the judge), exp3/recall (at 10), each also
        of test names that `pictures.fold` holds out of any training (`_held`), and of all others (`_seen`), which were
        trained on where the training pictures have them; exp3/colour (of `CAPTIONS`).
        `exp3/nll` also holds the codes of the grid, as `exp3/nll:grid`.

    Raises:
        DataError: a budget that does not exist; features that say nothing.
    """
    started, sizes = time.perf_counter(), _sizes(budget)
    train, dev = _some(generator.train, sizes["texts"]), _some(generator.dev, sizes["dev"])
    rows = _rows(generator.test, sizes["test"])
    test, free = generator.test.where(rows), generator.unconditional[rows]
    found = encoder.features(asked_of(generator, budget))
    cuts = np.cumsum([len(train), len(dev), len(test), len(GRID)])
    parts = {pool: np.split(vectors.astype(np.float32), cuts) for pool, vectors in found.items()}
    fit = fit_prefix(
        generator, train, dev, {pool: (one[0], one[1]) for pool, one in parts.items()}, steps=sizes["steps"], seed=seed
    )
    offset, grid_offset, colours = (fit.prefix(part) for part in parts[fit.pool][2:])
    right = generator.model.bits_of(test.codes, offset)
    other = generator.model.bits_of(test.codes, offset[torch.tensor(others(test.texts))])
    judged, concept, recall = judge(generator, test, offset, sizes["judged"], seed)
    painted = _sample(generator, colours.repeat_interleave(sizes["of_each"], 0), seed)
    right_colour = colour_scores(generator.codebook.decode(painted), sizes["of_each"]).numpy()
    codes = draw_grid(generator, grid_offset, encoder.name, grid, seed)
    seconds = time.perf_counter() - started

    everything = list(range(len(test)))
    results: list[TaskResult] = []
    for name, metric, items, of, chance in (
        ("nll", "bits", right.numpy(), everything, free.numpy()),
        ("gain", "bits saved", (free - right).numpy(), everything, None),
        ("caption", "bits saved", (other - right).numpy(), everything, None),
        ("concept", "rank", concept, judged, np.full(len(judged), 0.5)),
        ("recall", "recall@10", recall, judged, np.full(len(judged), min(1.0, 10 / len(generator.attributes)))),
    ):
        held = np.array([fold(test.captions[row][0]) == "held" for row in of])
        for suffix, mask in (("", held | True), ("_seen", ~held), ("_held", held)):
            if mask.any():
                expected = 0.0 if chance is None else float(chance[mask].mean())
                results.append(_result(f"exp3/{name}{suffix}", metric, items[mask], expected, fit, seconds))
    results.append(_result("exp3/colour", "accuracy", right_colour, 1 / len(ASKED), fit, seconds))
    results[0].items[":grid"] = codes.numpy()
    results[0].more.update(_about(generator, fit, budget))
    return results


def asked_of(generator: Generator, budget: str) -> list[str]:
    """The texts that an encoder is asked for: of the pictures to fit to, choose on and measure on, `GRID`, `CAPTIONS`.

    Raises DataError for a budget that does not exist.
    """
    sizes = _sizes(budget)
    parts = ((generator.train, "texts"), (generator.dev, "dev"), (generator.test, "test"))
    return [*(text for part, most in parts for text in _some(part, sizes[most]).texts), *GRID, *CAPTIONS]


def _sizes(budget: str) -> dict[str, int]:
    if budget not in BUDGETS:
        raise DataError(f"budget {budget!r} is unknown: choose {' or '.join(BUDGETS)}")
    return BUDGETS[budget]


def _result(name: str, metric: str, items: NDArray[Any], chance: float, fit: Fit, seconds: float) -> TaskResult:
    items = items.astype(np.float32)
    return TaskResult(
        name, metric, float(items.mean()), chance, fit.pool, len(items), seconds, {"": items},
        {"less_is_better": True} if metric == "bits" else {},
    )  # fmt: skip


def _about(generator: Generator, fit: Fit, budget: str) -> dict[str, Any]:
    return {
        "generator": generator.fingerprint, "budget": budget, "bounds": generator.about["figures"],
        "dev_bits": fit.dev_bits, "tuned_bits": fit.tuned_bits, "kept_step": fit.kept_step, "penalty": fit.penalty,
    }  # fmt: skip


def judge(
    generator: Generator, test: Part, offset: Tensor, most: int, seed: int
) -> tuple[list[int], NDArray[np.float32], NDArray[np.float32]]:
    """Generate a picture a caption; rows that were judged, their rank scores and their recall at 10."""
    targets = targets_of(test.captions, generator.attributes)
    rows = [row for row, wanted in enumerate(targets.tolist()) if any(wanted) and not all(wanted)]
    rows = [rows[place] for place in _rows(test.where(rows), most)]
    if not rows:
        raise DataError("no test caption holds a word that the judge knows")
    pictures = generator.codebook.decode(_sample(generator, offset[rows], seed))
    evidence = generator.classifier.evidence(pictures)
    return rows, rank_scores(evidence, targets[rows]), recall_at(evidence, targets[rows])


def draw_grid(generator: Generator, offset: Tensor, name: str, path: Path | None, seed: int) -> Tensor:
    """Codes `(captions * OF_EACH, L)` of the grid; with a `path`, the PNG too."""
    codes = _sample(generator, offset.repeat_interleave(OF_EACH, 0), seed)
    if path is not None:
        picture_grid(GRID, {name: generator.codebook.decode(codes)}, path)
    return codes


def read_grid(path: Path, generator: Generator) -> NDArray[np.int64]:
    """The grid's codes of a run that was probed: `path` holds `text.npz`, or `probe/text.npz`.

    Raises:
        DataError: it was not probed, or with another generator.
    """
    folder = next((one for one in (path, path / "probe") if (one / "text.npz").is_file()), None)
    how = "probe it with `clip-train probe RUN --suite text --generator DIR`"
    if folder is None:
        raise DataError(f"{path}: no text.npz here nor in probe/: {how}")
    with np.load(folder / "text.npz", allow_pickle=False) as arrays:
        if "exp3/nll:grid" not in arrays:
            raise DataError(f"{folder / 'text.npz'}: holds no experiment 3: {how}")
        codes = arrays["exp3/nll:grid"].astype(np.int64)
    about = json.loads((folder / "text.json").read_text(encoding="utf-8"))["tasks"]["exp3/nll"]
    if about["generator"] != generator.fingerprint:
        raise DataError(
            f"{folder}: was probed with generator {about['generator']}, not {generator.fingerprint}: probe it again"
        )
    return codes


def others(texts: Sequence[str]) -> list[int]:
    """For each text the place of another one, the same for every encoder: halfway round in the order of their hashes.

    Where that text is the same, the next that is not.
    """
    order = sorted(range(len(texts)), key=lambda row: (share(f"other {row} {texts[row]}"), row))
    found = [0] * len(texts)
    for place, row in enumerate(order):
        ahead = len(order) // 2
        while ahead < len(order) - 1 and texts[order[(place + ahead) % len(order)]] == texts[row]:
            ahead += 1
        found[row] = order[(place + ahead) % len(order)]
    return found


def _sample(generator: Generator, offset: Tensor, seed: int) -> Tensor:
    settings = generator.about["settings"]
    return generator.model.sample(
        offset, len(offset), guidance=settings["guidance"], temperature=settings["temperature"], seed=seed
    )


def _rows(part: Part, most: int) -> list[int]:
    """Places of at most `most` pictures, those whose key's hash is smallest, in the part's order."""
    return sorted(sorted(range(len(part)), key=lambda row: (share("chosen " + part.keys[row]), row))[:most])


def _some(part: Part, most: int) -> Part:
    return part.where(_rows(part, most))
