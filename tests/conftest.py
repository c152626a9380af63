"""Small data made on the spot, and ways to run the command line in processes of its own."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

os.environ["OMP_NUM_THREADS"] = "1"  # models here are small: more threads spin and wait for each other
os.environ.setdefault("WANDB_MODE", "disabled")

COLORS = ("red", "green", "blue", "yellow", "white", "black", "purple", "orange")
SHAPES = ("square", "stripe", "ring", "dot")


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def picture(number: int, size: int = 32) -> bytes:
    """A PNG that differs from number to number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def caption(number: int) -> str:
    return f"a {COLORS[number % 8]} {SHAPES[number // 8 % 4]} number {number}"


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The pattern of 3 shards of 20 samples: `png` and `txt`."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as tar:
            for number in range(20 * shard, 20 * shard + 20):
                add_member(tar, f"s{number:03}.png", picture(number))
                add_member(tar, f"s{number:03}.txt", caption(number).encode())
    return f"{folder}/train-{{0..2}}.tar"


@pytest.fixture
def recipe_tree(shards: str) -> dict[str, Any]:
    """The tree of a recipe that trains in a second."""
    return {
        "name": "tiny",
        "data": {"batch_size": 8, "workers": 0, "sources": {"s": {"shards": shards, "image": "png"}}},
        "image": {"kind": "vit", "image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "heads": 2},
        "text": {"width": 16, "layers": 1, "heads": 2},
        "model": {"embed_dim": 8},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "schedule": {"kind": "cosine", "warmup_steps": 2},
        "training": {"steps": 12, "precision": "fp32"},
        "checkpoint": {"every_steps": 4},
        "logging": {"every_steps": 1},
        "evaluation": {"tasks": {"seen": {"kind": "retrieval", "shards": shards, "image": "png"}}},
    }


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Write a recipe tree to a TOML file."""
    import tomli_w

    def write(tree: dict[str, Any]) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(tomli_w.dumps(tree))
        return path

    return write


def run_cli(*arguments: str, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """`clip-train …` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "clip_train", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **(env or {})},
        **options,
    )


def torchrun(processes: int, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node=N …` over gloo on loopback; what hangs ends with all its processes."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=0",
               "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *arguments]  # fmt: skip
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
    )
    try:
        stdout, stderr = started.communicate(timeout=600)
    except BaseException:
        kill_all(started.pid)
        raise
    return subprocess.CompletedProcess(command, started.returncode, stdout, stderr)


def kill_all(pid: int) -> None:
    """A process and all that it started, also what is in sessions of its own, as torchrun's workers are."""
    for one in [*descendants(pid), pid]:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Children, their children and so on, of a process that is still there."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in task.read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
