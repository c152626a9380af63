"""The commands as a person types them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metrics_of, picture, run_cli
from PIL import Image

from clip_train.cli import main

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
METRICS = ("step", "loss", "logit_scale", "samples_per_second", "data_wait", "grad_norm", "lr", "batch")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Path:
    """A finished run, under torch-free assumptions about its content: only files and names."""
    import tomli_w

    folder = tmp_path_factory.mktemp("cli")
    tree = {
        "name": "tiny",
        "data": {"batch_size": 8, "workers": 0, "sources": {"s": {"shards": shards, "image": "png"}}},
        "image": {"kind": "vit", "image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "heads": 2},
        "text": {"width": 16, "layers": 1, "heads": 2},
        "model": {"embed_dim": 8},
        "optimizer": {"kind": "muon", "lr": 1e-3},
        "schedule": {"kind": "constant_cooldown", "warmup_steps": 2, "cooldown_steps": 2},
        "training": {"steps": 6, "precision": "bf16", "gradient_clip": 1.0, "micro_batch": 4},
        "checkpoint": {"every_steps": 2, "keep_last": 2},
        "logging": {"every_steps": 2, "tensorboard": False},
        "evaluation": {"tasks": {"seen": {"kind": "retrieval", "shards": shards, "image": "png"}}},
    }
    (folder / "recipe.toml").write_text(tomli_w.dumps(tree))
    done = run_cli("train", str(folder / "recipe.toml"), "--run-dir", str(folder / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def test_the_run_folder_has_its_shape(run_dir: Path) -> None:
    for name in ("recipe.toml", "metrics.jsonl", "eval.json", "checkpoints/latest/model.safetensors"):
        assert (run_dir / name).exists(), name
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step_4", "step_6", "latest"}
    lines = metrics_of(run_dir)
    assert [line["step"] for line in lines] == [1, 2, 4, 6]
    assert all(key in line for line in lines for key in METRICS)
    figures = json.loads((run_dir / "eval.json").read_text())
    assert 0 <= figures["retrieval/seen/image_to_text/r@10"] <= 1
    assert all(isinstance(value, float) for value in figures.values())


def test_eval_of_a_run_and_of_a_checkpoint_agree(run_dir: Path, tmp_path: Path) -> None:
    for number, path in enumerate((run_dir, run_dir / "checkpoints" / "step_6")):
        assert main(["eval", str(path), "--out", str(tmp_path / str(number))]) == 0
    first, second = (json.loads((tmp_path / name / "eval.json").read_text()) for name in "01")
    assert first == second
    assert first["retrieval/seen/images"] == 60
    # A checkpoint that lies in no run keeps its figures to itself.
    alone = tmp_path / "deep" / "alone"
    shutil.copytree(run_dir / "checkpoints" / "step_6", alone)
    assert main(["eval", str(alone)]) == 0
    assert json.loads((alone / "eval.json").read_text()) == first
    assert [path.name for path in alone.parent.iterdir()] == ["alone"]


def test_report(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_dir)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert "<html" in (run_dir / "report.html").read_text()


def test_python_interface(run_dir: Path, tmp_path: Path) -> None:
    import clip_train

    (tmp_path / "a.png").write_bytes(picture(0))
    clip = clip_train.load(run_dir)
    image = clip.encode_image(Image.open(tmp_path / "a.png"))
    texts = clip.encode_text(["a red square number 0", "a much longer caption about something else"])
    cosines = image @ texts.T
    assert cosines.shape == (1, 2)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(1))
    torch.testing.assert_close(clip.similarity(Image.open(tmp_path / "a.png"), "a red square number 0"), cosines[:, :1])
    model, preprocess, tokenizer = clip
    pixels = preprocess(Image.open(tmp_path / "a.png"))
    assert pixels.shape == (3, 16, 16)
    torch.testing.assert_close(model.encode_image(pixels[None]), image)
    ids, lengths = tokenizer.encode_batch(["a red square number 0"])
    torch.testing.assert_close(
        model.encode_text(torch.from_numpy(tokenizer.padded(ids, lengths)).long(), torch.from_numpy(lengths)), texts[:1]
    )


def test_unknown_key_exits_with_two_and_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "debug", "--set", "training.stepz=3"]) == 2
    error = capfd.readouterr().err
    assert "training.steps" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("command", [["report"], ["eval"]])
def test_a_folder_that_is_no_run(command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*command, str(tmp_path)]) == 2
    assert str(tmp_path) in capfd.readouterr().err


def test_contradicting_towers_are_refused_before_any_data(
    recipe_tree: dict[str, Any], write_recipe: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe_tree["text"]["pool"] = "cls"
    assert main(["train", str(write_recipe(recipe_tree)), "--run-dir", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert "causal" in error
    assert "cls" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shards": "/nowhere/{0..3}.tar"}, "/nowhere"),
        ({"image": "jpg"}, "png"),
        ({"caption": "json.caption"}, "txt"),
    ],
)
def test_wrong_data_stops_at_once_with_what_there_is(
    recipe_tree: dict[str, Any],
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    change: dict[str, str],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe_tree["data"]["sources"]["s"].update(change)
    assert main(["train", str(write_recipe(recipe_tree)), "--run-dir", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_fp16_needs_a_gpu(
    recipe_tree: dict[str, Any], write_recipe: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    recipe_tree["training"]["precision"] = "fp16"
    assert main(["train", str(write_recipe(recipe_tree)), "--run-dir", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert "bf16" in error


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_can_be_estimated(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", str(path), "--devices", "8"]) == 0
    table = capsys.readouterr().out
    assert "parameters" in table
    assert "GiB" in table


def test_estimate_of_a_language_model() -> None:
    """Twice as many of 20 tokens masked: 3 more rows of the head's product with the embeddings."""
    from clip_train.config import load_recipe
    from clip_train.estimate import estimate

    less, more = (
        estimate(load_recipe("text-mlm", [f"loss.rate={rate}"]), devices=1, peak_flops=1e12, mfu=0.5, tokens=22)
        for rate in (0.15, 0.30)
    )
    width = load_recipe("text-mlm").text.width
    assert more.text_flops - less.text_flops == pytest.approx(3 * 2 * 49_152 * width)
    assert less.training_flops == 3 * less.text_flops
    assert less.image_parameters == less.image_flops == 0


