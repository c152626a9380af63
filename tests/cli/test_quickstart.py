"""`clip-train quickstart`, shortened: vocabulary, training, evaluation, report, and all of it again."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import metrics_of, run_cli

SHORT = (
    "training.steps=2",
    "training.precision=fp32",
    "data.batch_size=16",
    "data.workers=0",
    "image.image_size=32",
    "evaluation.every_steps=0",
)


def test_quickstart_and_again(tmp_path: Path) -> None:
    arguments = [part for override in SHORT for part in ("--set", override)]
    for _ in range(2):
        done = run_cli("quickstart", "--run-dir", str(tmp_path / "run"), *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "report.html" in done.stdout
        assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2]
    figures = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert figures["zeroshot/unseen_style/classes"] >= 1200
    assert 0 <= figures["zeroshot/unseen_style/top1"] <= figures["zeroshot/unseen_style/top5"] <= 1
    assert figures["zeroshot/unseen_style/chance"] < 0.001
    assert "retrieval/openclipart/image_to_text/r@10" in figures
    vocabulary = json.loads((tmp_path / "run" / "vocabulary.json").read_text())
    assert vocabulary
