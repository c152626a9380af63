"""Memory of the input side, epoch after epoch: it must stay where it is.

`clip-train bench memory RECIPE --epochs 10 --workers 2 --bar 5` reads the recipe's batches, and after each epoch adds
up what this process and its workers hold: anonymous and shared memory as the kernel's PSS has it, which divides a page
among those who share it (files that are mapped, as libraries are, are left out). The first epochs (`--fill`) fill
caches and the allocator's pools; the bar is on the others.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import re
from pathlib import Path

from clip_train.config import load_recipe
from clip_train.errors import ConfigError
from clip_train.from_recipe.data import build_loader, build_stream
from clip_train.from_recipe.model import build_tokenizer


def main(args: argparse.Namespace) -> int:
    """Print a line an epoch; 1 where the bar is missed."""
    epochs = epoch_memory(args.overrides, args.recipe, args.epochs + args.fill - 1, args.workers)
    first = epochs[args.fill]
    print("epoch\tMiB\tchange")
    for number, size in enumerate(epochs):
        print(f"{number}\t{size / 2**20:.1f}\t{100 * (size / first - 1):+.2f} %" + " (filling)" * (number < args.fill))
    worst = max(abs(size / first - 1) for size in epochs[args.fill :])
    print(f"largest change after filling: {100 * worst:.2f} %")
    return int(args.bar is not None and 100 * worst > args.bar)


def epoch_memory(overrides: list[str], recipe: str | Path, epochs: int, workers: int) -> list[int]:
    """Bytes that this process and its workers hold at the end of each of `epochs + 1` epochs.

    Raises ConfigError where the system does not tell.
    """
    loaded = load_recipe(recipe, [*overrides, f"data.workers={workers}"])
    stream = build_stream(loaded, build_tokenizer(loaded))
    per_epoch = -(-stream.samples // stream.batch_size)
    found: list[int] = []
    before = set(multiprocessing.active_children())
    # An epoch more than is measured, so that no worker has come to its end yet.
    for step, _ in enumerate(build_loader(loaded, stream, 0, per_epoch * (epochs + 2)), 1):
        if step % per_epoch == 0:
            gc.collect()
            own = [child.pid for child in set(multiprocessing.active_children()) - before]
            found.append(sum(_held(pid) for pid in ["self", *own]))
            if len(found) > epochs:
                break
    return found


def _held(pid: object) -> int:
    path = Path(f"/proc/{pid}/smaps_rollup")
    try:
        parts = re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; memory is measured on Linux only") from error
    return 1024 * sum(map(int, parts))
