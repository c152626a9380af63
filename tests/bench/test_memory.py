"""The input side holds no more after ten epochs than after one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import run_cli


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_memory_is_flat_over_ten_epochs(recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]) -> None:
    """Keeping the batches would add 9 MB an epoch to some 500."""
    recipe_tree["image"] |= {"image_size": 224, "patch_size": 112}
    done = run_cli("bench", "memory", str(write_recipe(recipe_tree)), "--epochs", "10", "--fill", "8",
                   "--workers", "2", "--bar", "5")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()[1:-1]]
    assert [int(line[0]) for line in lines] == list(range(18))
    assert all(float(line[1]) > 50 for line in lines)
