from __future__ import annotations

import json
from pathlib import Path

import pytest

from clip_train.data.bad_samples import BadSampleLog
from clip_train.data.batch import BadSample
from clip_train.errors import DataError


def bad(count: int, first: int = 0) -> list[BadSample]:
    return [BadSample("a.tar", f"k{n}", "cut short") for n in range(first, first + count)]


def test_each_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "bad_samples.jsonl"
    log = BadSampleLog(path, 0.5)
    log.add([], 100)
    assert not path.exists()
    log.add(bad(2), 100)
    log.add(bad(3), 100)
    with path.open("a") as file:
        file.write('{"shard": "a.tar", "ke')  # killed while writing
    BadSampleLog(path, 0.5).add(bad(1), 100)  # a resumed run knows them
    lines = path.read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines[:3]] == ["k0", "k1", "k2"]
    assert json.loads(lines[0]) == {"shard": "a.tar", "key": "k0", "cause": "cut short"}
    assert len(lines) == 4


def test_the_budget_stops_the_run_and_names_causes(tmp_path: Path) -> None:
    log = BadSampleLog(tmp_path / "bad.jsonl", 0.01)
    for step in range(10):
        log.add(bad(1, step), 99)  # exactly the budget
    with pytest.raises(DataError, match=r"12 of 1011 .*max_bad_fraction = 0\.01.*a\.tar: k0: cut short"):
        log.add(bad(2, 90), 9)


def test_a_few_bad_ones_at_the_start_do_not() -> None:
    log = BadSampleLog(None, 0.0)
    log.add(bad(7), 20)
    log.add([], 1000)
    with pytest.raises(DataError):
        log.add(bad(1, 50), 1)
