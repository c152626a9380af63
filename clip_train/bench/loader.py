"""Our loader beside open_clip's own, `open_clip_train.data.get_wds_dataset`, and beside decoding alone.

    clip-train bench loader --bar 1.4                       # JPEGs of about 512 x 384, made here
    clip-train bench loader --threads 2 --share-bar 0.85    # two threads in our one worker process
    clip-train bench loader --photo 1280x960 --scaled       # decoding at half size where the crop allows it
    clip-train bench loader 'mine-{00..09}.tar' --ways 0:1 1:1 1:2 2:1

Both sides read the same local shards and give what their trainer gives to its model: pictures of `--size` as normalised
fp32, and ids padded. open_clip: `image_transform(is_train=True)` (random resized crop (0.9, 1), bicubic, antialiased;
normalised in the worker), its tokenizer, its shuffle buffers. Ours: the same crop and a flip besides, our tokenizer
with the same vocabulary; normalised and padded in the main process, as the trainer does, and counted. Decoding alone is
what no loader with one thread can exceed: it reads and decodes our samples in our order, in this process, and nothing
else.

Every side has its worker process for the whole time. Before a side is timed all others' workers are at rest, and the
batches that were read ahead are used up. CPU time is that of all processes of a side.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from clip_train.bench.measure import conclude, machine
from clip_train.bench.photos import photo_shards
from clip_train.config.schema import Preprocess
from clip_train.data import columns
from clip_train.data.cache import default_folder
from clip_train.data.decode import decode
from clip_train.data.files import ShardFiles
from clip_train.data.hashing import uniform
from clip_train.data.loader import Loader
from clip_train.data.shards import resolve
from clip_train.data.stream import SourceData, Stream, open_source
from clip_train.data.transforms import DRAWS, Augment, crop_box, normalize, resize_crop
from clip_train.errors import UserError
from clip_train.runtime.memory import keep_freed_memory
from tokenizer import BPETokenizer

AHEAD = 2  # batches that a worker of either side reads ahead
ENDLESS = 1 << 40
LOOK = Preprocess()
PEER = "open_clip"


@dataclass
class Side:
    """An endless iterator over batches, and what its rounds gave."""

    name: str
    batches: Iterator[object]
    ahead: int
    """Batches that may lie ready when a round begins."""
    rates: list[float] = field(default_factory=list[float])
    cpu_rates: list[float] = field(default_factory=list[float])

    @property
    def rate(self) -> float:
        """Samples a second, the median of the rounds."""
        return statistics.median(self.rates)


def main(args: argparse.Namespace) -> int:
    """Check that both give the same pictures, time them, print one table and the ratio."""
    console = Console(highlight=False, soft_wrap=True)
    torch.set_num_threads(1)  # in every process
    torch.cuda.is_available = lambda: False
    keep_freed_memory()  # as the trainer does on CPU; all sides have it
    shards = [str(path) for path in _shards(args, console)]
    source = open_source("bench", shards, "jpg;jpeg;png;webp", "txt")
    augment = Augment(args.size, flip=0.5, scaled_decode=args.scaled)
    _describe(source, console)
    check_same_pixels(source, augment, console)
    if args.scaled:
        report_psnr(source, augment, console)

    def ours(workers: int, threads: int) -> Side:
        name = f"clip-train, {workers} x {threads}"
        return Side(name, our_batches(source, augment, args.batch_size, workers, threads), AHEAD * workers)

    sides = {
        PEER: Side(
            f"open_clip, {args.workers} x 1",
            open_clip_batches(shards, args.size, args.batch_size, args.workers),
            AHEAD * args.workers,
        ),
        "ours": ours(args.workers, args.threads),
        "decoding": Side("decoding alone, 1 thread", decode_only(source, augment, args.batch_size), 0),
    }
    if args.threads > 1:
        name = f"decoding alone, {args.threads} threads"
        sides["pool"] = Side(name, decode_only(source, augment, args.batch_size, args.threads), 0)
    for workers, threads in args.ways:
        sides[f"{workers}:{threads}"] = ours(workers, threads)

    with console.status("timing"):
        for _ in range(args.rounds):
            for side in sides.values():
                time_round(side, args.batches, args.batch_size)

    title = f"{args.size} px views, batches of {args.batch_size}, worker processes x threads, {args.rounds} rounds"
    table = Table(title=title)
    for column in ("", "samples/s", "of decoding alone", "beside open_clip", "samples per CPU second"):
        table.add_column(column, justify="right" if column else "left")
    for side in sides.values():
        table.add_row(
            side.name,
            f"{side.rate:,.0f}",
            f"{100 * paired_ratio(side, sides['decoding']):.0f} %",
            f"{paired_ratio(side, sides[PEER]):.2f}",
            f"{statistics.median(side.cpu_rates):,.0f}",
        )
    console.print(table)
    console.print(machine())
    share = paired_ratio(sides["ours"], sides["decoding"])
    short = args.share_bar is not None and share < args.share_bar
    if short:
        console.print(f"{share:.2f} of decoding alone is below the bar of {args.share_bar:.2f}")
    return conclude(paired_ratio(sides["ours"], sides[PEER]), args.bar, console) or int(short)


def paired_ratio(side: Side, other: Side) -> float:
    """Median over the rounds of one's rate over the other's in the same round."""
    return statistics.median(a / b for a, b in zip(side.rates, other.rates, strict=True))


def time_round(side: Side, batches: int, batch_size: int) -> None:
    """Time `batches` batches of a side, once nothing else runs and nothing lies ready any more."""
    _rest()
    for _ in range(side.ahead + 1):
        next(side.batches)
    start, cpu = time.perf_counter(), _cpu_seconds()
    for _ in range(batches):
        next(side.batches)
    samples = batches * batch_size
    side.rates.append(samples / (time.perf_counter() - start))
    side.cpu_rates.append(samples / max(1e-9, _cpu_seconds() - cpu))


def our_batches(source: SourceData, augment: Augment, batch_size: int, workers: int, threads: int) -> Iterator[object]:
    """What our trainer has in its hands before a step."""
    from open_clip.tokenizer import default_bpe

    tokenizer = BPETokenizer.from_openai(default_bpe())
    stream = Stream([source], tokenizer, augment, seed=0, batch_size=batch_size, threads=threads)
    for batch in Loader(stream, range(ENDLESS), workers=workers, prefetch=AHEAD):
        yield normalize(batch.pictures, LOOK.mean, LOOK.std), batch.padded_ids(tokenizer.pad)


def open_clip_batches(shards: list[str], size: int, batch_size: int, workers: int) -> Iterator[object]:
    """open_clip's loader, as its trainer makes it."""
    from open_clip import image_transform
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip_train import data as peer

    # open_clip wants webdataset <= 0.2.86; later ones mark the end of a shard with an empty member, at which it stops.
    expand = peer.tar_file_expander
    peer.tar_file_expander = lambda *given, **options: (member for member in expand(*given, **options) if member)
    args = SimpleNamespace(
        train_data="::".join(shards),
        train_num_samples=1 << 24,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=batch_size,
        workers=workers,
        world_size=1,
        seed=0,
    )
    transform: Any = image_transform(size, is_train=True)
    return iter(peer.get_wds_dataset(args, transform, is_train=True, tokenizer=SimpleTokenizer()).dataloader)


