"""Real runs, many and cheap: a process imports everything once and forks each rank of each run.

python tests/training/forked.py elastic|kills RECIPE OUT

Every rank writes down what its loop consumes (`OUT/RUN.jsonl`): step, row, key, and a digest of the pixels and ids.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clip_train.cli import main
from clip_train.data.batch import Batch
from clip_train.training import setup, trainer
from clip_train.training.setup import Run
from tokenizer import BPETokenizer

KILLS = 50
STEPS = 600  # more than fifty starts get through


@dataclass
class Started:
    """The ranks of a run."""

    pids: list[int]
    record: Path
    _read: int = 0
    _step: int = 0

    def steps(self) -> int:
        """The furthest step that was consumed; reads only what is new."""
        if self.record.exists():
            with self.record.open("rb") as stream:
                stream.seek(self._read)
                *lines, _ = stream.read().split(b"\n")
            self._read += sum(len(line) + 1 for line in lines)
            self._step = max(self._step, *(json.loads(line)["step"] for line in lines), 0)
        return self._step

    def died(self) -> bool:
        """Whether a rank ended with an error. It may be waited for again."""
        found = [os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in self.pids]
        return any(one is not None and one.si_status != 0 for one in found)

    def kill(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        for pid in self.pids:
            os.waitpid(pid, 0)

    def wait(self) -> None:
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]
        assert codes == [0] * len(codes), self.record.with_suffix(".log").read_text()

    def over(self) -> bool:
        """Whether it ended by itself; then nobody may wait for it again."""
        done = [os.waitpid(pid, os.WNOHANG) for pid in self.pids]
        assert all(status == 0 for _, status in done), self.record.with_suffix(".log").read_text()
        return any(pid for pid, _ in done)


def start(recipe: Path, out: Path, name: str, *, ranks: int, workers: int, overrides: tuple[str, ...] = ()) -> Started:
    """Fork the ranks of `clip-train train`."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    arguments = ["train", str(recipe), "--run-dir", str(out / name), "--set", f"data.workers={workers}"]
    arguments += [part for override in overrides for part in ("--set", override)]
    pids: list[int] = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with (out / f"{name}.log").open("a") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                if ranks > 1:
                    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
                    whoami = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                    os.environ |= {key: str(value) for key, value in {**where, **whoami}.items()}
                record_batches(out / f"{name}.jsonl")
                code = main(arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        pids.append(pid)
    return Started(pids, out / f"{name}.jsonl")


def record_batches(path: Path) -> None:
    """Have this process's loop write down what it gets."""
    original = trainer.next_batch

    def recorded(batches: Iterator[Batch], run: Run) -> Batch:
        batch = original(batches, run)
        lines: list[str] = []
        captions = batch.ids.split(batch.lengths.tolist())
        for row, key, pixels, ids in zip(batch.rows.tolist(), batch.keys, batch.images, captions, strict=True):
            digest = hashlib.blake2b(pixels.numpy().tobytes() + ids.numpy().tobytes(), digest_size=8).hexdigest()
            lines.append(json.dumps({"step": run.step + 1, "row": row, "key": key, "digest": digest}) + "\n")
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, "".join(lines).encode())  # one write: a kill cuts no line in two
        os.close(descriptor)
        return batch

    trainer.next_batch = recorded


def elastic(recipe: Path, out: Path) -> None:
    """An epoch on (1 rank, 0 workers), on (2, 2), and on (4, 1), killed twice and resumed on (2, 1)."""
    start(recipe, out, "one", ranks=1, workers=0).wait()
    start(recipe, out, "two", ranks=2, workers=2).wait()
    for _ in range(2):
        run = start(recipe, out, "four", ranks=4, workers=1)
        target = min(run.steps() + 3, 8)  # it may have come to the last one before it was killed
        while run.steps() < target and not run.died():
            time.sleep(0.01)
        run.kill()
    start(recipe, out, "four", ranks=2, workers=1).wait()


def kills(recipe: Path, out: Path) -> None:
    """The run that nobody touched, and the one that was killed at random moments."""
    length = (f"training.steps={STEPS}",)
    start(recipe, out, "whole", ranks=1, workers=0, overrides=length).wait()
    chance, done = random.Random(0), 0
    for done in range(KILLS):
        run = start(recipe, out, "killed", ranks=1, workers=done % 2, overrides=length)
        # Half of them somewhere on the way to the first step, the others a few steps later.
        begun, steps, delay = run.steps(), chance.choice([0, 0, 1, 2, 4, 6]), chance.uniform(0.0, 0.3)
        while steps and run.steps() < min(begun + steps, STEPS - 1):
            time.sleep(0.002)
        time.sleep(delay * (0.1 if steps else 1.0))
        if run.over():
            break
        run.kill()
    else:
        done += 1
    start(recipe, out, "killed", ranks=1, workers=0, overrides=length).wait()
    (out / "kills").write_text(str(done))


if __name__ == "__main__":
    # What each start would do anew: import, measure the processor, read the vocabulary.
    trainer.measured_peak_flops = lambda device, precision: 1e12  # type: ignore[assignment]
    for module in ("clip_train.launch", "torch._dynamo"):
        importlib.import_module(module)
    tokenizer = BPETokenizer.default()
    setup.build_tokenizer = lambda recipe: tokenizer
    command, recipe, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    {"elastic": elastic, "kills": kills}[command](recipe, out)
