"""Exact resume, in processes of their own: killed runs end as the uninterrupted one, to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import metrics_of, run_cli
from safetensors.torch import load_file

from clip_train.cli import main

SCRIPT = Path(__file__).parent / "signalled.py"
EXACT = ("step", "loss", "logit_scale", "lr", "grad_norm", "batch")


def numbers(run_dir: Path) -> list[tuple[Any, ...]]:
    return [tuple(line[key] for key in EXACT) for line in metrics_of(run_dir)]


def signalled(recipe: Path, run_dir: Path, step: int, number: signal.Signals, *overrides: str) -> tuple[int, str]:
    """Exit code and output of a run that gets a signal in a step."""
    command = [sys.executable, str(SCRIPT), "train", str(recipe), "--run-dir", str(run_dir)]
    for override in overrides:
        command += ["--set", override]
    env = {**os.environ, "STEP": str(step), "SIGNAL": str(int(number))}
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        timeout=600,
        env=env,
    )
    return done.returncode, done.stdout


def test_kill_and_signals_then_resume_is_the_uninterrupted_run(
    tmp_path: Path, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]
) -> None:
    recipe_tree["training"]["steps"] = 60
    recipe_tree["checkpoint"]["every_steps"] = 5
    recipe_tree["data"]["sources"]["s"]["caption_choice"] = "random"
    recipe_tree["data"]["augment"] = {"crop_scale": [0.5, 1.0], "flip": 0.5}
    recipe = write_recipe(recipe_tree)
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    done = run_cli("train", str(recipe), "--run-dir", str(whole))
    assert done.returncode == 0, done.stdout + done.stderr

    assert signalled(recipe, cut, 12, signal.SIGKILL)[0] == -signal.SIGKILL
    saved = {path.name for path in (cut / "checkpoints").glob("step_*")}
    assert saved, "a checkpoint was there before the kill"

    # Other numbers of workers and threads: the same run.
    code, output = signalled(recipe, cut, 30, signal.SIGTERM, "data.workers=1", "data.threads=2")
    assert code == 143, output
    stopped_at = json.loads((cut / "checkpoints/latest/state.json").read_text())["step"]
    assert stopped_at == 30
    assert f"at step {stopped_at}" in output

    done = run_cli("train", str(recipe), "--run-dir", str(cut), "--resume", "auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"at step {stopped_at}" in done.stdout
    assert numbers(cut) == numbers(whole)
    assert len(numbers(whole)) == 60
    for name in ("model", "optimizer"):
        a, b = (load_file(run / "checkpoints/latest" / f"{name}.safetensors") for run in (whole, cut))
        assert all((a[key] == b[key]).all() for key in a.keys() | b.keys())
    assert json.loads((cut / "eval.json").read_text()) == json.loads((whole / "eval.json").read_text())

    again = run_cli("train", str(recipe), "--run-dir", str(cut))  # nothing left to do
    assert again.returncode == 0
    assert numbers(cut) == numbers(whole)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shards: str) -> tuple[Path, Path]:
    """A recipe file and its finished run of 4 steps."""
    import tomli_w

    folder = tmp_path_factory.mktemp("finished")
    tree = {
        "name": "tiny",
        "data": {"batch_size": 8, "workers": 0, "sources": {"s": {"shards": shards, "image": "png"}}},
        "image": {"kind": "vit", "image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "heads": 2},
        "text": {"width": 16, "layers": 1, "heads": 2},
        "model": {"embed_dim": 8},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "schedule": {"kind": "constant", "warmup_steps": 2},
        "training": {"steps": 4, "precision": "fp32"},
    }
    (folder / "recipe.toml").write_text(tomli_w.dumps(tree))
    done = run_cli("train", str(folder / "recipe.toml"), "--run-dir", str(folder / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "recipe.toml", folder / "run"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=0.5", "optimizer.lr: 0.001 in the checkpoint, 0.5 now"),
        ("data.batch_size=4", "data.batch_size: 8 in the checkpoint, 4 now"),
        ("training.seed=9", "training.seed: 0 in the checkpoint, 9 now"),
        ("text.pool=mean", "text.pool: 'eot' in the checkpoint, 'mean' now"),
        ("training.steps=3", "the checkpoint is at 4"),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused(
    finished: tuple[Path, Path], capfd: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    recipe, run_dir = finished
    assert main(["train", str(recipe), "--run-dir", str(run_dir), "--set", override]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_never_does_not_overwrite(finished: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    recipe, run_dir = finished
    assert main(["train", str(recipe), "--run-dir", str(run_dir), "--resume", "never"]) == 2
    assert "already holds checkpoints" in capfd.readouterr().err


def test_longer_training_is_said_aloud(
    finished: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, run_dir = finished
    arguments = ["--run-dir", str(tmp_path / "longer"), "--resume", str(run_dir), "--set", "training.steps=6"]
    assert main(["train", str(recipe), *arguments]) == 0
    assert "training.steps changes from 4 to 6" in capfd.readouterr().out.replace("\n", " ")
    assert [line["step"] for line in metrics_of(tmp_path / "longer")][-1] == 6


def test_accepted_changes_go_on_with_the_next_sample(
    finished: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another batch size: the samples after the checkpoint's 32, in batches of 4, as `data order` says."""
    recipe, run_dir = finished
    changed = ["--set", "data.batch_size=4", "--set", "training.steps=8"]
    where = ["--run-dir", str(tmp_path / "other"), "--resume", str(run_dir)]
    assert main(["train", str(recipe), *where, *changed]) == 2
    assert (
        "--allow-changed data.batch_size: the run then goes on with step 5 after 32 samples" in capfd.readouterr().err
    )
    assert main(["train", str(recipe), *where, *changed, "--allow-changed", "text"]) == 2
    assert "--allow-changed text: cannot be changed" in capfd.readouterr().err
    assert main(["train", str(recipe), *where, *changed, "--allow-changed", "data.batch_size,optimizer"]) == 0
    assert "step 5 after 32 samples" in capfd.readouterr().out.replace("\n", " ")
    last = metrics_of(tmp_path / "other")[-1]
    assert (last["step"], last["samples"]) == (8, 48)
    assert last["changed"] == {"data.batch_size": [8, 4]}
    state = json.loads((tmp_path / "other/checkpoints/latest/state.json").read_text())
    assert state["changes"] == [{"step": 4, "samples": 32, "changed": {"data.batch_size": [8, 4]}}]

    def order(*arguments: str) -> list[dict[str, str]]:
        capfd.readouterr()
        assert main(["data", "order", str(recipe), *arguments]) == 0
        names, *lines = capfd.readouterr().out.splitlines()
        return [dict(zip(names.split("\t"), line.split("\t"), strict=True)) for line in lines]

    old = order("--steps", "5:6")
    for checkpoint in (run_dir, tmp_path / "other"):  # before the change was made, and after
        new = order("--steps", "5:8", "--set", "data.batch_size=4", "--checkpoint", str(checkpoint))
        assert [row["key"] for row in new] == [row["key"] for row in old]
        assert new[-1]["batch"] == last["batch"]
    # Going on once more needs no flag, and the samples before the change are not counted anew.
    assert (
        main(["train", str(recipe), "--run-dir", str(tmp_path / "other"), *changed, "--set", "training.steps=9"]) == 0
    )
    assert metrics_of(tmp_path / "other")[-1]["samples"] == 52


