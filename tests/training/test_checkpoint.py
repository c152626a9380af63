"""A checkpoint is whole or is not there, and holds nothing that can run code."""

from __future__ import annotations

import json
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clip_train.errors import CheckpointError, TrainingError
from clip_train.training.checkpoint import (
    Companions,
    State,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    save_checkpoint,
)


def save(folder: Path, step: int, keep_last: int = 3, size: int = 4) -> Path:
    return save_checkpoint(
        folder,
        State(step=step, samples=8 * step, data_fingerprint="d", tokenizer_fingerprint="t"),
        {"weight": torch.full((size,), float(step))},
        {"exp_avg/weight": torch.zeros(size)},
        Companions('name = "x"\n', lambda path: path.write_text("{}")),
        keep_last=keep_last,
    )


def test_round_trip_latest_and_rotation(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 10, 9):
        save(folder, step)
    assert [path.name for path in list_checkpoints(folder)] == ["step_2", "step_9", "step_10"]
    assert (folder / "latest").readlink() == Path("step_9")
    for path in (tmp_path, folder, folder / "latest", folder / "step_9"):
        checkpoint = read_checkpoint(path)
        assert checkpoint.state.step == 9
        assert checkpoint.state.samples == 72
        assert torch.equal(checkpoint.model()["weight"], torch.full((4,), 9.0))


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # writes beyond it fail, as on a full disk
sys.path.insert(0, {tests!r})
from test_checkpoint import save
from clip_train.errors import TrainingError
try:
    save(Path({folder!r}), 2, size=1_000_000)
except TrainingError as error:
    print("refused:", error)
"""


def test_full_disk_leaves_the_old_checkpoint_whole(tmp_path: Path) -> None:
    save(tmp_path, 1)
    script = FULL_DISK.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "refused:" in done.stdout, done.stdout + done.stderr
    assert "--resume auto" in done.stdout
    assert read_checkpoint(tmp_path).state.step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_1"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(TrainingError, match="could not be written"):
        save(tmp_path / "checkpoints", 1)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("owned"),))  # type: ignore[return-value]


def test_a_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="can run code"):
        read_checkpoint(tmp_path / "model.pt")
    path = save(tmp_path / "run", 1)
    (path / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="safetensors"):
        read_checkpoint(path).model()
    assert not (tmp_path / "owned").exists()


def test_damage_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-3])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_checkpoint(path).model()
    (path / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json: damaged"):
        read_checkpoint(path)
    (path / "recipe.toml").unlink()
    with pytest.raises(CheckpointError, match=r"recipe\.toml missing"):
        read_checkpoint(path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        read_checkpoint(path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such run"):
        find_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
