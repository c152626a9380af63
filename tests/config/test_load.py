"""Recipes: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_train.config import dump_recipe, load_recipe, parse_recipe
from clip_train.config.load import differences, parse_toml, set_values
from clip_train.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def test_resolved_recipe_reads_back_equal(recipe_tree: dict[str, Any]) -> None:
    recipe = parse_recipe(recipe_tree)
    assert parse_toml(dump_recipe(recipe), "again") == recipe


@pytest.mark.parametrize(
    ("change", "nearest"),
    [
        ({"training": {"steps": 1, "sead": 2}}, "training.seed"),
        ({"trainin": {}}, "training"),
        ({"lr": 1.0}, "optimizer.lr"),
        ({"text": {"attn": "causal", "pol": "eot"}}, "text.pool"),
        (
            {"image": {"kind": "resnet", "image_size": 32, "layers": [1, 1, 1, 1], "heads": 4, "widht": 8}},
            "image.width",
        ),
    ],
)
def test_unknown_key_names_the_nearest(recipe_tree: dict[str, Any], change: dict[str, Any], nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key .* Did you mean {nearest}"):
        parse_recipe({**recipe_tree, **change})


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["optimizer.kind=lamb", "optimizer.lr=1e-3", "optimizer.beta=0.9"], "optimizer.beta"),
        (["optimizer.kind=lion", "optimizer.lr=1e-3", "optimizer.layer_deca=0.9"], "optimizer.layer_deca"),
        (["training.parallel.kind=fsdp", "training.parallel.shrad=hybrid"], "training.parallel.shrad"),
        (["training.parallel.static_grap=true"], "training.parallel.static_grap"),
        (["data.sources.vit.shards=a.tar", "data.sources.vit.caption_choise=all"], "data.sources.vit.caption_choise"),
        (['evaluation.tasks={knn={kind="knn", shard="a.tar"}}'], "evaluation.tasks.knn.shard"),
        (["data.bert=1"], "data.bert"),
    ],
)
def test_unknown_key_is_named_as_it_was_written(
    recipe_tree: dict[str, Any], write_recipe: Callable[..., Path], overrides: list[str], key: str
) -> None:
    recipe_tree["training"]["parallel"] = {"kind": "ddp"}
    with pytest.raises(ConfigError, match=f"unknown key '{re.escape(key)}'"):
        load_recipe(write_recipe(recipe_tree), overrides)


@pytest.mark.parametrize("key", ["evaluation.tasks", "evaluation", "data.sources", "data", "training", "text"])
def test_a_text_where_a_table_belongs_is_named(
    recipe_tree: dict[str, Any], write_recipe: Callable[..., Path], key: str
) -> None:
    broken = '{mine={kind="knn", \\\n data="folder:x"}}'  # no newline may stand in TOML's inline tables
    with pytest.raises(ConfigError, match=f"'{re.escape(key)}': "):
        load_recipe(write_recipe(recipe_tree), [f"{key}={broken}"])


def test_inf_never_warns_and_none_is_the_default(
    recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]
) -> None:
    path = write_recipe(recipe_tree)
    never = load_recipe(path, ["faults.spike_sigmas=inf"])
    assert never.faults.spike_sigmas == math.inf
    assert parse_toml(dump_recipe(never), "again") == never
    assert load_recipe(path, ["faults.spike_sigmas=none"]).faults.spike_sigmas == 8.0


def test_key_of_another_kind_is_refused(recipe_tree: dict[str, Any]) -> None:
    recipe_tree["schedule"] = {"kind": "constant", "warmup_steps": 1, "final_lr": 0.0}
    with pytest.raises(ConfigError, match=r"unknown key 'schedule\.final_lr'"):
        parse_recipe(recipe_tree)


def test_wrong_value_shows_what_was_given(recipe_tree: dict[str, Any]) -> None:
    recipe_tree["training"]["steps"] = "many"
    with pytest.raises(ConfigError, match=r"'training\.steps'.*'many'"):
        parse_recipe(recipe_tree)


def test_missing_key_is_named(recipe_tree: dict[str, Any]) -> None:
    del recipe_tree["optimizer"]["lr"]
    with pytest.raises(ConfigError, match=r"missing key 'optimizer.*lr'"):
        parse_recipe(recipe_tree)


def test_overrides(recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]) -> None:
    path = write_recipe(recipe_tree)
    recipe = load_recipe(
        path,
        ["text.attention=bidirectional", "text.pool=mean", "training.steps=7", "data.augment.crop_scale=[0.5, 1.0]"],
    )
    assert (recipe.text.attention, recipe.text.pool, recipe.training.steps) == ("bidirectional", "mean", 7)
    assert recipe.data.augment.crop_scale == (0.5, 1.0)


def test_override_of_a_kind_starts_from_nothing(recipe_tree: dict[str, Any]) -> None:
    recipe = set_values(
        parse_recipe(recipe_tree),
        ["image.kind=resnet", "image.image_size=32", "image.layers=[1,1,1,1]", "image.heads=4"],
    )
    assert recipe.image.kind == "resnet"


@pytest.mark.parametrize("override", ["training.steps", "=3", "training..steps=3", "name.x=1"])
def test_malformed_override(recipe_tree: dict[str, Any], write_recipe: Callable[..., Path], override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load_recipe(write_recipe(recipe_tree), [override])


def test_extends_and_change_of_kind(
    tmp_path: Path, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]
) -> None:
    write_recipe(recipe_tree)
    child = tmp_path / "child.toml"
    child.write_text('extends = "recipe.toml"\n[schedule]\nkind = "constant"\nwarmup_steps = 1\n[training]\nseed = 5\n')
    recipe = load_recipe(child)
    assert recipe.schedule.kind == "constant"
    assert (recipe.training.seed, recipe.training.steps) == (5, 12)


def test_extends_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
    (tmp_path / "b.toml").write_text('extends = "a.toml"\n')
    with pytest.raises(ConfigError, match="circle"):
        load_recipe(tmp_path / "a.toml")


def test_missing_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"debgu.*Did you mean debug"):
        load_recipe("debgu")


def test_paths_are_those_of_the_recipe_file(
    tmp_path: Path, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]
) -> None:
    (tmp_path / "data").mkdir()
    recipe_tree["data"]["sources"]["s"]["shards"] = "data/x.tar"
    recipe_tree["tokenizer"] = {"path": "./vocabulary.json"}
    recipe = load_recipe(write_recipe(recipe_tree))
    assert recipe.data.sources["s"].shards == str(tmp_path / "data/x.tar")
    assert Path(recipe.tokenizer.path) == tmp_path / "vocabulary.json"


def test_differences(recipe_tree: dict[str, Any]) -> None:
    a = parse_recipe(recipe_tree)
    b = set_values(a, ["optimizer.lr=0.5", "training.seed=3"])
    assert differences(a, b) == {"optimizer.lr": (1e-3, 0.5), "training.seed": (0, 3)}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_says_its_command(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    head = path.read_text().split("\n\n")[0]
    assert (
        f"clip_train train {path.stem}" in head
        or f"clip-train {path.stem}" in head
        or f"clip-train train {path.stem}" in head
        or f"clip-train train runs/{path.stem}/recipe.toml" in head
    )
    assert "Hardware:" in head
    assert "Result:" in head or "Expect" in head


def test_missing_kind_is_named(recipe_tree: dict[str, Any]) -> None:
    del recipe_tree["optimizer"]["kind"]
    with pytest.raises(ConfigError, match=r"missing key 'optimizer\.kind'"):
        parse_recipe(recipe_tree)
