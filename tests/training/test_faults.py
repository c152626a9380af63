"""Updates that are left out, the budget for them, and spikes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import metrics_of, torchrun
from safetensors.torch import load_file

from clip_train.training.faults import FaultLog, deviation, running_statistics

SCRIPT = Path(__file__).parent / "not_finite.py"
EXACT = ("step", "loss", "grad_norm", "logit_scale", "batch", "skipped")


def log(path: Path | None = None, **changes: Any) -> FaultLog:
    return FaultLog(path, max_skipped_steps=2, window_steps=10, spike_sigmas=8.0, **changes)


def test_one_rank_that_is_not_finite_skips_the_step_on_both_and_resumes_exactly(
    tmp_path: Path, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]
) -> None:
    recipe_tree["checkpoint"] = {"every_steps": 1, "keep_last": 12}
    recipe_tree["evaluation"] = {"tasks": {}}
    recipe, run_dir, again = write_recipe(recipe_tree), tmp_path / "run", tmp_path / "again"
    env = {**os.environ, "BAD_STEPS": "5,9", "BAD_RANK": "1"}
    done = torchrun(2, str(SCRIPT), "train", str(recipe), "--run-dir", str(run_dir), env=env)
    assert done.returncode == 0, done.stderr
    lines = metrics_of(run_dir)
    assert [line["skipped"] for line in lines] == [0] * 4 + [1] * 4 + [2] * 4
    assert lines[4]["loss"] is None
    for kind in ("model", "optimizer"):
        states = [load_file(run_dir / f"checkpoints/step_{step}/{kind}.safetensors") for step in (4, 5, 6)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0]), "the skipped step"
        assert any(not torch.equal(states[1][name], states[2][name]) for name in states[0]), "the one after it"
    events = [json.loads(line) for line in (run_dir / "faults.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [5, 9]
    assert [len(event["keys"]) for event in events] == [8, 8], "keys of both ranks"

    # From after the first skip: the second is counted as in the whole run.
    start = str(run_dir / "checkpoints/step_7")
    done = torchrun(2, str(SCRIPT), "train", str(recipe), "--run-dir", str(again), "--resume", start, env=env)
    assert done.returncode == 0, done.stderr
    for a, b in zip(metrics_of(again), lines[7:], strict=True):
        for key in EXACT:
            assert a[key] == b[key], key


def test_over_the_budget_everything_is_kept(
    tmp_path: Path, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]
) -> None:
    recipe_tree["faults"] = {"max_skipped_steps": 1}
    recipe, run_dir = write_recipe(recipe_tree), tmp_path / "run"
    env = {**os.environ, "BAD_STEPS": "4,6", "BAD_RANK": "0"}
    command = [sys.executable, str(SCRIPT), "train", str(recipe), "--run-dir", str(run_dir)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    folder = run_dir / "failed_step_6"
    assert str(folder) in done.stderr
    assert "faults.max_skipped_steps = 1" in done.stderr
    assert [line["step"] for line in metrics_of(run_dir)] == [1, 2, 3, 4, 5]
    told = json.loads((folder / "rank_0.json").read_text())
    assert told["step"] == 6
    assert len(told["keys"]) == 8
    assert told["loss"] == "nan"
    assert set(told["gradient_norms"].values()) == {"nan"}
    batch = load_file(folder / "rank_0.safetensors")
    assert batch["images"].shape == (8, 3, 16, 16)
    assert int(batch["lengths"].sum()) == batch["ids"].numel()
    assert json.loads((folder / "latest/state.json").read_text())["step"] == 5
    saved = load_file(folder / "latest/model.safetensors")
    assert all(bool(value.isfinite().all()) for value in saved.values()), "the weights before the step"


def test_only_the_window_counts() -> None:
    faults = log()
    assert [faults.skip(step, loss=math.nan, overflow=False, keys=[]) for step in (1, 5, 11, 16)] == [False] * 4
    assert faults.skip(17, loss=math.nan, overflow=False, keys=[]), "11, 16 and 17 are three of ten steps"
    assert faults.counts["skipped"] == 5


def test_overflows_of_the_loss_scale_cost_nothing() -> None:
    faults = log()
    assert not any(faults.skip(step, loss=math.inf, overflow=True, keys=[]) for step in range(16))
    assert faults.counts == {"skipped": 0, "overflows": 16, "spikes": 0}


def test_sigmas_are_those_of_a_normal_distribution() -> None:
    draws = list(np.random.default_rng(0).normal(5.0, 0.5, 20_001))
    assert deviation(7.0, draws) == pytest.approx(4.0, abs=0.1)
    draws[:4000] = [1e6] * 4000  # a fifth of them spikes: a mean would see nothing any more
    assert deviation(7.0, draws) == pytest.approx(3.2, abs=0.6)


def test_spikes_are_the_same_after_a_resume() -> None:
    rng = np.random.default_rng(1)
    losses = [4 - step / 100 + float(rng.normal(0, 0.02)) for step in range(100)]
    losses[60], losses[80] = 9.0, 7.0
    whole, cut = log(), log()
    found = [index for index, loss in enumerate(losses) if whole.observe(loss) is not None]
    assert found == [60, 80]
    for loss in losses[:70]:
        cut.observe(loss)
    resumed = log(kept=json.loads(json.dumps(cut.state())))
    assert [70 + i for i, loss in enumerate(losses[70:]) if resumed.observe(loss) is not None] == [80]
    assert resumed.state() == whole.state()


def test_lines_past_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    first = log(path)
    for step in (3, 8):
        first.skip(step, loss=math.nan, overflow=False, keys=["a"])
    resumed = log(path, step=5)
    resumed.skip(8, loss=math.nan, overflow=False, keys=["a"])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [3, 8]


def test_running_statistics_are_batch_norms() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.LayerNorm(3))
    assert len(running_statistics(model)) == 3


def test_data_that_never_comes_ends_the_run_and_says_where_it_hangs(
    tmp_path: Path, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]
) -> None:
    recipe_tree["faults"] = {"stall_minutes": 0.2}
    recipe_tree["data"]["workers"] = 1
    script = Path(__file__).parent / "hanging.py"
    command = [sys.executable, str(script), "train", str(write_recipe(recipe_tree)), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 75, done.stderr
    assert "rank 0 on" in done.stderr
    assert "in 'data' of step 3" in done.stderr
    assert "next_batch" in done.stderr, "the stack of the main thread"


def test_an_error_that_nobody_foresaw_ends_the_process_though_workers_wait(
    tmp_path: Path, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]
) -> None:
    recipe_tree["data"]["workers"] = 2
    script = Path(__file__).parent / "breaking.py"
    command = [sys.executable, str(script), "train", str(write_recipe(recipe_tree)), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "RuntimeError: something new" in done.stderr
