"""How a model is spread over processes: one function that reads top to bottom."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clip_train.models.two_tower import TwoTower
from clip_train.runtime.process import Process


def parallelize(model: TwoTower, process: Process, *, compile: bool = False) -> nn.Module:
    """Move to the device, compile the blocks when asked, and wrap for gradient averaging.

    BatchNorm statistics stay those of each process's rows, as in CLIP.
    """
    model.to(process.device)
    if compile:
        for tower in (model.image, model.text):
            for block in tower.blocks:
                block.compile(dynamic=True)  # packed captions have another length in every step
    if process.world == 1:
        return model
    on_gpu = process.device.type == "cuda"
    return DistributedDataParallel(
        model,
        device_ids=[process.local_rank] if on_gpu else None,
        gradient_as_bucket_view=True,
        # Every process keeps its own BatchNorm buffers; rank 0's are the ones saved and evaluated.
        broadcast_buffers=False,
    )


@contextmanager
def without_gradient_sync(model: nn.Module) -> Generator[None]:
    """Backward passes inside only add to local gradients; the first one outside averages the sum."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        yield
