"""The moving average of the weights: by hand, through checkpoints, and where it is evaluated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import torchrun
from safetensors.torch import load_file
from torch import Tensor, nn

import clip_train
from clip_train.cli import main
from clip_train.config import load_recipe
from clip_train.errors import CheckpointError, ConfigError
from clip_train.training.average import WeightAverage
from clip_train.training.checkpoint import read_checkpoint

WriteRecipe = Callable[..., Path]


def test_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 10.0)
    average = WeightAverage(model, decay=0.3)
    expected = 10.0
    for step, weight in enumerate((4.0, -2.0, 7.0, 1.0, 5.0), 1):
        nn.init.constant_(model.weight, weight)
        average.update(step)
        kept = (2 / 11, 3 / 12, 0.3, 0.3, 0.3)[step - 1]  # 4 / 13 is above 0.3
        expected = kept * expected + (1 - kept) * weight
        assert float(average.tensors["weight"].detach()) == pytest.approx(expected, rel=1e-6)


def test_takes_the_place_of_the_weights_and_gives_it_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(4))
    average = WeightAverage(model, decay=0.9)
    model(torch.randn(2, 3, 5, 5))  # moves the statistics
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    average.update(3)
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averaged = {name: tensor.clone() for name, tensor in average.tensors.items()}
    with pytest.raises(RuntimeError), average.in_place_of_weights():
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, averaged[name])
            assert not torch.equal(parameter, trained[name])
        assert all(torch.equal(buffer, trained[name]) for name, buffer in model.named_buffers())
        raise RuntimeError("an evaluation that fails")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in average.tensors.items())


def weights_of(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Trained and averaged, from the files."""
    found = load_file(checkpoint / "optimizer.safetensors")
    averaged = {name.removeprefix("ema/"): tensor for name, tensor in found.items() if name.startswith("ema/")}
    return load_file(checkpoint / "model.safetensors"), averaged


@pytest.fixture
def recipe(recipe_tree: dict[str, Any], write_recipe: WriteRecipe, shards: str) -> Path:
    recipe_tree["training"] |= {"steps": 5, "ema": {"decay": 0.6}}
    recipe_tree["checkpoint"] = {"every_steps": 1, "keep_last": 10}
    task = {"kind": "retrieval", "shards": shards, "image": "png"}
    recipe_tree["evaluation"] = {"weights": "ema", "tasks": {"pairs": task}}
    return write_recipe(recipe_tree)


def test_a_run_keeps_resumes_and_evaluates_it(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", str(recipe), "--run-dir", str(run)]) == 0
    checkpoints = run / "checkpoints"

    _, average = weights_of(checkpoints / "step_1")
    for step, kept in ((2, 3 / 12), (3, 4 / 13), (4, 5 / 14), (5, 6 / 15)):
        trained, saved = weights_of(checkpoints / f"step_{step}")
        assert saved.keys() == average.keys() == trained.keys()
        for name, tensor in saved.items():
            expected = kept * average[name].double() + (1 - kept) * trained[name].double()
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7)
        average = saved

    # What the run evaluated is what `eval` and `load` find afterwards.
    figures = json.loads((run / "eval.json").read_text())
    assert main(["eval", str(run), "--out", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "eval.json").read_text()) == figures
    loaded, raw = clip_train.load(run, weights="ema"), clip_train.load(run)
    assert all(torch.equal(p, average[name]) for name, p in loaded.model.named_parameters())
    assert not torch.equal(loaded.encode_text("a red dot"), raw.encode_text("a red dot"))

    # Cut after step 3 and resumed: the same average, to the bit.
    cut = tmp_path / "cut"
    shutil.copytree(run, cut, symlinks=True)
    for step in (4, 5):
        shutil.rmtree(cut / "checkpoints" / f"step_{step}")
    assert main(["train", str(recipe), "--run-dir", str(cut)]) == 0
    for whole, again in zip(
        weights_of(checkpoints / "step_5"), weights_of(cut / "checkpoints" / "step_5"), strict=True
    ):
        assert whole.keys() == again.keys()
        assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert json.loads((cut / "eval.json").read_text()) == figures


def test_weights_to_measure(recipe: Path, tmp_path: Path) -> None:
    """`--weights raw` measures other rows than `--weights ema`, by the same names."""
    run = tmp_path / "run"
    assert main(["train", str(recipe), "--run-dir", str(run), "--set", "training.ema.decay=0.9"]) == 0
    names: list[set[str]] = []
    for weights in ("raw", "ema"):
        assert main(["eval", str(run), "--weights", weights, "--out", str(tmp_path / weights)]) == 0
        names.append(set(json.loads((tmp_path / weights / "eval.json").read_text())))
    assert names[0] == names[1]
    rows = [(tmp_path / weights / "eval" / "pairs.npz").read_bytes() for weights in ("raw", "ema")]
    assert rows[0] != rows[1]


def test_sharded_processes_keep_it(recipe: Path, tmp_path: Path) -> None:
    """Each its part: put together, the recursion holds, and the run's own evaluation is that of the whole."""
    run = tmp_path / "run"
    command = ["-m", "clip_train", "train", str(recipe), "--run-dir", str(run)]
    done = torchrun(2, *command, "--set", "training.parallel.kind=fsdp")
    assert done.returncode == 0, done.stderr
    before, after = (read_checkpoint(run / "checkpoints" / f"step_{step}") for step in (4, 5))
    trained, old = after.model(), before.average()
    for name, tensor in after.average().items():
        torch.testing.assert_close(tensor, 0.4 * old[name] + 0.6 * trained[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(tensor, trained[name])
    assert main(["eval", str(run), "--out", str(tmp_path / "whole")]) == 0
    figures = [json.loads((folder / "eval.json").read_text()) for folder in (run, tmp_path / "whole")]
    assert figures[0] == pytest.approx(figures[1], abs=0.02)


def test_what_is_not_there_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.ema"):
        load_recipe(str(recipe), ["training.ema=none"])
    run = tmp_path / "run"
    overrides = ("training.ema=none", "evaluation.weights=raw", "evaluation.tasks={}", "training.steps=1")
    assert main(["train", str(recipe), "--run-dir", str(run), *(x for o in overrides for x in ("--set", o))]) == 0
    with pytest.raises(CheckpointError, match="averaged"):
        clip_train.load(run, weights="ema")
    assert main(["eval", str(run), "--weights", "ema"]) == 2
