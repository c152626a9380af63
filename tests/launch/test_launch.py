"""The launch files: their syntax, and each for real on two gloo processes; Slurm's commands are stand-ins."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import metrics_of, run_cli

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
BIN = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
SHORT = ("--set", "training.steps=2", "--set", "evaluation.tasks={}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax(script: str) -> None:
    done = subprocess.run(["bash", "-n", str(LAUNCH / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck(script: str) -> None:
    shellcheck = shutil.which("shellcheck", path=BIN)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, "--shell=bash", str(LAUNCH / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("command", ["torchrun", "multinode", "accelerate"])
def test_two_processes(command: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PROCESSES": "2", "PATH": BIN, "HEAD": "localhost:0", "NODES": "1"}
    start = {
        "torchrun": [str(LAUNCH / "torchrun.sh")],
        "multinode": [str(LAUNCH / "torchrun-multinode.sh")],
        "accelerate": ["accelerate", "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
                       "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0",
                       "-m", "clip_train", "train"],
    }[command]  # fmt: skip
    done = subprocess.run(
        [*start, "debug", "--run-dir", str(tmp_path / "run"), *SHORT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "2 × cpu" in done.stdout
    assert metrics_of(tmp_path / "run")[-1]["step"] == 2
    assert not (tmp_path / "run/INTERRUPTED").exists()


@pytest.mark.timeout(600)
def test_slurm_queues_a_signalled_job_again_and_it_goes_on_exactly(
    tmp_path: Path, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path]
) -> None:
    """`srun` runs its command here; `scontrol` knows one node and writes down what it is asked."""
    recipe_tree["training"]["steps"] = 2000
    recipe_tree["checkpoint"]["every_steps"] = 10_000
    recipe_tree["evaluation"] = {"tasks": {}}
    recipe_tree["schedule"] = {"kind": "constant", "warmup_steps": 2}
    recipe, run_dir, whole, asked = write_recipe(recipe_tree), tmp_path / "run", tmp_path / "whole", tmp_path / "asked"
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name, text in (
        ("srun", 'while [[ "$1" == -* ]]; do shift; done\nexec "$@"'),
        ("scontrol", f'if [ "$1" = show ]; then echo localhost; else echo "$@" >> {asked}; fi'),
    ):
        (stand_ins / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (stand_ins / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{stand_ins}:{BIN}", "RUN_DIR": str(run_dir), "PORT": "0", "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2",
    }  # fmt: skip
    command = ["bash", str(LAUNCH / "slurm.sbatch"), str(recipe)]

    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while not ((run_dir / "metrics.jsonl").exists() and len(metrics_of(run_dir)) > 3):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        os.killpg(job.pid, signal.SIGUSR1)  # as Slurm: torchrun and its workers alike
        job.wait(240)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    told = json.loads((run_dir / "INTERRUPTED").read_text())
    assert told["signal"] == "SIGUSR1"
    assert 3 < told["step"] < 2000
    assert asked.read_text() == "requeue 7\n", (tmp_path / "log").read_text()

    recipe_tree["training"]["steps"] = told["step"] + 20  # the schedule is constant: what was done stays as it is
    write_recipe(recipe_tree)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert f"at step {told['step']}" in done.stdout
    assert not (run_dir / "INTERRUPTED").exists()
    assert asked.read_text() == "requeue 7\n", "a finished job is not queued again"
    assert run_cli("train", str(recipe), "--run-dir", str(whole)).returncode == 0
    for a, b in zip(metrics_of(run_dir), metrics_of(whole), strict=True):
        assert a["batch"] == b["batch"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_kubernetes_file_fits_together() -> None:
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert (service["kind"], job["apiVersion"], job["kind"]) == ("Service", "batch/v1", "Job")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    head = env["HEAD"].split(":")[0]
    assert head == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert int(env["NODES"]) == spec["completions"]
    assert int(env["SHUTDOWN_SECONDS"]) < pod["terminationGracePeriodSeconds"]
    assert os.access(LAUNCH.parent / container["command"][0], os.X_OK)
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
