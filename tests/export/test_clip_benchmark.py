"""CLIP_benchmark on our export, as its users run it, against `clip-train eval` on the same pictures."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import COLORS, add_member, picture

from clip_train.cli import main

# clip_benchmark 1.6.2 calls float() on arrays of one element, which numpy 2.4 refuses: that one line is mended here.
EVAL = """
import clip_benchmark.metrics.zeroshot_classification as metrics
from clip_benchmark.cli import main
def accuracy(output, target, topk=(1,)):
    right = output.topk(max(topk), 1).indices.T.eq(target[None])
    return [right[:k].sum().item() / len(target) for k in topk]
metrics.accuracy = accuracy
main()
"""


def test_the_same_figures(tmp_path: Path, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]) -> None:
    data = tmp_path / "data"
    (data / "test").mkdir(parents=True)
    with tarfile.open(data / "test" / "0.tar", "w") as tar:
        for number in range(96):
            add_member(tar, f"s{number:03}.png", picture(number))  # of the tower's size: no resampling in between
            add_member(tar, f"s{number:03}.cls", str(number * 7 % 8).encode())
    (data / "test" / "nshards.txt").write_text("1")
    (data / "classnames.txt").write_text("\n".join(COLORS))
    (data / "zeroshot_classification_templates.txt").write_text("a photo of a {c} thing.\n{c}")

    recipe_tree["image"] = {"kind": "timm", "name": "test_resnet", "image_size": 32}
    recipe_tree["training"]["steps"] = 6
    recipe_tree["evaluation"] = {
        "tasks": {
            "mine": {
                "kind": "zeroshot",
                "shards": str(data / "test" / "0.tar"),
                "image": "png",
                "classes": str(data / "classnames.txt"),
                "templates": ["a photo of a {} thing.", "{}"],
            }
        }
    }
    run = tmp_path / "run"
    assert main(["train", str(write_recipe(recipe_tree)), "--run-dir", str(run)]) == 0
    assert main(["export", str(run), "--to", "open_clip", str(tmp_path / "exported")]) == 0
    result = tmp_path / "result.json"
    done = subprocess.run(
        [
            sys.executable, "-c", EVAL, "eval", "--model", f"local-dir:{tmp_path}/exported",
            "--pretrained", "none", "--dataset", "wds/mine", "--dataset_root", str(data), "--output", str(result),
            "--no_amp", "--num_workers", "0", "--quiet",
        ],
        capture_output=True, text=True, timeout=240, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = json.loads(result.read_text())
    ours = json.loads((run / "eval/clip_benchmark/mine.json").read_text())
    assert ours["metrics"].keys() <= theirs["metrics"].keys()
    for name, value in ours["metrics"].items():
        assert value == pytest.approx(theirs["metrics"][name], abs=1e-9), name
    assert 0 < ours["metrics"]["acc1"] < ours["metrics"]["acc5"] < 1

    built = tmp_path / "built.csv"
    subprocess.run(
        [str(Path(sys.executable).parent / "clip_benchmark"), "build", str(run / "eval/clip_benchmark/mine.json"),
         "--output", str(built)],
        check=True, capture_output=True,
    )  # fmt: skip
    with built.open() as a, (run / "eval/clip_benchmark/results.csv").open() as b:
        assert list(csv.DictReader(a)) == [dict(row) for row in csv.DictReader(b)]
