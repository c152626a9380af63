"""What a probe found, and the two files it goes into."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class TaskResult:
    """One figure with what it was made from."""

    name: str
    """`exp1/topic`."""
    metric: str
    value: float
    chance: float
    """What knowing nothing gets: the most frequent class of training, 0.5 of an AUC, 0 of a correlation."""
    pool: str
    """The one that was best on dev."""
    n: int
    seconds: float
    items: dict[str, Array]
    """By suffix, `(n,)`: "" for scores whose mean is the value; ":score" and ":label" where it is no mean. Scores of
    what was fine-tuned are `(S, n)`, a line a seed."""
    more: dict[str, Any] = field(default_factory=dict[str, Any])
    """`bag_of_words`, `dev`, and others."""

    def as_json(self) -> dict[str, Any]:
        figures = {
            "metric": self.metric, "value": self.value, "chance": self.chance, "pool": self.pool, "n": self.n,
            "seconds": round(self.seconds, 3),
        }  # fmt: skip
        return figures | self.more


def write_results(out: Path, encoder: Mapping[str, Any], results: Sequence[TaskResult]) -> str:
    """`out/text.json` and `out/text.npz`, each whole or not at all.

    Tasks that are there already of the same encoder (its path, step and weights) stay beside those of `results`. Items
    are in an order that depends on the task alone, so those of two encoders pair up.

    Returns:
        What was there and is gone, being of another encoder: for a message, else empty.
    """
    out.mkdir(parents=True, exist_ok=True)
    kept, arrays, gone = _kept(out, encoder, results)
    arrays |= {
        f"{one.name}{suffix}": items.astype(np.float32) for one in results for suffix, items in one.items.items()
    }
    aside = out / "text.npz.part"
    with aside.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    aside.replace(out / "text.npz")
    content = {"encoder": dict(encoder), "tasks": kept | {one.name: one.as_json() for one in results}}
    aside = out / "text.json.part"
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    aside.replace(out / "text.json")
    return gone


def _kept(
    out: Path, encoder: Mapping[str, Any], results: Sequence[TaskResult]
) -> tuple[dict[str, Any], dict[str, Array], str]:
    """Tasks of the same encoder that are not in `results`, their items, and what else was there."""
    if not (out / "text.json").exists():
        return {}, {}, ""
    try:
        known = json.loads((out / "text.json").read_text(encoding="utf-8"))
        about, tasks = dict(known["encoder"]), dict(known["tasks"])
        with np.load(out / "text.npz", allow_pickle=False) as file:
            arrays: dict[str, Array] = {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, TypeError, BadZipFile):
        return {}, {}, "what could not be read"
    if any(about.get(key) != encoder.get(key) for key in ("path", "step", "weights")):
        gone = f"{about.get('path')}, step {about.get('step', 'unknown')}, weights {about.get('weights')}"
        return {}, {}, f"the figures of {gone}"
    new = {one.name for one in results}
    # Which figures experiment 3 has depends on the generator: another one's must not stay beside the new.
    drawn = any(name.startswith("exp3/") for name in new)
    stay = {name for name in tasks if name not in new and not (drawn and name.startswith("exp3/"))}
    return (
        {name: tasks[name] for name in tasks if name in stay},
        {name: array for name, array in arrays.items() if name.partition(":")[0] in stay},
        "",
    )
