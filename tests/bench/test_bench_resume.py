"""The resume bench runs, and its bar judges."""

from __future__ import annotations

import re

from conftest import run_cli


def test_it_times_starts_and_judges() -> None:
    done = run_cli("bench", "resume", "--samples", "2000", "--rounds", "1", "--bar", "1000")
    assert done.returncode == 0, done.stdout + done.stderr
    slowest = re.search(r"slowest ([\d.]+) s", done.stdout)
    assert slowest is not None
    assert float(slowest[1]) > 0
    assert "2,000 samples in 100 local shards" in done.stdout
    assert run_cli("bench", "resume", "--samples", "2000", "--rounds", "1", "--bar", "0").returncode == 1
