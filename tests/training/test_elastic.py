"""The same batches, pixels and losses however many processes, workers and kills: real runs, by `forked.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import metrics_of
from safetensors.torch import load_file

Consumed = dict[tuple[int, int], tuple[str, str]]


def consumed(out: Path, name: str) -> tuple[Consumed, int]:
    """(step, row) -> (key, digest of pixels and ids), and how often a row was consumed again after a kill."""
    lines = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    found: Consumed = {}
    for line in lines:
        place, what = (line["step"], line["row"]), (line["key"], line["digest"])
        assert found.setdefault(place, what) == what, "what comes again is the same again"
    return found, len(lines) - len(found)


def run(command: str, recipe: Path, out: Path) -> None:
    script = Path(__file__).with_name("forked.py")
    done = subprocess.run(
        [sys.executable, str(script), command, str(recipe), str(out)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def recipe(recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]) -> Path:
    del recipe_tree["training"]["steps"]
    recipe_tree["training"]["epochs"] = 1
    recipe_tree["data"]["augment"] = {"crop_scale": [0.5, 1.0], "flip": 0.5, "rotate": 10, "color": {"hue": 0.1}}
    recipe_tree["checkpoint"] = {"every_steps": 2}
    recipe_tree["evaluation"] = {}
    return write_recipe(recipe_tree)


def test_an_epoch_is_the_same_on_any_number_of_processes(recipe: Path, tmp_path: Path) -> None:
    """(1 rank, 0 workers); (2, 2); (4, 1), killed twice and resumed on (2, 1)."""
    run("elastic", recipe, tmp_path)
    expected, again = consumed(tmp_path, "one")
    assert again == 0 and len(expected) == 8 * 8
    epoch = [key for _, (key, _) in sorted(expected.items())][:60]
    assert sorted(epoch) == [f"s{number:03}" for number in range(60)]
    assert consumed(tmp_path, "two") == (expected, 0)
    killed, again = consumed(tmp_path, "four")
    assert killed == expected and again > 0
    digests = [[line["batch"] for line in metrics_of(tmp_path / name)] for name in ("one", "two", "four")]
    assert digests[0] == digests[1] == digests[2] and len(digests[0]) == 8


def test_fifty_kills_lose_and_repeat_nothing(recipe: Path, tmp_path: Path) -> None:
    """At random moments, with and without workers: the run ends as the one that nobody touched, to the bit."""
    run("kills", recipe, tmp_path)
    assert int((tmp_path / "kills").read_text()) == 50
    expected, _ = consumed(tmp_path, "whole")
    killed, again = consumed(tmp_path, "killed")
    assert killed == expected and again > 0
    numbers = ("step", "loss", "grad_norm", "lr", "batch", "samples", "captions_cut", "bad_samples")
    whole, cut = (
        [[line[name] for name in numbers] for line in metrics_of(tmp_path / name)] for name in ("whole", "killed")
    )
    assert cut == whole
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(tmp_path / name / "checkpoints" / "latest" / file) for name in ("whole", "killed"))
        assert one.keys() == other.keys()
        assert all(one[name].equal(other[name]) for name in one)
