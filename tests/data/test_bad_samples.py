from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from clip_train.data.bad_samples import BadSampleLog
from clip_train.data.batch import BadSample
from clip_train.errors import DataError


def bad(count: int, first: int = 0) -> list[BadSample]:
    return [BadSample("a.tar", f"k{n}", "cut short") for n in range(first, first + count)]


def lines_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "bad_samples.jsonl"
    log = BadSampleLog(path, 0.5, write=True)
    log.add([], 100)
    assert not path.exists()
    log.add(bad(2), 100)
    log.add(bad(3), 100)
    assert [line["key"] for line in lines_of(path)] == ["k0", "k1", "k2"]
    assert lines_of(path)[0] == {"shard": "a.tar", "key": "k0", "cause": "cut short"}
    BadSampleLog(path, 0.5, write=False).add(bad(9), 100)  # of another process
    assert len(lines_of(path)) == 3


@pytest.mark.parametrize("cut", [0, 1, 20, 60])
def test_a_kill_in_the_middle_of_a_line_loses_and_repeats_nothing(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "bad_samples.jsonl"
    BadSampleLog(path, 0.5, write=True).add(bad(3), 100)
    os.truncate(path, path.stat().st_size - cut)
    log = BadSampleLog(path, 0.5, write=True)
    log.add(bad(4), 100)  # the steps after the checkpoint come again
    assert lines_of(path) == [{"shard": "a.tar", "key": f"k{n}", "cause": "cut short"} for n in range(4)]


def test_the_budget_stops_the_run_and_names_causes(tmp_path: Path) -> None:
    log = BadSampleLog(tmp_path / "bad.jsonl", 0.01, write=True)
    for step in range(10):
        log.add(bad(1, step), 99)  # exactly the budget
    message = rf"12 of 1011 .*max_bad_fraction = 0\.01.*a\.tar: k0: cut short.*All are in {tmp_path}/bad\.jsonl"
    with pytest.raises(DataError, match=message):
        log.add(bad(2, 90), 9)


def test_a_few_bad_ones_at_the_start_do_not(tmp_path: Path) -> None:
    log = BadSampleLog(tmp_path / "bad.jsonl", 0.001, write=False)
    log.add(bad(7), 20)
    log.add([], 1000)
    with pytest.raises(DataError):
        log.add(bad(1, 50), 1)


def test_no_bad_sample_at_all(tmp_path: Path) -> None:
    log = BadSampleLog(tmp_path / "bad.jsonl", 0, write=True)
    log.add([], 20)
    with pytest.raises(DataError, match=r"1 of 41 .*max_bad_fraction = 0 allows"):
        log.add(bad(1), 20)
    assert len(lines_of(tmp_path / "bad.jsonl")) == 1


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"bad\.jsonl: cannot be written: No space left.*run again"):
        BadSampleLog(path, 0.5, write=True).add(bad(1), 100)
