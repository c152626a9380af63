"""Two gloo processes give the gradients, the batches and the losses of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metrics_of, run_cli, torchrun
from safetensors.torch import load_file

GRADIENTS = Path(__file__).parent / "gradients.py"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    done = torchrun(1, str(GRADIENTS), str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("processes", [2, 4])
def test_gradients(one_process: Path, tmp_path: Path, processes: int) -> None:
    done = torchrun(processes, str(GRADIENTS), str(tmp_path))
    assert done.returncode == 0, done.stderr
    for case in ("plain", "cached", "groups"):
        expected = load_file(one_process / f"{case}.safetensors")
        actual = load_file(tmp_path / f"{case}.safetensors")
        assert actual.keys() == expected.keys()
        assert "logit_scale" in actual
        for name, gradient in expected.items():
            scale = gradient.abs().max()
            assert scale > 0, f"{case}: {name} has no gradient"
            assert (actual[name] - gradient).abs().max() <= 1e-5 * scale, f"{case}: {name}"
    assert not torch.equal(
        load_file(one_process / "plain.safetensors")["logit_scale"],
        load_file(one_process / "groups.safetensors")["logit_scale"],
    ), "groups change the loss, so this case is not the plain one again"


def test_a_run_on_two_processes_sees_and_learns_the_same(
    tmp_path: Path, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]
) -> None:
    recipe = write_recipe(recipe_tree)
    one, two = tmp_path / "one", tmp_path / "two"
    done = run_cli("train", str(recipe), "--run-dir", str(one))
    assert done.returncode == 0, done.stderr
    # Half on two processes, the rest resumed on one: the batches stay the same.
    done = torchrun(2, "-m", "clip_train", "train", str(recipe), "--run-dir", str(two))
    assert done.returncode == 0, done.stderr
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        assert a["batch"] == b["batch"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert (two / "eval.json").exists()


def test_a_mistake_ends_all_processes_with_its_message(
    recipe_tree: dict[str, Any], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe_tree["data"]["sources"]["s"]["caption"] = "caption"
    done = torchrun(2, "-m", "clip_train", "train", str(write_recipe(recipe_tree)), "--run-dir", str(tmp_path / "run"))
    assert done.returncode != 0
    assert "caption" in done.stderr
    assert "txt" in done.stderr