def test_changed_shards_are_shown(
    finished: tuple[Path, Path], shards: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, run_dir = finished
    fewer = ["--set", f"data.sources.s.shards={shards.replace('..2', '..1')}"]
    arguments = ["train", str(recipe), "--run-dir", str(tmp_path / "run"), "--resume", str(run_dir), *fewer]
    assert main(arguments) == 2
    assert "{0..2}.tar' in the checkpoint" in capfd.readouterr().err
    # The same samples from another place are no change.
    for path in Path(shards).parent.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    moved = ["--set", f"data.sources.s.shards={tmp_path}/*.tar", "--set", "training.steps=5"]
    assert main(["train", str(recipe), "--run-dir", str(tmp_path / "run"), "--resume", str(run_dir), *moved]) == 0
    # Under the same names, fewer samples: what there was and what there is.
    (tmp_path / "train-2.tar").unlink()
    assert main(["train", str(recipe), "--run-dir", str(tmp_path / "run"), *moved]) == 2
    error = capfd.readouterr().err
    assert "{'s': {'shards': 3, 'samples': 60}} in the checkpoint, {'s': {'shards': 2, 'samples': 40}} now" in error
    assert "--allow-changed data.sources:" in error
    assert main(["train", str(recipe), "--run-dir", str(tmp_path / "run"), *moved[:2], "--set", "training.steps=6",
                 "--allow-changed", "data.sources"]) == 0  # fmt: skip
    assert metrics_of(tmp_path / "run")[-1]["samples"] == 48
