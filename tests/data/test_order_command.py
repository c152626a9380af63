"""`clip-train data order` against what a run really does."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import caption, metrics_of, run_cli

from clip_train.cli import main
from clip_train.data.inspect_order import parse_steps
from clip_train.data.loader import Loader
from clip_train.errors import DataError


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, str]]:
    capsys.readouterr()
    assert main(["data", "order", *arguments]) == 0
    names, *lines = capsys.readouterr().out.splitlines()
    return [dict(zip(names.split("\t"), line.split("\t"), strict=True)) for line in lines]


def test_digests_are_those_of_a_run(
    recipe_tree: dict[str, Any],
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe_tree["training"]["steps"] = 3
    recipe_tree["evaluation"] = {"tasks": {}}
    recipe = str(write_recipe(recipe_tree))
    done = run_cli("train", recipe, "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    real = {str(line["step"]): line["batch"] for line in metrics_of(tmp_path / "run")}
    assert list(real) == ["1", "2", "3"]
    lines = listed(capsys, recipe, "--steps", "1:3", "--batches")
    assert {line["step"]: line["batch"] for line in lines} == real
    assert len(set(real.values())) == 3
    rows = listed(capsys, recipe, "--steps", "2", "--set", "training.seed=1")
    assert {row["batch"] for row in rows}.isdisjoint(real.values())


def test_an_epoch_is_every_sample_once_and_where_it_says(
    recipe_tree: dict[str, Any], write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(recipe_tree))
    rows = listed(capsys, recipe, "--set", "data.batch_size=10", "--steps", "1:12")
    for epoch in (0, 1):
        assert sorted(row["key"] for row in rows if row["epoch"] == str(epoch)) == [f"s{n:03}" for n in range(60)]
    for shard in {row["shard"] for row in rows}:
        with tarfile.open(shard) as tar:
            there = {name.partition(".")[0] for name in tar.getnames()}
        assert {row["key"] for row in rows if row["shard"] == shard} == there


def test_ranks_and_workers_share_the_same_batch(
    recipe_tree: dict[str, Any], write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from clip_train.config import load_recipe
    from clip_train.from_recipe.data import build_stream
    from clip_train.from_recipe.model import build_tokenizer

    recipe = str(write_recipe(recipe_tree))
    alone = listed(capsys, recipe, "--steps", "1:4")
    shared = listed(capsys, recipe, "--steps", "1:4", "--ranks", "2", "--workers", "3")
    assert [row["key"] for row in alone] == [row["key"] for row in shared]
    assert [row["batch"] for row in alone] == [row["batch"] for row in shared]
    loaded = load_recipe(recipe)
    for rank in range(2):
        stream = build_stream(loaded, build_tokenizer(loaded), rank=rank, world=2)
        for step in range(1, 5):
            own = [row["key"] for row in shared if (row["step"], row["rank"]) == (str(step), str(rank))]
            assert own == stream[step - 1].keys
    workers = dict(enumerate(Loader(_WhoAmI(), range(4), workers=3), 1))
    assert {int(row["step"]): int(row["worker"]) for row in shared} == workers


def test_captions_are_listed(
    recipe_tree: dict[str, Any], write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = listed(capsys, str(write_recipe(recipe_tree)), "--steps", "2:3", "--captions")
    assert len(rows) == 16
    assert all(row["caption"] == caption(int(row["key"][1:])) for row in rows)


class _WhoAmI:
    def __getitem__(self, number: int, /) -> int:
        from torch.utils.data import get_worker_info

        info = get_worker_info()
        assert info is not None
        return info.id


def test_steps_are_counted_from_one(
    recipe_tree: dict[str, Any], write_recipe: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    assert parse_steps("3:5") == range(3, 6)
    assert parse_steps("7") == range(7, 8)
    for wrong in ("0:3", "5:3", "a:b", "", "1:", ":4", "1:2:3"):
        with pytest.raises(DataError, match=r"metrics\.jsonl"):
            parse_steps(wrong)
    recipe = str(write_recipe(recipe_tree))
    assert main(["data", "order", recipe, "--steps", "1", "--ranks", "3"]) == 2
    assert "multiple" in capfd.readouterr().err
    assert main(["data", "order", recipe, "--steps", "13", "--batches"]) == 0
    assert "ends with step 12" in capfd.readouterr().err