def test_estimate_of_the_papers_model() -> None:
    """151.3 M parameters less the smaller vocabulary and cap; 14.78 GFLOPs at 77 tokens; days by hand."""
    from clip_train.config import load_recipe
    from clip_train.estimate import estimate

    cost = estimate(load_recipe("vit-b-32"), devices=8, peak_flops=1e15, mfu=0.4, tokens=77)
    assert cost.parameters == 151_277_313 - (49_408 - 49_152) * 512 - (77 - 76) * 512
    assert cost.image_flops + cost.text_flops == pytest.approx(14.78e9, rel=0.01)
    by_hand = 3 * 14.78e9 * 390_625 * 32_768 / (8 * 1e15 * 0.4) / 86_400
    assert cost.days == pytest.approx(by_hand, rel=0.01)


def test_schema_names_every_scripted_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"training", "data", "optimizer", "checkpoint", "text"} <= schema["properties"].keys()


def test_help_needs_no_torch() -> None:
    import subprocess
    import sys

    script = """
import sys
from clip_train.cli import main
try:
    main(["--help"])
except SystemExit:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("False"), done.stdout + done.stderr


def test_trackers_write_beside_the_run(
    recipe_tree: dict[str, Any], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe_tree["logging"] |= {"wandb_project": "demo", "tensorboard": True}
    recipe_tree["evaluation"] = {}
    done = run_cli(
        "train", str(write_recipe(recipe_tree)), "--run-dir", str(tmp_path / "run"), env={"WANDB_MODE": "offline"}
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("run/wandb/offline-run-*"))
    assert list(tmp_path.glob("run/**/events.out.tfevents.*"))