def decode_only(source: SourceData, augment: Augment, batch_size: int, threads: int = 1) -> Iterator[object]:
    """Reading and decoding in this process."""
    stream = Stream([source], _NoTokens(), augment, seed=0, batch_size=batch_size)
    files, pool = ShardFiles(), ThreadPoolExecutor(threads)

    def one(number: int, shard: int, sample: int) -> None:
        _, data = columns.read(files, source.indexes[shard], sample, source.pictures)
        if augment.scaled_decode:
            augment.part(data, uniform(0, number, np.arange(DRAWS)))
        else:
            decode(data)

    for step in range(ENDLESS):
        places = [(row, place.shard, place.sample) for row, place in enumerate(stream.order.batch(step))]
        if threads == 1:
            for place in places:
                one(*place)
        else:
            list(pool.map(lambda place: one(*place), places))
        yield None


class _NoTokens:
    """Captions are not read."""

    def encode_counting_cuts(self, texts: list[str]) -> Any:
        raise NotImplementedError


def check_same_pixels(source: SourceData, augment: Augment, console: Console, count: int = 16) -> None:
    """Both make the same views out of the same boxes, to a grey level for 99 % of the values of each picture.

    Not for all: Pillow from 13 on resizes tall pictures in height first, torch always in width first, and both clip in
    between, which shows where a filter overshoots.

    Raises:
        UserError: they do not.
    """
    from open_clip import image_transform

    theirs: Any = image_transform(augment.size, is_train=True)
    std = torch.tensor(LOOK.std).view(3, 1, 1)
    apart = total = 0.0
    for sample, data in enumerate(_files(source, count)):
        pixels = decode(data)
        height, width, _ = pixels.shape
        draws = uniform(1, sample, np.arange(DRAWS))
        box = crop_box(width, height, augment.crop_scale, augment.crop_ratio, draws[12:])
        theirs.transforms[0].get_params = lambda *_, box=box: (box[1], box[0], box[3], box[2])
        expected = theirs(Image.open(io.BytesIO(data)).convert("RGB"))  # as webdataset's "pilrgb"
        found = normalize(resize_crop(pixels, box, augment.size, augment.interpolation)[None], LOOK.mean, LOOK.std)[0]
        difference = ((found - expected) * std * 255).abs()
        apart = max(apart, float(torch.quantile(difference, 0.99)))
        total += float(difference.mean())
    if apart > 1.5:  # whole levels, but for the rounding of floats
        raise UserError(f"for the same crop, open_clip's pixels differ by {apart:.1f} grey levels from ours")
    console.print(f"same crops, same pixels as open_clip: {total / count:.3f} grey levels apart on average")


