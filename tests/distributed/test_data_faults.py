"""One process fails, and the others neither wait for it nor go on with something else."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import add_member, caption, metrics_of, picture, torchrun

FAULTS = Path(__file__).parent / "faults.py"


@pytest.fixture
def run_faulty(
    tmp_path: Path, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, Path]]:
    def run(fault: str, **data: object) -> tuple[str, Path]:
        recipe_tree["data"] |= data
        recipe_tree["evaluation"] = {}
        monkeypatch.setenv("FAULT", fault)
        monkeypatch.setenv("FOLDER", str(tmp_path))
        recipe, run_dir = write_recipe(recipe_tree), tmp_path / "run"
        done = torchrun(2, str(FAULTS), "train", str(recipe), "--run-dir", str(run_dir))
        assert done.returncode == 1, done.stderr  # torchrun's own code where a process failed
        return done.stderr, run_dir

    return run


def shards_of(rank: int, folder: Path, missing: bool) -> None:
    (folder / f"rank{rank}").mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"rank{rank}" / f"{shard}.tar", "w") as tar:
            for number in range(10 * shard, 10 * shard + 10 - (missing and shard == 1)):
                add_member(tar, f"s{number}.png", picture(number))
                add_member(tar, f"s{number}.txt", caption(number).encode())


def test_processes_that_see_other_shards_do_not_train(tmp_path: Path, run_faulty: Callable[..., Any]) -> None:
    for rank in range(2):
        shards_of(rank, tmp_path, missing=rank == 1)
    error, run_dir = run_faulty("other shards")
    assert "process 1 sees other shards than process 0" in error
    assert not (run_dir / "metrics.jsonl").exists()


def test_shards_that_one_process_cannot_find(tmp_path: Path, run_faulty: Callable[..., Any]) -> None:
    shards_of(0, tmp_path, missing=False)
    error, _ = run_faulty("other shards")
    assert "process 1 cannot read its data: shards" in error  # what process 0 says
    assert "rank1/*.tar' names no file" in error
    assert "clip_train/cli.py" not in error  # no traceback but torchrun's own


@pytest.mark.parametrize(
    ("fault", "message"),
    [("read", "another process could not read its data: x.tar"), ("worker", "a loader worker was killed")],
)
def test_a_failure_in_one_process_stops_all_at_the_same_step(
    run_faulty: Callable[..., Any], fault: str, message: str
) -> None:
    error, run_dir = run_faulty(fault, workers=int(fault == "worker"))
    assert message in error
    assert metrics_of(run_dir)[-1]["step"] >= 3
