"""From a recipe to its first batch late in an epoch, as a run that is resumed does it: nothing before it is read.

Each round is a process of its own, timed from before the data is looked for (importing is not counted). The first time,
the headers of all shards are listed; after that the listings are in the cache folder.
"""

from __future__ import annotations

import argparse
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from clip_train.bench.measure import machine

SHARDS, BATCH, AT = 100, 256, 0.9

_ROUND = """
import sys, time
from pathlib import Path
from clip_train.data.cache import Cache
from clip_train.data.stream import Stream, open_source
from clip_train.data.transforms import Augment
from tokenizer import BPETokenizer
shards, folder, batch, at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
tokenizer = BPETokenizer.default()
start = time.perf_counter()
stream = Stream([open_source("s", shards, "jpg", "txt", cache=Cache(folder))], tokenizer, Augment(64), seed=0,
                batch_size=batch)
first = stream[int(at * stream.samples) // batch]
print(time.perf_counter() - start, len(first), stream.samples)
"""


def main(args: argparse.Namespace) -> int:
    """Make shards, time rounds with and without listings, print the slowest of each; 1 where the bar is missed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pattern = make_shards(folder, args.samples // SHARDS)
        cold = [seconds(pattern, folder / f"cache-{number}") for number in range(args.rounds)]
        kept = [seconds(pattern, folder / "cache-0") for _ in range(args.rounds)]
    for what, times in (("first start", cold), ("listings kept", kept)):
        shown = ", ".join(f"{value:.2f}" for value in sorted(times))
        print(f"{what}: median {statistics.median(times):.2f} s of {shown}")
    print(f"{args.samples:,} samples in {SHARDS} local shards, from the recipe to the batch at {AT:.0%}; {machine()}")
    worst = max(cold)
    print(f"slowest {worst:.2f} s", flush=True)
    return int(args.bar is not None and worst > args.bar)


def make_shards(folder: Path, samples: int) -> str:
    """Shards of small JPEGs with captions; their pattern."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    for shard in range(SHARDS):
        with tarfile.open(folder / f"s-{shard:03}.tar", "w") as tar:
            for number in range(samples):
                for extension, data in (("jpg", out.getvalue()), ("txt", f"picture {number} of {shard}".encode())):
                    info = tarfile.TarInfo(f"{shard:03}{number:06}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return f"{folder}/s-{{000..{SHARDS - 1:03}}}.tar"


def seconds(pattern: str, cache: Path) -> float:
    """One start in a process of its own."""
    command = [sys.executable, "-c", _ROUND, pattern, str(cache), str(BATCH), str(AT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    took, rows, _ = done.stdout.split()
    assert int(rows) == BATCH
    return float(took)
