"""Two gloo processes give the gradients, the batches and the losses of one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import caption, metrics_of, run_cli, torchrun
from safetensors.torch import load_file
from torch import Tensor

from tokenizer import BPETokenizer

sys.path.insert(0, str(Path(__file__).parent))
from gradients import REFERENCE, Case, matrix, pairs, variants

GRADIENTS = Path(__file__).parent / "gradients.py"


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of all cases' gradients by number of processes."""
    folders: dict[int, Path] = {}
    for processes in (1, 2, 4):
        folders[processes] = tmp_path_factory.mktemp(f"on{processes}")
        arguments = [str(GRADIENTS), str(folders[processes])]
        if processes == 1:
            done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=240)
        else:
            done = torchrun(processes, *arguments)
        assert done.returncode == 0, done.stderr
    return folders


def distance(folder: Path, case: Case, expected: dict[str, Tensor]) -> float:
    """Largest difference of any tensor, relative to that tensor's largest entry."""
    actual = load_file(folder / f"{case.name}.safetensors")
    assert actual.keys() == expected.keys()
    assert "logit_scale" in actual
    for name, tensor in expected.items():
        assert tensor.abs().max() > 0, f"{case.name}: {name} is zero"
    return max(float((actual[name] - tensor).abs().max() / tensor.abs().max()) for name, tensor in expected.items())


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_gradients_are_those_of_one_process(gradients: dict[int, Path], processes: int) -> None:
    for case in matrix() + (variants(processes) if processes > 1 else []):
        expected = load_file(gradients[1] / f"{Case(REFERENCE.get(case.objective, case.objective)).name}.safetensors")
        assert ("logit_bias" in expected) == ("sigmoid" in case.objective)
        assert distance(gradients[processes], case, expected) <= 1e-6, case.name
    plain, groups = (load_file(gradients[processes] / f"{Case(name).name}.safetensors") for name in ("dense", "groups"))
    assert not torch.equal(plain["logit_scale"], groups["logit_scale"]), "groups change the loss: another case"


@pytest.mark.parametrize("processes", [2, 4])
def test_ways_that_agree_on_the_same_processes(gradients: dict[int, Path], processes: int) -> None:
    """Dropout replayed, BatchNorm counted once, bf16 rounded at the same places."""
    for one, other in pairs():
        expected = load_file(gradients[processes] / f"{one.name}.safetensors")
        assert distance(gradients[processes], other, expected) <= 1e-6, other.name


def test_compressed_gradients_are_rounded_to_bf16(gradients: dict[int, Path]) -> None:
    expected = load_file(gradients[1] / f"{Case().name}.safetensors")
    assert distance(gradients[1], Case(strategy="compressed"), expected) == 0, "nothing is sent"
    assert 2**-12 < distance(gradients[2], Case(strategy="compressed"), expected) < 2**-5


def test_a_run_on_two_processes_sees_and_learns_the_same(
    tmp_path: Path, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]
) -> None:
    folder = recipe_tree["data"]["sources"].pop("s")["shards"].rpartition("/")[0]
    for name, shards in (("small", "train-0.tar"), ("large", "train-[12].tar")):
        recipe_tree["data"]["sources"][name] = {"shards": f"{folder}/{shards}", "image": "png"}
    recipe_tree["tokenizer"] = {"context_length": 7}
    del recipe_tree["training"]["steps"]
    recipe_tree["training"]["epochs"] = 2
    recipe = write_recipe(recipe_tree)
    one, two = tmp_path / "one", tmp_path / "two"
    done = run_cli("train", str(recipe), "--run-dir", str(one))
    assert done.returncode == 0, done.stderr
    # Half on two processes, the rest resumed on one: the batches stay the same.
    done = torchrun(2, "-m", "clip_train", "train", str(recipe), "--run-dir", str(two))
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        assert a["batch"] == b["batch"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["captions_cut"] == b["captions_cut"]
        for name in ("small", "large"):
            assert a["sources"][name]["samples"] == b["sources"][name]["samples"]
            assert a["sources"][name]["loss"] == pytest.approx(b["sources"][name]["loss"], rel=1e-4)
        # Lines are written every step: a source's mean loss, weighted by its samples, is the loss of the batch.
        for line in (a, b):
            parts = list(line["sources"].values())
            assert sum(part["samples"] for part in parts) == 8
            assert sum(part["samples"] * part["loss"] for part in parts) / 8 == pytest.approx(line["loss"], rel=1e-6)
    lines = metrics_of(two)
    assert len(lines) == 15, "2 epochs of 60 samples in batches of 8"
    assert [sum(line["sources"][name]["samples"] for line in lines) for name in ("small", "large")] == [40, 80]
    tokenizer = BPETokenizer.default()  # 76 tokens, so that nothing is cut
    longer = [len(tokenizer.encode(caption(number))) + 2 > 7 for number in range(60)]
    assert 0 < sum(longer) < 60
    assert lines[-1]["captions_cut"] == 2 * sum(longer)
    assert (two / "eval.json").exists()


def test_a_mistake_ends_all_processes_with_its_message(
    recipe_tree: dict[str, Any], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe_tree["data"]["sources"]["s"]["caption"] = "caption"
    done = torchrun(2, "-m", "clip_train", "train", str(write_recipe(recipe_tree)), "--run-dir", str(tmp_path / "run"))
    assert done.returncode != 0
    assert "caption" in done.stderr
    assert "txt" in done.stderr
