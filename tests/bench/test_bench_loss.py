"""`clip-train bench loss`: it refuses wrong gradients, weighs, and holds to its bars."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from conftest import run_cli
from rich.console import Console
from torch import Tensor

from clip_train.bench import loss as bench
from clip_train.bench.measure import Times
from clip_train.cli import main
from clip_train.objectives import tiles


def test_time_and_memory_beside_the_dense_loss() -> None:
    done = run_cli("bench", "loss", "--batch", "1536", "--dim", "16", "--rounds", "1", "--alone", "--memory-bar", "1.5")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("ratio ")
    assert {"tiled", "dense"} <= {word for line in lines for word in line.split()}


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_gradients_that_are_off_are_refused(
    kind: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = bench.Case(kind, 300, 16, "cpu")
    monkeypatch.setattr(tiles, "CPU_TILE", 1)
    assert bench.gradient_error(case, "tiled") < bench.TOLERANCE
    gradients = bench.gradients

    def off(case: bench.Case, side: bench.Side, leaves: list[Tensor]) -> list[Tensor]:
        found = gradients(case, side, leaves)
        return [gradient * 1.001 for gradient in found] if side == "tiled" else found

    monkeypatch.setattr(bench, "gradients", off)
    assert main(["bench", "loss", "--kind", kind, "--batch", "300", "--dim", "16"]) == 2
    assert "gradients are off by 1.0e-03" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bars", "kept"),
    [
        ({}, True),
        ({"memory_bar": 10.0, "most_ms": 200.0, "most_mib": 5.0}, True),
        ({"memory_bar": 10.1}, False),
        ({"most_ms": 199.0}, False),
        ({"most_mib": 4.9}, False),
    ],
)
def test_bars(bars: dict[str, float], kept: bool) -> None:
    args = argparse.Namespace(**{"against": "dense", "memory_bar": None, "most_ms": None, "most_mib": None, **bars})
    memory: dict[bench.Side, float] = {"tiled": 5 * 2.0**20, "dense": 50 * 2.0**20}
    assert bench.within_bars(args, Times((0.2, 0.1, 0.3)), memory, Console(quiet=True)) == kept


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    assert main(["bench", "loss", "--batch", "8192", "--dim", "64", "--rounds", "1", "--device", "cuda"]) == 0
