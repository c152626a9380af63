"""Saving while training goes on.

    update n | save: buffers are copied | forward, backward of n + 1 | update n + 1 | …
                    '- thread: weights and moments are copied -------'
                                                                     '- thread: written, synced, renamed

Weights and the optimizer's tensors change in one place, the update. So they are copied to host memory *while* the next
gradients are computed, and the update waits for the copy; only what a forward pass changes (BatchNorm's statistics) is
copied before training goes on. The copy is written in the background. Its memory, one time the model and the
optimizer's state of what the process writes, is taken once and used again.

One save runs at a time: the next one waits for it. A failure stops the run, on all processes, at the next step.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from clip_train.errors import TrainingError
from clip_train.runtime import collectives
from clip_train.runtime.process import Process
from clip_train.training.checkpoint import (
    Companions,
    State,
    begin,
    explaining,
    link_and_rotate,
    publish,
    save_checkpoint,
    sync,
    unfinished,
)
from clip_train.training.sharded import KINDS, Part, parts_of, shard_path, write_part

Tensors = Mapping[str, Mapping[str, Tensor]]
"""`model` and `optimizer`, each by name."""


@dataclass
class HostCopies:
    """Host memory for the tensors of a checkpoint, taken at the first save and used again."""

    kept: dict[tuple[str, str], Tensor] = field(default_factory=dict[tuple[str, str], Tensor])

    def copy(self, kind: str, name: str, tensor: Tensor) -> Tensor:
        """A copy of this process's part; from a GPU it is under way until the stream gets there."""
        memory = self.kept.get((kind, name))
        if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
            memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.kept[kind, name] = memory
        return memory.copy_(tensor.detach(), non_blocking=tensor.is_cuda)


class Saver:
    """Writes the checkpoints of a run.

    Args:
        folder: the run's `checkpoints`.
        optimizer: whose updates wait until a copy is complete.
        sharded: every process writes its own shards; otherwise the first process writes whole tensors.
        asynchronous: go on training while a checkpoint is written.
    """

    def __init__(
        self,
        folder: Path,
        process: Process,
        optimizer: torch.optim.Optimizer,
        companions: Companions,
        *,
        sharded: bool,
        asynchronous: bool,
        keep_last: int,
    ) -> None:
        self.folder, self.process, self.companions = folder, process, companions
        self.sharded, self.asynchronous, self.keep_last = sharded, asynchronous, keep_last
        self.stalled = 0.0
        """Seconds for which training has waited."""
        self.copies = HostCopies()
        self._copied = threading.Event()
        self._copied.set()
        self._thread: threading.Thread | None = None
        self._failure = ""
        # Its own group: the writing threads talk while training uses the other one.
        self._group = cast("dist.ProcessGroup", dist.new_group(backend="gloo")) if sharded else None
        self._hook = optimizer.register_step_pre_hook(lambda *_: self.wait_for_copy())

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()
        if kind is None:
            self.finish()
        elif self._thread is not None:
            # Other processes may be gone: do not wait for them for ever, and hardly for who asked twice to end at once.
            self._thread.join(60 if issubclass(kind, Exception) else 5)

    @property
    def busy(self) -> bool:
        """Whether this process is writing."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether this process could not write; `finish` says why, on all processes."""
        return bool(self._failure)

    def save(
        self, state: State, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], moving: Collection[str]
    ) -> None:
        """Save the state of now. All processes call it together.

        `moving` names the tensors of `model` that a forward pass changes. Raises TrainingError where the save
        before this one failed, or, when not asynchronous, this one.
        """
        self.finish()
        started = time.perf_counter()
        state = replace(state, shards=self.process.world if self.sharded else 0)
        tensors: Tensors = {"model": model, "optimizer": optimizer}
        if self.sharded or self.process.is_main:
            parts = {kind: parts_of(tensors[kind], is_main=self.process.is_main) for kind in KINDS}
            if self.asynchronous:
                for name in moving:
                    if name in parts["model"]:
                        part = parts["model"][name]
                        parts["model"][name] = replace(part, tensor=self.copies.copy("model", name, part.tensor))
                self._copied.clear()
                ready = torch.cuda.Event() if self.process.device.type == "cuda" else None
                if ready is not None:
                    ready.record()
                self._thread = threading.Thread(
                    target=self._copy_and_write, args=(state, parts, set(moving), ready), daemon=True
                )
                self._thread.start()
            else:
                self._write(state, parts)
        self.stalled += time.perf_counter() - started
        if not self.asynchronous:
            self.finish()

    def finish(self) -> None:
        """Wait for the save that is under way. Raises TrainingError, on all processes, where it failed."""
        started = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for message in collectives.gather_objects(self._failure):
            if message:
                raise TrainingError(message)
        self.stalled += time.perf_counter() - started

    def wait_for_copy(self) -> None:
        """Until what a save keeps may change."""
        if not self._copied.is_set():
            started = time.perf_counter()
            self._copied.wait()
            self.stalled += time.perf_counter() - started

    def _copy_and_write(
        self, state: State, parts: dict[str, dict[str, Part]], done: set[str], ready: torch.cuda.Event | None
    ) -> None:
        try:
            self._copy(parts, done, ready)
            self._copied.set()
            self._write(state, parts)
        except Exception as error:  # whatever it is, the run must hear of it
            self._failure = self._failure or f"{self.folder}: step {state.step} was not saved: {error!r}"
        finally:
            self._copied.set()

    def _copy(self, parts: dict[str, dict[str, Part]], done: set[str], ready: torch.cuda.Event | None) -> None:
        """Replace what is not copied yet. On a GPU on a stream of its own, behind the update that was saved."""
        stream = None if ready is None else torch.cuda.Stream()
        with torch.cuda.stream(stream):
            if stream is not None and ready is not None:
                stream.wait_event(ready)
            for kind, named in parts.items():
                for name, part in named.items():
                    if kind != "model" or name not in done:
                        named[name] = replace(part, tensor=self.copies.copy(kind, name, part.tensor))
        if stream is not None:
            stream.synchronize()

    def _write(self, state: State, parts: dict[str, dict[str, Part]]) -> None:
        """A failure is kept for `finish`."""
        try:
            if self.sharded:
                self._write_shards(state, parts)
            else:
                whole = {kind: {name: part.tensor for name, part in parts[kind].items()} for kind in KINDS}
                save_checkpoint(
                    self.folder, state, whole["model"], whole["optimizer"], self.companions, keep_last=self.keep_last
                )
        except TrainingError as error:
            self._failure = str(error)

    def _write_shards(self, state: State, parts: dict[str, dict[str, Part]]) -> None:
        """The first process makes the folder, all write into it, the first gives it its name."""
        final, rank = self.folder / f"step_{state.step}", self.process.rank

        def write() -> None:
            for kind in KINDS:
                write_part(unfinished(final) / kind, rank, state.shards, parts[kind])
                sync(shard_path(unfinished(final) / kind, rank, state.shards))

        def close() -> None:
            publish(final, state, self.companions)
            link_and_rotate(final, self.keep_last)

        self._together(final, (lambda: begin(final)) if rank == 0 else None)
        self._together(final, write)
        self._together(final, close if rank == 0 else None)

    def _together(self, final: Path, work: Callable[[], Any] | None) -> None:
        """Work, then learn whether it went well everywhere."""
        failure = ""
        try:
            if work is not None:
                with explaining(final):
                    work()
        except TrainingError as error:
            failure = str(error)
        for message in collectives.gather_objects(failure, self._group):
            if message:
                if self.process.is_main:
                    shutil.rmtree(unfinished(final), ignore_errors=True)
                raise TrainingError(message)
