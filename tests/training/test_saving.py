"""A checkpoint written while training goes on holds the state of when it was asked for, and is whole or absent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from clip_train.cli import main
from clip_train.errors import TrainingError
from clip_train.runtime.process import Process, launched
from clip_train.training.checkpoint import Companions, State, list_checkpoints, read_checkpoint
from clip_train.training.optimizer import named_state
from clip_train.training.saving import HostCopies, Saver

COMPANIONS = Companions('name = "x"\n', lambda path: path.write_text("{}"))


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with launched("fp32") as one:
        yield one


class Training:
    """A model with BatchNorm, trained on noise, and its saver."""

    def __init__(self, folder: Path, process: Process, *, asynchronous: bool = True) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.saver = Saver(
            folder, process, self.optimizer, COMPANIONS, sharded=False, asynchronous=asynchronous, keep_last=9
        )
        self.step = 0

    def gradients(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(8, 4)).square().sum().backward()

    def update(self) -> None:
        self.gradients()
        self.optimizer.step()
        self.step += 1

    def state(self) -> dict[str, torch.Tensor]:
        tensors = {**self.model.state_dict(), **named_state(self.optimizer, self.model)}  # type: ignore[dict-item]
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def save(self) -> None:
        state = State(step=self.step, samples=0, data_fingerprint="d", tokenizer_fingerprint="t")
        optimizer = named_state(self.optimizer, self.model)
        self.saver.save(state, self.model.state_dict(), optimizer, dict(self.model.named_buffers()))


def saved(path: Path) -> dict[str, torch.Tensor]:
    return {**load_file(path / "model.safetensors"), **load_file(path / "optimizer.safetensors")}


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_state_saved_is_that_of_the_call(
    tmp_path: Path, process: Process, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """However slow the copies and the disk are: the next forward passes and updates do not get into it."""
    copy = HostCopies.copy

    def slowly(self: HostCopies, kind: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.02)
        return copy(self, kind, name, tensor)

    monkeypatch.setattr(HostCopies, "copy", slowly)
    training, expected = Training(tmp_path, process, asynchronous=asynchronous), {}
    with training.saver:
        for _ in range(3):
            training.update()
            training.save()
            expected[training.step] = training.state()
            training.update()  # changes statistics, then weights and moments
    for step, tensors in expected.items():
        found = saved(tmp_path / f"step_{step}")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items()), step
    assert (tmp_path / "latest").readlink() == Path("step_5")


def test_only_the_update_waits_for_the_copy(tmp_path: Path, process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    may_copy, may_write = threading.Event(), threading.Event()
    copy, write = getattr(Saver, "_copy"), getattr(Saver, "_write")  # noqa: B009
    monkeypatch.setattr(Saver, "_copy", lambda *args: may_copy.wait(60) and copy(*args))
    monkeypatch.setattr(Saver, "_write", lambda *args: may_write.wait(60) and write(*args))
    training = Training(tmp_path, process)
    training.update()
    with training.saver:
        training.save()
        training.gradients()  # nothing is copied, and these do not wait
        update = threading.Thread(target=training.optimizer.step)
        update.start()
        update.join(0.3)
        assert update.is_alive(), "the update waits"
        may_copy.set()
        update.join(60)
        assert not update.is_alive(), "but not for the write"
        assert not list_checkpoints(tmp_path)
        may_write.set()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_1"]


def test_memory_is_taken_once(tmp_path: Path, process: Process) -> None:
    training = Training(tmp_path, process)
    with training.saver:
        training.update()
        training.save()
        training.saver.finish()
        taken = {key: memory.data_ptr() for key, memory in training.saver.copies.kept.items()}
        training.update()
        training.save()
        training.saver.finish()
        assert {key: memory.data_ptr() for key, memory in training.saver.copies.kept.items()} == taken
        assert len(taken) == len(training.state())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("what nobody thought of")])
def test_a_failure_is_told_at_the_next_step(
    tmp_path: Path, process: Process, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("clip_train.training.checkpoint.save_file", fails)
    training = Training(tmp_path, process)
    training.update()
    training.save()
    deadline = time.monotonic() + 30
    while not training.saver.failed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert training.saver.failed
    with pytest.raises(TrainingError, match=str(error.args[-1])):
        training.saver.finish()


def test_the_benchmark_tells_its_ratio(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "checkpoint", "debug", "--rounds", "1", "--batch", "2", "--folder", str(tmp_path)]
    assert main([*arguments, "--bar", "1e9"]) == 1
    out = capfd.readouterr().out
    assert "below the bar" in out
    assert float(out.splitlines()[-1].removeprefix("ratio ")) > 0
    assert not list(tmp_path.iterdir())


SLOW_WRITER = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_saving import Training, launched
from clip_train.training import checkpoint
with launched("fp32") as process:
    training = Training(Path({folder!r}), process)
    training.update()
    training.save()
    training.saver.finish()
    write = checkpoint.save_file
    def slowly(tensors, path):
        write(tensors, path)
        time.sleep(60)
    checkpoint.save_file = slowly
    training.update()
    training.save()
    training.update()
    print("going on", flush=True)
    time.sleep(60)
"""


def test_kill_in_the_middle_of_a_write_leaves_whole_checkpoints(tmp_path: Path, process: Process) -> None:
    script = SLOW_WRITER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "going on\n"
    unfinished = tmp_path / ".step_2.partial/model.safetensors"
    deadline = time.monotonic() + 30
    while not unfinished.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait(30)
    assert unfinished.exists()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_1"]
    assert read_checkpoint(tmp_path).state.step == 1

    training = Training(tmp_path, process)
    for _ in range(3):
        training.update()
    with training.saver:
        training.save()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_1", "step_3"]
