"""The comparisons with open_clip: they run, and what they conclude from curves is what the curves say."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import run_cli

from clip_train.bench.curves import Curve, judge
from clip_train.bench.worker import Worker
from clip_train.errors import UserError


def test_step(tmp_path: Path) -> None:
    done = run_cli(
        "bench", "step", "debug", "--steps", "1", "--rounds", "1", "--png", str(tmp_path / "step.png"), "--bar", "1e9"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "below the bar" in done.stdout
    assert re.fullmatch(r"ratio \d+\.\d\d", done.stdout.splitlines()[-1])
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_curves_of_both_trainers_are_equal_in_fp32(tmp_path: Path) -> None:
    """The same weights, batches, schedule and optimizer: rounding is all that may differ after a few steps."""
    settings = (
        "data.batch_size=16",
        "data.workers=0",
        "training.precision=fp32",
        "text.width=64",
        "image={kind='vit', image_size=48, patch_size=16, width=64, layers=2, heads=2}",
    )
    overrides = [part for setting in settings for part in ("--set", setting)]
    done = run_cli(
        "bench", "curves", "--steps", "4", "--parts", "2", "--seeds", "1", "--out", str(tmp_path), *overrides
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"ratio \d+\.\d\d", done.stdout.splitlines()[-1])
    found = json.loads((tmp_path / "curves.json").read_text())
    theirs, ours = (found["curves"][side][0]["losses"] for side in ("open_clip", "clip-train"))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert len(set(ours)) == 4, "training moved the loss"
    assert (tmp_path / "curves.png").exists()


def test_the_verdict_on_curves_made_by_hand() -> None:
    def curve(losses: list[float], seconds: list[float], accuracy: list[float]) -> Curve:
        return Curve(losses, seconds, accuracy)

    curves = {
        "open_clip": [curve([3.0, 2.0], [10.0, 20.0], [0.1, 0.3]), curve([3.5, 2.5], [10.0, 20.0], [0.2, 0.2])],
        "clip-train": [curve([3.0, 1.9], [4.0, 8.0], [0.1, 0.2]), curve([3.5, 2.4], [5.0, 9.0], [0.1, 0.4])],
    }
    found = judge(curves)
    assert found.between_sides == pytest.approx(0.05)
    assert found.between_seeds == pytest.approx(0.5)
    assert found.target == [0.2, 0.2]
    # Half-way from 0.1 at 10 s to 0.3 at 20 s; at once at the first part; a third of the way from 0.1 to 0.4.
    assert found.seconds["open_clip"] == pytest.approx([15.0, 10.0])
    assert found.seconds["clip-train"] == pytest.approx([8.0, 5.0 + 4.0 / 3.0])
    assert found.ratio == pytest.approx((15.0 / 8.0 + 10.0 / (5.0 + 4.0 / 3.0)) / 2)
    assert found.accuracy == {"open_clip": pytest.approx(0.25), "clip-train": pytest.approx(0.3)}


@contextmanager
def counter(start: int) -> Generator[list[int]]:
    if start < 0:
        raise UserError("no such start")
    yield [start]


def test_a_worker_answers_and_its_errors_arrive() -> None:
    with Worker(counter, 5, device="cpu") as worker:
        worker.ready()
        assert worker.call("count", 5) == 1
        with pytest.raises(RuntimeError, match="is not in list"):
            worker.call("index", 6)
    with Worker(counter, -1, device="cpu") as worker, pytest.raises(UserError, match="no such start"):
        worker.ready()
