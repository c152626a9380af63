"""FSDP2 runs: trained, evaluated, saved in shards, and gone on with in other numbers and kinds of processes."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import add_member, metrics_of, picture, torchrun
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

import clip_train
from clip_train.cli import main
from clip_train.errors import CheckpointError
from clip_train.training.checkpoint import read_checkpoint

RUNS = Path(__file__).parent / "sharded_runs.py"
FSDP = "training.parallel.kind=fsdp"
LION = "optimizer={kind='lion',lr=1e-3}"
EXACT = ("step", "loss", "logit_scale", "lr", "grad_norm", "batch")


def numbers(run_dir: Path) -> list[tuple[Any, ...]]:
    return [tuple(line[key] for key in EXACT) for line in metrics_of(run_dir)]


def assert_same_run(run_dir: Path, whole: Path) -> None:
    """The lines of a run that went on are those of the whole one, up to the rounding of other sums."""
    expected = {line["step"]: line for line in metrics_of(whole)}
    for line in metrics_of(run_dir):
        assert line["batch"] == expected[line["step"]]["batch"]
        for key in ("loss", "grad_norm", "logit_scale"):
            assert line[key] == pytest.approx(expected[line["step"]][key], rel=1e-4), (key, line["step"])
    assert metrics_of(run_dir)[-1]["step"] == 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Path:
    """`one`, one process; `four`, FSDP on four; runs on two processes that go on from it: see below."""
    import tomli_w

    folder = tmp_path_factory.mktemp("runs")
    with tarfile.open(folder / "few.tar", "w") as tar:  # 5 for 4 processes: one of them has a batch more
        for number in range(5):
            add_member(tar, f"s{number}.png", picture(number))
            add_member(tar, f"s{number}.txt", f"number {number}".encode())
    tree = {
        "name": "tiny",
        "data": {"batch_size": 8, "workers": 0, "sources": {"s": {"shards": shards, "image": "png"}}},
        "image": {"kind": "vit", "image_size": 16, "patch_size": 8, "width": 18, "layers": 2, "heads": 2},
        "text": {"width": 16, "layers": 1, "heads": 2},
        "model": {"embed_dim": 6},  # four processes cannot share it equally
        "optimizer": {"kind": "adamw", "lr": 1e-2},
        "schedule": {"kind": "cosine", "warmup_steps": 2},
        "training": {"steps": 12, "precision": "fp32", "gradient_clip": 0.5, "ema": {"decay": 0.9}},
        "checkpoint": {"every_steps": 4},
        "logging": {"every_steps": 1},
    }
    recipe = folder / "recipe.toml"
    recipe.write_text(tomli_w.dumps(tree))
    few = f"evaluation={{batch_size=1, tasks={{few={{kind='retrieval', shards='{folder}/few.tar', image='png'}}}}}}"

    assert main(["train", str(recipe), "--run-dir", str(folder / "one"), "--set", few]) == 0
    done = torchrun(4, "-m", "clip_train", "train", str(recipe), "--run-dir", str(folder / "four"),
                    "--set", FSDP, "--set", few)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert main(["consolidate", str(folder / "four/checkpoints/step_4"), str(folder / "consolidated")]) == 0

    jobs = [
        [folder / "two", folder / "four/checkpoints/step_4", FSDP],
        [folder / "two_from_whole", folder / "consolidated", FSDP],
        [folder / "two_again", folder / "two/checkpoints/step_8", FSDP],
        [folder / "lion", "never", LION],
        [folder / "lion_sharded", "never", LION, FSDP],
        [folder / "replicated", folder / "four/checkpoints/step_8", "training.activation_checkpointing=true"],
    ]
    (folder / "jobs").write_text("\n".join(" ".join(map(str, job)) for job in jobs))
    done = torchrun(2, str(RUNS), str(recipe), str(folder / "jobs"))
    assert done.returncode == 0, done.stderr
    return folder


def test_sharded_training_is_that_of_one_process(runs: Path) -> None:
    assert_same_run(runs / "four", runs / "one")


def test_evaluation_with_unequal_shares(runs: Path) -> None:
    one, four = (json.loads((runs / name / "eval.json").read_text()) for name in ("one", "four"))
    assert four == pytest.approx(one)


def test_going_on_with_other_processes(runs: Path) -> None:
    for name in ("two", "replicated"):
        assert_same_run(runs / name, runs / "one")
    assert [line["step"] for line in metrics_of(runs / "two")] == list(range(5, 13))


def test_lion_takes_shards(runs: Path) -> None:
    assert_same_run(runs / "lion_sharded", runs / "lion")


def test_going_on_is_exact(runs: Path) -> None:
    assert numbers(runs / "two_again") == numbers(runs / "two")[4:]
    assert numbers(runs / "two_from_whole") == numbers(runs / "two"), "from shards or from whole files: the same"


def test_consolidated_is_what_torch_reads_from_the_shards(runs: Path) -> None:
    sharded = runs / "four/checkpoints/step_4"
    assert {path.name for path in (sharded / "model").iterdir()} == {
        f"shard-{rank:05}-of-00004.safetensors" for rank in range(1, 5)
    }
    assert not list(sharded.glob("*.safetensors"))
    for kind in ("model", "optimizer"):
        whole = load_file(runs / "consolidated" / f"{kind}.safetensors")
        again = {name: torch.full_like(tensor, torch.nan) for name, tensor in whole.items()}
        load(again, storage_reader=HuggingFaceStorageReader(str(sharded / kind)), no_dist=True)
        assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert whole.keys() >= {
        "ema/logit_scale",
        "exp_avg/logit_scale",
        "exp_avg_sq/text.token_embedding.weight",
        "step/logit_scale",
    }


def test_a_sharded_checkpoint_loads(runs: Path) -> None:
    a, b = clip_train.load(runs / "four/checkpoints/step_4"), clip_train.load(runs / "consolidated")
    weights = b.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in a.model.state_dict().items())
    assert a.step == b.step == 4


def test_a_process_that_cannot_write_stops_all(runs: Path) -> None:
    for rank in range(2):
        assert "step_4: the checkpoint could not be written ([Errno 28]" in (runs / f"failing.{rank}").read_text()
    assert not list((runs / "failing/checkpoints").iterdir())
    assert 4 < metrics_of(runs / "failing")[-1]["step"] < 9


def test_consolidate_refuses_to_overwrite(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["consolidate", str(runs / "four"), str(runs / "consolidated")]) == 2
    assert "consolidated: exists" in capfd.readouterr().err


def test_a_missing_shard_is_named(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "four/checkpoints/step_4", tmp_path / "step_4")
    (tmp_path / "step_4/optimizer/shard-00003-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer/shard-00003-of-00004\.safetensors missing"):
        read_checkpoint(tmp_path / "step_4")
