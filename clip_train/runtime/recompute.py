"""Activation checkpointing (Chen et al. 2016) by block: activations are recomputed in the backward pass, not kept."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from clip_train.models.base import Model


def recompute_blocks(model: Model) -> None:
    """Keep only the input of each block; the same random numbers are drawn when it is computed again."""
    for tower in model.towers.values():
        for block in tower.blocks:
            # On the instance: names of parameters, which checkpoints and optimizers go by, stay as they are.
            block.forward = partial(
                checkpoint,
                block.forward,
                use_reentrant=False,
                preserve_rng_state=True,
                context_fn=partial(_first_and_second_pass, block),
            )


def _first_and_second_pass(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), frozen_running_statistics(block)


@contextmanager
def frozen_running_statistics(model: nn.Module) -> Generator[None]:
    """BatchNorm normalises by the batch as in training, but does not count it: once a step is enough."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]  # pyright: ignore[reportPrivateUsage]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # The running statistics move by nothing. They stay in use, for a recomputed pass must save what the first did.
        norm.momentum = 0.0
        norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked
