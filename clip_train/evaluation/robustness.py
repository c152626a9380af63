"""How accuracy falls where pictures are spoiled (see `corruptions`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from clip_train.evaluation.corruptions import CORRUPTIONS, Corruption
from clip_train.evaluation.encode import Gather, Rows, gathered
from clip_train.evaluation.reading import Reading


@dataclass(frozen=True)
class Spoiling:
    """Which corruptions a task is measured under."""

    corruptions: Sequence[str]
    severities: Sequence[int]
    seed: int = 0

    @classmethod
    def of(cls, corruptions: str | Sequence[str], severities: Sequence[int], seed: int) -> Spoiling:
        return cls(list(CORRUPTIONS) if corruptions == "all" else list(corruptions), sorted(set(severities)), seed)

    def __len__(self) -> int:
        return len(self.corruptions) * len(self.severities)


def corrupted_accuracy(
    classify: Callable[[Reading], Rows], reading: Reading, spoiling: Spoiling, gather: Gather
) -> dict[tuple[str, int], float]:
    """Top-1 accuracy of each corruption at each severity. All ranks call it.

    Args:
        classify: this rank's rows of a reading, with `ranks` (0 is right).
    """
    found: dict[tuple[str, int], float] = {}
    for name in spoiling.corruptions:
        for severity in spoiling.severities:
            changed = replace(reading, change=Corruption(name, severity, spoiling.seed))
            parts = gathered(gather, lambda changed=changed: np.asarray(classify(changed)["ranks"]))
            found[name, severity] = float(np.mean(np.concatenate(parts) < 1))
    return found


def robustness(clean: float, accuracy: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """Figures of a task: `corrupted/NAME/SEVERITY`, and

    - `corrupted_top1`: the mean over corruptions of the mean over severities;
    - `relative_robustness`: that divided by the accuracy on clean pictures (left out where this is 0).
    """
    if not accuracy:
        return {}
    figures = {f"corrupted/{name}/{severity}": value for (name, severity), value in accuracy.items()}
    names = dict.fromkeys(name for name, _ in accuracy)
    mean = float(np.mean([np.mean([v for (own, _), v in accuracy.items() if own == name]) for name in names]))
    figures["corrupted_top1"] = mean
    return figures | ({"relative_robustness": mean / clean} if clean else {})
