"""Learning rates as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Linear from 1/warmup at step 0 to 1 at step `warmup - 1`."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def cosine(step: int, *, lr: float, steps: int, warmup_steps: int, final_lr: float = 0.0) -> float:
    """Warm-up, then half a cosine from `lr` to `final_lr` at the last step (CLIP section 2.5)."""
    if step < warmup_steps:
        return lr * warmup_factor(step, warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return final_lr + (lr - final_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def constant(step: int, *, lr: float, warmup_steps: int) -> float:
    """Warm-up, then constant."""
    return lr * warmup_factor(step, warmup_steps)


def constant_cooldown(
    step: int,
    *,
    lr: float,
    steps: int,
    warmup_steps: int,
    cooldown_steps: int,
    cooldown_power: float = 1.0,
    final_lr: float = 0.0,
) -> float:
    """Warm-up, constant, and over the last `cooldown_steps` a polynomial decay to `final_lr`."""
    start = steps - cooldown_steps
    if step < start or step < warmup_steps:
        return lr * warmup_factor(step, warmup_steps)
    progress = min(1.0, (step - start) / cooldown_steps)
    return final_lr + (lr - final_lr) * (1.0 - progress) ** cooldown_power
