"""What a person sees of a run over bad data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import add_member, caption, metrics_of, picture

from clip_train.cli import main

BAD = {
    "cut.png": picture(1)[:500],
    "page.png": b"<html>404</html>",
    "none.png": b"",
    "odd.txt": b"gr\xfcn",
    "mute.txt": b" ",
}


@pytest.fixture
def recipe(tmp_path: Path, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]) -> Path:
    """Two shards of 20 good samples and 5 bad ones; 10 batches of 8 are two epochs."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(20):
                add_member(tar, f"s{shard}{number:02}.png", picture(number))
                add_member(tar, f"s{shard}{number:02}.txt", caption(number).encode())
            for name, content in BAD.items():
                key, _, kind = name.partition(".")
                add_member(tar, f"{key}{shard}.png", content if kind == "png" else picture(2))
                add_member(tar, f"{key}{shard}.txt", content if kind == "txt" else b"fine")
    recipe_tree["data"]["sources"]["s"]["shards"] = f"{tmp_path}/{{0,1}}.tar"
    recipe_tree["data"]["max_bad_fraction"] = 0.5
    recipe_tree["training"]["steps"] = 14
    recipe_tree["checkpoint"] = {"every_steps": 3}
    recipe_tree["evaluation"] = {}
    return write_recipe(recipe_tree)


def bad_of(run_dir: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (run_dir / "bad_samples.jsonl").read_text().splitlines()]


def test_a_killed_and_resumed_run_writes_each_bad_sample_once(recipe: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["train", str(recipe), "--run-dir", str(whole)]) == 0
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-m", "clip_train", "train", str(recipe), "--run-dir", str(cut)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until, before = time.monotonic() + 120, lines_in(cut / "metrics.jsonl")
        while process.poll() is None and time.monotonic() < until and lines_in(cut / "metrics.jsonl") < before + 4:
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with (cut / "bad_samples.jsonl").open("a") as file:
        file.write('{"shard": "x')  # the kill came in the middle of a line
    assert main(["train", str(recipe), "--run-dir", str(cut)]) == 0
    found = bad_of(cut)
    assert sorted(map(str, found)) == sorted(map(str, bad_of(whole)))
    assert len({(one["shard"], one["key"]) for one in found}) == len(found) == 10
    assert {one["key"][:-1]: one["cause"].split(":")[0] for one in found} == {
        "cut": "not a readable picture", "page": "not a readable picture", "none": "its png member is empty",
        "odd": "its txt member is not UTF-8 at byte 2", "mute": "its caption is empty",
    }  # fmt: skip
    for a, b in zip(metrics_of(whole), metrics_of(cut), strict=True):
        assert (a["loss"], a["batch"], a["bad_samples"]) == (b["loss"], b["batch"], b["bad_samples"])


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize(("fraction", "least"), [(0.05, 8), (0, 1)])
def test_too_many_bad_samples_stop_the_run_with_all_that_is_needed(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], fraction: float, least: int
) -> None:
    command = ["train", str(recipe), "--run-dir", str(tmp_path / "run"), "--set", f"data.max_bad_fraction={fraction}"]
    assert main([*command, "--set", "training.steps=40"]) == 2
    error = capfd.readouterr().err
    bad = int(error.split(" of ")[0].split()[-1])
    assert bad >= least
    assert f"more than data.max_bad_fraction = {fraction} allows" in error
    assert "First: " in error and f"All are in {tmp_path}/run/bad_samples.jsonl" in error
    assert bad_of(tmp_path / "run")[0]["cause"] in error
    assert "Traceback" not in error


@pytest.mark.parametrize("name", ["metrics.jsonl", "bad_samples.jsonl"])
def test_a_disk_that_is_full_for_a_log(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to("/dev/full")
    assert main(["train", str(recipe), "--run-dir", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert f"{name}: cannot be written: No space left on device. Free some space, then run again" in error
    assert "Traceback" not in error
