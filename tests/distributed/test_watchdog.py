"""A process that is stopped or killed is named by the other, which then ends; and who is behind whom."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from processes import free_port, has_step, started, wait_until

from clip_train.runtime.watchdog import Report, behind


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
def test_the_other_process_is_named(
    number: signal.Signals, tmp_path: Path, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]
) -> None:
    recipe_tree["training"]["steps"] = 1_000_000
    recipe_tree["evaluation"] = {"tasks": {}}
    recipe_tree["faults"] = {"stall_minutes": 0.2}
    run_dir, logs = tmp_path / "run", [tmp_path / "log_0", tmp_path / "log_1"]
    command = [sys.executable, "-m", "clip_train", "train", str(write_recipe(recipe_tree)), "--run-dir", str(run_dir)]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(started(command, logs[rank], {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
            for rank in range(2)
        )
        wait_until(has_step(run_dir, 5), "step 5", logs[0])
        os.kill(second.pid, number)
        assert first.wait(240) == 75, logs[0].read_text()
    said = logs[0].read_text()
    assert "rank 1 on" in said
    assert f"(pid {second.pid})" in said
    assert "rank 0 on" not in said
    assert "no sign of life" in said
    if number == signal.SIGSTOP:
        assert "faults.stall_minutes = 0.2" in said


def report(rank: int, phase: str, step: int) -> Report:
    return Report(rank, "host", 1, phase, step, 60.0, 1)


def test_whoever_is_in_an_earlier_phase_is_behind() -> None:
    assert behind([report(0, "agree", 7), report(1, "data", 7), report(2, "agree", 7)]) == [report(1, "data", 7)]
    assert behind([report(0, "data", 8), report(1, "save", 7)]) == [report(1, "save", 7)]
    both = [report(0, "update", 7), report(1, "update", 7)]
    assert behind(both) == both
