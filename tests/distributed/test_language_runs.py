"""Runs of text alone: the same on two processes as on one, cut or not, in micro-batches or whole."""

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from conftest import add_member, caption, metrics_of, torchrun
from safetensors.torch import load_file

from clip_train.cli import main
from tokenizer import BPETokenizer
from tokenizer.vocabulary import own_vocabulary

RUNS = Path(__file__).parent / "language_runs.py"
MICRO, FSDP, CLM = "training.micro_batch=3", "training.parallel.kind=fsdp", "loss.kind=clm"
CAUSAL = ("text.attention=causal", CLM)
STEPS = 6
JOBS = {
    "ddp": (),
    "ddp_micro": (MICRO,),
    "fsdp_micro": (FSDP, MICRO),
    "clm_fsdp": (*CAUSAL, FSDP, MICRO),
}
"""On two processes."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mlm` and `clm` on one process, JOBS on two; shards that hold texts alone."""
    folder = tmp_path_factory.mktemp("language")
    with tarfile.open(folder / "texts.tar", "w") as tar:
        for number in range(40):
            text = f"{caption(number)} {'and more ' * (number % 5)}"
            add_member(tar, f"s{number:03}.txt", text.encode())
    BPETokenizer(own_vocabulary(())).save(folder / "bytes.json")
    tree: dict[str, Any] = {
        "name": "tiny",
        "tokenizer": {"path": f"{folder}/bytes.json"},
        "data": {"batch_size": 8, "workers": 0, "sources": {"s": {"shards": f"{folder}/texts.tar"}}},
        "text": {"width": 16, "layers": 2, "heads": 2, "attention": "bidirectional", "pool": "mean"},
        "loss": {"kind": "mlm", "whole_words": True},
        "optimizer": {"kind": "adamw", "lr": 1e-2},
        "schedule": {"kind": "cosine", "warmup_steps": 2},
        "training": {"steps": STEPS, "precision": "fp32", "gradient_clip": 0.5},
        "checkpoint": {"every_steps": 2},
        "evaluation": {"tasks": {"seen": {"kind": "language", "shards": f"{folder}/texts.tar"}}},
        "logging": {"every_steps": 1},
    }
    recipe = folder / "recipe.toml"
    recipe.write_text(tomli_w.dumps(tree))
    for name, overrides in (("mlm", ()), ("clm", CAUSAL)):
        sets = [part for one in overrides for part in ("--set", one)]
        assert main(["train", str(recipe), "--run-dir", str(folder / name), *sets]) == 0
    jobs = folder / "jobs"
    jobs.write_text("".join(f"{folder / name} {' '.join(overrides)}\n" for name, overrides in JOBS.items()))
    done = torchrun(2, str(RUNS), str(recipe), str(jobs))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_train_the_run_of_one(runs: Path, name: str) -> None:
    one, two = (metrics_of(runs / run) for run in ("clm" if "clm" in name else "mlm", name))
    assert len(one) == STEPS
    for ours, theirs in zip(two, one, strict=True):
        assert ours["batch"] == theirs["batch"]
        assert "logit_scale" not in ours
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=1e-6)
        # From the second step on Adam makes much of roundings of small gradients; a norm is one long sum.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6 if ours["step"] == 1 else 1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert one[-1]["loss"] < one[0]["loss"]


@pytest.mark.parametrize("name", ["mlm", "clm"])
def test_cut_anywhere_a_run_goes_on_exactly(runs: Path, name: str, tmp_path: Path) -> None:
    start = str(runs / name / "checkpoints/step_2")
    sets = [part for one in (CAUSAL if name == "clm" else ()) for part in ("--set", one)]
    command = ["train", str(runs / "recipe.toml"), "--run-dir", str(tmp_path / "cut"), "--resume", start, *sets]
    assert main(command) == 0
    exact = ("step", "loss", "accuracy", "lr", "grad_norm", "batch")
    cut, whole = (
        [tuple(line[key] for key in exact) for line in metrics_of(folder)] for folder in (tmp_path / "cut", runs / name)
    )
    assert cut == whole[2:]
    ours, theirs = (
        load_file(folder / "checkpoints/latest/model.safetensors") for folder in (tmp_path / "cut", runs / name)
    )
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_micro_batches_change_nothing(runs: Path, tmp_path: Path) -> None:
    command = ["train", str(runs / "recipe.toml"), "--run-dir", str(tmp_path), "--set", MICRO]
    assert main(command) == 0
    for ours, theirs in zip(metrics_of(tmp_path), metrics_of(runs / "mlm"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6 if ours["step"] == 1 else 1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_a_language_model_has_a_report_and_no_pictures(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(runs / "mlm"), "--out", str(runs / "eval")]) == 0
    figures = json.loads((runs / "eval/eval.json").read_text())
    assert figures == pytest.approx(json.loads((runs / "mlm/eval.json").read_text()))
    assert figures["language/seen/texts"] == 40
    assert figures["language/seen/perplexity"] == pytest.approx(math.exp(figures["language/seen/loss"]))
    two = json.loads((runs / "ddp/eval.json").read_text())
    assert two["language/seen/targets"] == figures["language/seen/targets"]
    assert two["language/seen/loss"] == pytest.approx(figures["language/seen/loss"], rel=1e-3)
    assert main(["report", str(runs / "mlm")]) == 0
    assert (runs / "mlm/report.html").stat().st_size > 1000
    assert main(["export", str(runs / "mlm"), "--to", "open_clip", str(runs / "export")]) == 2
    assert "takes no pictures" in " ".join(capsys.readouterr().err.split())
