"""A run's length, in steps or in epochs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_train.cli import main
from clip_train.config import load_recipe
from clip_train.data.order import Order
from clip_train.errors import ConfigError
from clip_train.from_recipe.update import total_steps

Write = Callable[[dict[str, Any]], Path]


def test_exactly_one_length(recipe_tree: dict[str, Any], write_recipe: Write) -> None:
    recipe_tree["training"]["epochs"] = 3
    with pytest.raises(ConfigError, match=r"training\.steps or training\.epochs, one of them"):
        load_recipe(write_recipe(recipe_tree))
    del recipe_tree["training"]["epochs"], recipe_tree["training"]["steps"]
    with pytest.raises(ConfigError, match=r"training\.steps or training\.epochs, one of them"):
        load_recipe(write_recipe(recipe_tree))


def test_the_one_given_last_counts(recipe_tree: dict[str, Any], write_recipe: Write, tmp_path: Path) -> None:
    base = write_recipe(recipe_tree)
    lengths = load_recipe(base, ["training.epochs=3"]).training
    assert (lengths.steps, lengths.epochs) == (None, 3)
    (tmp_path / "top.toml").write_text(f'extends = "{base.name}"\n[training]\nepochs = 5\n')
    lengths = load_recipe(tmp_path / "top.toml").training
    assert (lengths.steps, lengths.epochs) == (None, 5)
    lengths = load_recipe(tmp_path / "top.toml", ["training.steps=9"]).training
    assert (lengths.steps, lengths.epochs) == (9, None)


@pytest.mark.parametrize(("samples", "batch", "steps"), [(100, 10, 30), (101, 10, 31), (99, 10, 30), (10, 10, 3)])
def test_every_sample_comes_that_often(
    recipe_tree: dict[str, Any], write_recipe: Write, samples: int, batch: int, steps: int
) -> None:
    """The steps cover three whole epochs, and no step more than they need."""
    recipe = load_recipe(write_recipe(recipe_tree), ["training.epochs=3"])
    order = Order([[samples]], None, seed=0, batch_size=batch)
    assert total_steps(recipe, order) == steps
    epochs = [place.epoch for step in range(steps) for place in order.batch(step)]
    assert [epochs.count(epoch) for epoch in range(3)] == [samples] * 3
    assert len(epochs) - 3 * samples < batch


def test_estimate_does_not_guess_epochs(
    recipe_tree: dict[str, Any], write_recipe: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(recipe_tree))
    assert main(["estimate", recipe, "--set", "training.epochs=3"]) == 0
    assert "3 epochs (give --samples)" in capsys.readouterr().out
    assert main(["estimate", recipe, "--set", "training.epochs=3", "--samples", "3e6"]) == 0
    assert "3,000,000" in capsys.readouterr().out


def test_order_knows_where_epochs_end(
    recipe_tree: dict[str, Any], write_recipe: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["data", "order", str(write_recipe(recipe_tree)), "--set", "training.epochs=1", "--batches"]
    assert main([*arguments, "--steps", "1:8"]) == 0  # 60 samples in batches of 8
    assert "note" not in capfd.readouterr().err
    assert main([*arguments, "--steps", "9"]) == 0
    assert "ends with step 8 (training.epochs)" in capfd.readouterr().err
