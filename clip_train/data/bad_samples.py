"""The budget of bad samples: each is written down, and too many stop the run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from clip_train.data.batch import BadSample
from clip_train.errors import DataError

_LEAST_BAD, _LEAST_SEEN = 8, 100  # a share of fewer says nothing


class BadSampleLog:
    """Counts bad samples and writes each once to a file of JSON lines: shard, key, cause.

    Args:
        path: `bad_samples.jsonl`; made with the first bad sample. None only counts (on all ranks but one).
        max_fraction: share of bad samples above which `add` raises (after 8 bad ones among 100).
    """

    def __init__(self, path: Path | None, max_fraction: float) -> None:
        self.path, self.max_fraction = path, max_fraction
        self.bad = self.seen = 0
        self._known: dict[tuple[str, str], str] = {}
        if path is not None and path.exists():  # a resumed run
            self._known = dict(_read(path))

    def add(self, skipped: Sequence[BadSample], seen: int) -> None:
        """Count a batch: `seen` good samples, and those that were skipped for them.

        Raises:
            DataError: the budget is spent; names the first causes.
        """
        self.bad += len(skipped)
        self.seen += seen + len(skipped)
        new = {(bad.shard, bad.key): bad.cause for bad in skipped if (bad.shard, bad.key) not in self._known}
        if new:
            self._known |= new
            if self.path is not None:
                _append(self.path, new)
        if self.bad >= _LEAST_BAD and self.seen >= _LEAST_SEEN and self.bad > self.max_fraction * self.seen:
            first = "; ".join(f"{shard}: {key}: {cause}" for (shard, key), cause in list(self._known.items())[:3])
            raise DataError(
                f"{self.bad} of {self.seen} samples could not be used, more than data.max_bad_fraction = "
                f"{self.max_fraction:g} allows. First: {first}. All are in bad_samples.jsonl. Mend the shards, "
                "or raise data.max_bad_fraction if these may be lost."
            )


def _append(path: Path, bad: dict[tuple[str, str], str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for (shard, key), cause in bad.items():
            file.write(json.dumps({"shard": shard, "key": key, "cause": cause}) + "\n")


def _read(path: Path) -> Iterator[tuple[tuple[str, str], str]]:
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # a line that was being written when the run was killed
            continue
        yield (entry["shard"], entry["key"]), entry["cause"]