def report_psnr(source: SourceData, augment: Augment, console: Console, count: int = 64) -> None:
    """Scaled against exact decoding: peak signal-to-noise ratio of the views, and how many pictures were shrunk."""
    exact = replace(augment, scaled_decode=False)
    decibels: list[float] = []
    seen = 0
    for sample, data in enumerate(_files(source, count)):
        seen += 1
        draws = uniform(1, sample, np.arange(DRAWS))
        error = (augment.view(data, draws).double() - exact.view(data, draws).double()).square().mean()
        if error:
            decibels.append(float(10 * torch.log10(255**2 / error)))
    shown = f"; PSNR of their views {statistics.median(decibels):.1f} dB (median), {min(decibels):.1f} dB at least"
    console.print(f"scaled decoding shrinks {len(decibels)} of {seen} pictures{shown if decibels else ''}")


def _files(source: SourceData, count: int) -> Iterator[bytes]:
    files = ShardFiles()
    for sample in range(min(count, len(source.indexes[0]))):
        yield columns.read(files, source.indexes[0], sample, source.pictures)[1]


def _describe(source: SourceData, console: Console) -> None:
    sizes = [len(data) for data in _files(source, 256)]
    height, width, _ = decode(next(_files(source, 1))).shape
    console.print(
        f"{sum(source.counts):,} pictures in {len(source.indexes)} shards, {statistics.mean(sizes) / 1000:.0f} kB on "
        f"average, the first of {width} x {height} pixels"
    )


def _shards(args: argparse.Namespace, console: Console) -> list[str]:
    if args.shards:
        return resolve(args.shards)
    width, height = args.photo
    folder: Path = default_folder().parent / "bench"
    with console.status(f"making JPEGs of about {width} x {height} in {folder}"):
        return [str(path) for path in photo_shards(folder, width=width, height=height)]


def _cpu_seconds() -> float:
    """Of this process and its children, which are all workers of the sides."""
    this = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in [this, *this.children(recursive=True)])


def _rest(quiet: float = 0.05, at_most: float = 20.0) -> None:
    """Wait until no worker computes any more: what it reads ahead is bounded."""
    until = time.monotonic() + at_most
    before = _children_cpu()
    while time.monotonic() < until:
        time.sleep(quiet)
        now = _children_cpu()
        if now == before:
            return
        before = now


def _children_cpu() -> float:
    return sum(sum(one.cpu_times()[:2]) for one in psutil.Process().children(recursive=True))
