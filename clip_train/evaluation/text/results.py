"""What a probe found, and the two files it goes into."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


def write_results(out: Path, encoder: dict[str, Any], results: Sequence[TaskResult]) -> None:
    """`out/text.json` and `out/text.npz`, each whole or not at all.

    Items are in an order that depends on the task alone, so those of two encoders pair up.
    """
    out.mkdir(parents=True, exist_ok=True)
    arrays = {f"{one.name}{suffix}": items.astype(np.float32) for one in results for suffix, items in one.items.items()}
    aside = out / "text.npz.part"
    with aside.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    aside.replace(out / "text.npz")
    content = {"encoder": encoder, "tasks": {one.name: one.as_json() for one in results}}
    aside = out / "text.json.part"
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    aside.replace(out / "text.json")
