"""The launch scripts: their syntax, and the torchrun one for real on two gloo processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import metrics_of

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch")))
def test_syntax(script: str) -> None:
    done = subprocess.run(["bash", "-n", str(LAUNCH / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torchrun_on_two_processes(tmp_path: Path) -> None:
    environment = {**os.environ, "PROCESSES": "2", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [str(LAUNCH / "torchrun.sh"), "debug", "--run-dir", str(tmp_path / "run"), "--set", "training.steps=2",
         "--set", "evaluation.tasks={}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 × cpu" in done.stdout
    assert metrics_of(tmp_path / "run")[-1]["step"] == 2
