"""The budget of bad samples: each is written down, and too many stop the run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from clip_train.errors import DataError

if TYPE_CHECKING:
    from clip_train.data.batch import BadSample  # needs torch, which packing does not

_LEAST_BAD, _LEAST_SEEN = 8, 100  # a share of fewer says nothing


def too_many(bad: int, seen: int, max_fraction: float) -> bool:
    """Whether `bad` of `seen` samples are more than a share allows: judged from 8 bad ones among 100 on, and at once
    where none is allowed.
    """
    enough = max_fraction == 0 or (bad >= _LEAST_BAD and seen >= _LEAST_SEEN)
    return enough and bad > max_fraction * seen


class BadSampleLog:
    """Counts bad samples and writes each once to a file of JSON lines: shard, key, cause.

    Args:
        path: `bad_samples.jsonl`; made with the first bad sample.
        max_fraction: share of bad samples above which `add` raises (after 8 bad ones among 100; 0 allows none).
        write: whether this process writes the file. All count.
    """

    def __init__(self, path: Path, max_fraction: float, *, write: bool) -> None:
        self.path, self.max_fraction, self.write = path, max_fraction, write
        self.bad = self.seen = 0
        self._known: dict[tuple[str, str], str] = {}
        if write and path.is_file():  # a resumed run
            _drop_cut_line(path)
            self._known = _read(path)

    def add(self, skipped: Sequence[BadSample], seen: int) -> None:
        """Count a batch: `seen` good samples, and those that were skipped for them.

        Raises:
            DataError: the budget is spent; names the first causes. Or the file cannot be written.
        """
        self.bad += len(skipped)
        self.seen += seen + len(skipped)
        new = {(bad.shard, bad.key): bad.cause for bad in skipped if (bad.shard, bad.key) not in self._known}
        if new:
            self._known |= new
            if self.write:
                _append(self.path, new)
        if too_many(self.bad, self.seen, self.max_fraction):
            first = "; ".join(f"{shard}: {key}: {cause}" for (shard, key), cause in list(self._known.items())[:3])
            raise DataError(
                f"{self.bad} of {self.seen} samples could not be used, more than data.max_bad_fraction = "
                f"{self.max_fraction:g} allows. First: {first}. All are in {self.path}. Mend the shards, "
                "or raise data.max_bad_fraction if these may be lost."
            )


def _append(path: Path, bad: dict[tuple[str, str], str]) -> None:
    lines = [{"shard": shard, "key": key, "cause": cause} for (shard, key), cause in bad.items()]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode("ascii")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            while data:  # a disk that fills up takes a part
                data = data[file.write(data) :]
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written: {error.strerror}. Free some space, then run again to go on."
        ) from error


def _drop_cut_line(path: Path) -> None:
    """A line that was being written when the run was killed: its sample is met again, and the next line must not
    be glued to it.
    """
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def _read(path: Path) -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    for line in path.read_bytes().splitlines():
        try:
            entry = cast("dict[str, Any]", json.loads(line))
            found[entry["shard"], entry["key"]] = entry["cause"]
        except (ValueError, KeyError, TypeError):
            continue  # nothing of ours
    return found
