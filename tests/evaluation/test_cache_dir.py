"""Evaluation and report keep shards from elsewhere where the recipe says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_train.config import dump_recipe, load_recipe
from clip_train.data.cache import Cache
from clip_train.data.collections import shards as collection
from clip_train.data.shards import ShardIndex
from clip_train.data.shards import index as list_shard
from clip_train.evaluation.run import open_data
from clip_train.evaluation.run_folder import read_run
from clip_train.from_recipe.data import build_cache


def test_the_report_uses_the_runs_cache(
    recipe_tree: dict[str, Any], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe_tree["data"] |= {"cache_dir": str(tmp_path / "cache"), "cache_gib": 2.5}
    recipe = load_recipe(write_recipe(recipe_tree))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text(dump_recipe(recipe))
    expected = Cache(folder=tmp_path / "cache", max_bytes=5 * 2**29, commands=False)
    assert read_run(tmp_path / "run").cache == build_cache(recipe, commands=False) == expected
    assert build_cache(recipe).commands


def test_a_reading_lists_its_shards_through_the_cache(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Cache | None] = []

    def index(shard: str, cache: Cache | None = None) -> ShardIndex:
        asked.append(cache)
        return list_shard(shard, cache)

    monkeypatch.setattr(collection, "index", index)
    cache = Cache(folder=tmp_path)
    assert len(open_data(shards, None, {"image": "png"}, cache=cache)) == 60
    assert asked == [cache] * 3
