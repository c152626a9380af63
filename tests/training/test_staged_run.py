"""A run that begins small: what a step costs, and that cut in any stage it goes on exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import metrics_of

from clip_train.cli import main
from clip_train.config.load import parse_recipe
from clip_train.estimate import estimate

EXACT = ("step", "loss", "logit_scale", "lr", "grad_norm", "batch", "image_size")


def numbers(run_dir: Path) -> list[tuple[Any, ...]]:
    return [tuple(line[key] for key in EXACT) for line in metrics_of(run_dir)]


def test_cut_in_any_stage_a_run_goes_on_exactly(
    tmp_path: Path, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]
) -> None:
    recipe_tree["image"]["patch_dropout"] = 0.25
    recipe_tree["image"]["patch_size"] = 4
    recipe_tree["training"] |= {
        "steps": 9,
        "micro_batch": 4,
        "stages": [{"until_step": 3, "image_size": 8, "context_length": 5}, {"until_step": 6, "image_size": 12}],
    }
    recipe_tree["checkpoint"] = {"every_steps": 1, "keep_last": 9}
    recipe_tree["evaluation"] = {}
    recipe = str(write_recipe(recipe_tree))
    assert main(["train", recipe, "--run-dir", str(tmp_path / "whole")]) == 0
    whole = numbers(tmp_path / "whole")
    assert [line[-1] for line in whole] == [8] * 3 + [12] * 3 + [16] * 3
    for step in (2, 3, 5):
        checkpoint, run_dir = tmp_path / f"whole/checkpoints/step_{step}", tmp_path / f"from_{step}"
        assert main(["train", recipe, "--run-dir", str(run_dir), "--resume", str(checkpoint)]) == 0
        assert numbers(run_dir) == whole[step:]


def test_an_estimate_counts_each_stage(recipe_tree: dict[str, Any]) -> None:
    def training_flops(size: int, stages: list[dict[str, int]], dropout: float = 0.0) -> float:
        recipe_tree["image"] |= {"image_size": size, "patch_size": 4, "patch_dropout": dropout}
        recipe_tree["training"]["stages"] = stages
        return estimate(parse_recipe(recipe_tree), devices=1, peak_flops=1e12, mfu=0.5, tokens=4).training_flops

    small, full = training_flops(8, []), training_flops(16, [])
    mixed = training_flops(16, [{"until_step": 9, "image_size": 8}])  # of 12 steps
    assert mixed == pytest.approx(0.75 * small + 0.25 * full)
    assert small < training_flops(16, [], dropout=0.5) < full
