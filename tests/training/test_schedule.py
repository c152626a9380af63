"""Schedules against hand-computed values and open_clip's."""

from __future__ import annotations

import pytest

from clip_train.training.schedule import constant, constant_cooldown, cosine


class FakeOptimizer:
    def __init__(self) -> None:
        self.param_groups = [{"lr": 0.0}]


def open_clip_values(schedule: str, steps: int, **arguments: float) -> list[float]:
    from open_clip_train import scheduler as peer

    optimizer = FakeOptimizer()
    if schedule == "cosine":
        step_function = peer.cosine_lr(optimizer, 1e-3, 10, steps)
    elif schedule == "constant":
        step_function = peer.const_lr(optimizer, 1e-3, 10, steps)
    else:
        step_function = peer.const_lr_cooldown(optimizer, 1e-3, 10, steps, 20, **arguments)
    values: list[float] = []
    for step in range(steps):
        step_function(step)
        values.append(optimizer.param_groups[0]["lr"])
    return values


def test_cosine_is_open_clips() -> None:
    ours = [cosine(step, lr=1e-3, steps=100, warmup_steps=10) for step in range(100)]
    assert ours == pytest.approx(open_clip_values("cosine", 100))


def test_constant_is_open_clips() -> None:
    assert [constant(step, lr=1e-3, warmup_steps=10) for step in range(50)] == pytest.approx(
        open_clip_values("constant", 50)
    )


def test_cooldown_is_open_clips() -> None:
    ours = [
        constant_cooldown(
            step, lr=1e-3, steps=100, warmup_steps=10, cooldown_steps=20, cooldown_power=2.0, final_lr=1e-5
        )
        for step in range(100)
    ]
    peer = open_clip_values("cooldown", 100, cooldown_power=2.0, cooldown_end_lr=1e-5)
    assert ours == pytest.approx(peer)


def test_hand_computed() -> None:
    assert cosine(0, lr=1.0, steps=110, warmup_steps=10) == pytest.approx(0.1)
    assert cosine(9, lr=1.0, steps=110, warmup_steps=10) == pytest.approx(1.0)
    assert cosine(60, lr=1.0, steps=110, warmup_steps=10, final_lr=0.2) == pytest.approx(0.6)
    assert cosine(110, lr=1.0, steps=110, warmup_steps=10, final_lr=0.2) == pytest.approx(0.2)
    assert cosine(5, lr=1.0, steps=10, warmup_steps=0) == pytest.approx(0.5)
