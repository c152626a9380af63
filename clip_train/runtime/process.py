"""Which process this is, on which device, in which arithmetic.

accelerate sets up the process group under `torchrun` or `accelerate launch`, picks the device, and owns autocast and
the fp16 loss scaler. It never gets a loader, a model or a schedule.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from clip_train.errors import ConfigError, UserError
from clip_train.runtime.memory import keep_freed_memory
from clip_train.runtime.rendezvous import join_group
from clip_train.runtime.teardown import leave_group


@dataclass(frozen=True)
class Process:
    """One of `world` training processes."""

    rank: int
    local_rank: int
    world: int
    device: torch.device
    precision: str
    """What the towers compute in."""
    accelerator: Accelerator
    local_world: int = 1
    """Processes on this node."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def scaler(self) -> torch.amp.GradScaler | None:  # pyright: ignore[reportPrivateImportUsage]
        """The loss scaler, for fp16 only."""
        return self.accelerator.scaler if self.precision == "fp16" else None

    def autocast(self) -> AbstractContextManager[None]:
        """The recipe's precision for forward passes."""
        return self.accelerator.autocast()

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world > 1:
            dist.barrier()


def arithmetic(precision: str) -> str:
    """What is computed in where `precision` is asked for: fp32 in place of bf16 on a CPU that has no bf16 products of
    its own (before AVX-512, say), where imitated ones take tens of times as long."""
    return "fp32" if precision == "bf16" and not (torch.cuda.is_available() or has_bf16_products()) else precision


def has_bf16_products() -> bool:
    """Whether this CPU multiplies bf16 matrices faster than it imitates them."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and bool(supported())


@contextmanager
def launched(
    precision: str,
    *,
    deterministic: bool = False,
    trackers: Sequence[str] = (),
    logging_dir: Path | None = None,
    timeout_minutes: float = 10.0,
) -> Generator[Process]:
    """The process group, from launch to teardown; `trackers` are names accelerate knows (wandb, tensorboard).

    `precision` is what the recipe asks for; the process's own is what `arithmetic` makes of it.

    Raises ConfigError where the device cannot do the precision. The group is left on every way out.
    """
    on_gpu, precision = torch.cuda.is_available(), arithmetic(precision)
    if precision == "fp16" and not on_gpu:
        raise ConfigError("training.precision = 'fp16' needs a GPU; on a CPU use 'bf16' or 'fp32'")
    if not on_gpu:
        keep_freed_memory()
    if deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    timeout = timedelta(minutes=timeout_minutes)
    join_group("nccl" if on_gpu else "gloo", timeout)
    accelerator = Accelerator(
        cpu=not on_gpu,  # without it accelerate leaves CPU processes strangers to each other
        mixed_precision="no" if precision == "fp32" else precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        log_with=list(trackers) or None,
        project_dir=logging_dir,
        step_scheduler_with_optimizer=False,
    )
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", 1)), "processes that do not know each other"
    try:
        yield Process(
            rank=accelerator.process_index,
            local_rank=accelerator.local_process_index,
            world=accelerator.num_processes,
            device=accelerator.device,
            precision=precision,
            accelerator=accelerator,
            local_world=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        )
    except UserError:
        if accelerator.num_processes > 1:
            # torchrun's, where another process ended sooner for the same reason: the message has still to be printed.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    finally:
        leave_group()
        # accelerate keeps its state for the life of the interpreter; the next launch may be of another precision.
        AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage]
