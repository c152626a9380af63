from __future__ import annotations

import io

from rich.console import Console

from clip_train.training.progress import TrainingProgress

LINE = {
    "loss": 1.0,
    "logit_scale": 14.0,
    "samples_per_second": 1.0,
    "tokens_per_second": 1.0,
    "mfu": 0.1,
    "grad_norm": 1,
}


def shown(*shares: float, enabled: bool = True) -> str:
    out = io.StringIO()
    progress = TrainingProgress(Console(file=out), total=10, done=0, enabled=enabled)
    with progress:
        for share in shares:
            progress.advance()
            progress.show(LINE | {"data_wait": share})
    return out.getvalue()


def test_waiting_for_data_is_told_once_with_what_to_do() -> None:
    note = shown(0.1, 0.35, 0.5, 0.6)
    assert note.count("waited for data") == 1
    assert "35 % of the last interval" in note and "data.workers" in note and "data.scaled_decode" in note


def test_the_start_of_the_workers_is_not_told() -> None:
    assert "waited for data" not in shown(0.9, 0.1, 0.2)


def test_only_the_first_process_tells() -> None:
    assert shown(0.1, 0.9, enabled=False) == ""
