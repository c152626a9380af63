"""torchrun restarts what died; the run goes on where its newest checkpoint stands: nothing lost, nothing repeated."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import metrics_of, run_cli
from processes import TORCHRUN, free_port, has_step, listens, started, wait_until, worker


@pytest.fixture(scope="module")
def tree(shards: str) -> dict[str, Any]:
    """A run of 60 steps, long enough to be hit in its middle."""
    return {
        "name": "tiny",
        "data": {"batch_size": 8, "workers": 0, "sources": {"s": {"shards": shards, "image": "png"}}},
        "image": {"kind": "vit", "image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "heads": 2},
        "text": {"width": 16, "layers": 1, "heads": 2},
        "model": {"embed_dim": 8},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "schedule": {"kind": "cosine", "warmup_steps": 2},
        "training": {"steps": 60, "precision": "fp32"},
        "checkpoint": {"every_steps": 5},
        "logging": {"every_steps": 1},
    }


@pytest.fixture(scope="module")
def whole(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of the run that nothing happened to, on one process."""
    import tomli_w

    folder = tmp_path_factory.mktemp("whole")
    (folder / "recipe.toml").write_text(tomli_w.dumps(tree))
    done = run_cli("train", str(folder / "recipe.toml"), "--run-dir", str(folder / "run"))
    assert done.returncode == 0, done.stderr
    return metrics_of(folder / "run")


def assert_same_run(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected], "nothing lost, nothing repeated"
    for a, b in zip(found, expected, strict=True):
        assert a["batch"] == b["batch"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.timeout(600)
def test_kill_9_of_one_of_two_ranks(
    tmp_path: Path,
    tree: dict[str, Any],
    whole: list[dict[str, Any]],
    write_recipe: Callable[..., Path],
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = [*TORCHRUN, "--nproc-per-node=2", "--max-restarts=3", "--rdzv-backend=c10d",
               f"--rdzv-endpoint=127.0.0.1:{free_port()}",
               "-m", "clip_train", "train", str(write_recipe(tree)), "--run-dir", str(run_dir)]  # fmt: skip
    with started(command, log) as agent:
        for step, rank in ((12, 1), (30, 0)):  # the second time the store holds two generations' traces
            wait_until(has_step(run_dir, step), f"step {step}", log)
            os.kill(worker(agent.pid, rank), signal.SIGKILL)
        assert agent.wait(240) == 0, log.read_text()
    said = log.read_text()
    assert said.count("resuming from") == 2
    assert said.index("rank 1 on") < said.index("rank 0 on"), "each was named by the other"
    assert_same_run(metrics_of(run_dir), whole)


@pytest.mark.timeout(600)
def test_a_lost_node_leaves_the_other_to_go_on(
    tmp_path: Path, tree: dict[str, Any], whole: list[dict[str, Any]], write_recipe: Callable[..., Path]
) -> None:
    """Two agents of one worker each, on loopback; the second is killed with its worker, as if its machine were gone."""
    run_dir, recipe, port = tmp_path / "run", write_recipe(tree), free_port()
    conf = "join_timeout=120,last_call_timeout=30,keep_alive_interval=1,keep_alive_max_attempt=2"
    command = [*TORCHRUN, "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d",
               "--rdzv-id=one", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf={conf}", "--local-addr=127.0.0.1",
               "-m", "clip_train", "train", str(recipe), "--run-dir", str(run_dir)]  # fmt: skip
    logs = tmp_path / "log_0", tmp_path / "log_1"
    with started(command, logs[0]) as first:
        wait_until(listens(port), "the first agent's rendezvous", logs[0])  # whoever comes first is its host
        with started(command, logs[1]):
            wait_until(has_step(run_dir, 12), "step 12", logs[0])
            assert '"processes": "2"' in (run_dir / "environment.json").read_text()
        assert first.wait(240) == 0, logs[0].read_text()
    assert '"processes": "1"' in (run_dir / "environment.json").read_text()
    assert_same_run(metrics_of(run_dir), whole)
