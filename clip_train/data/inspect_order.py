"""What a model will see, on paper: the global batches of a recipe, from the formula alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from clip_train.data.batch import digest
from clip_train.data.stream import Stream
from clip_train.errors import DataError


class Row(NamedTuple):
    """One sample of a global batch."""

    step: int
    """As numbered in `metrics.jsonl`: the first is 1."""
    row: int
    rank: int
    worker: int
    """Of the rank's loader workers, in a run that began with step 1."""
    source: str
    shard: str
    epoch: int
    """Of the source, from 0; the whole passes' worth of draws before it, where sampling is with replacement."""
    key: str
    caption: str = ""
    """The chosen one, where captions were asked for."""


def parse_steps(text: str) -> range:
    """`A:B`, both included, or `A` alone; steps as numbered in `metrics.jsonl`.

    Raises:
        DataError: anything else.
    """
    first, colon, last = text.partition(":")
    try:
        steps = range(int(first), int(last if colon else first) + 1)
    except ValueError:
        raise DataError(f"--steps {text}: write A:B, two numbers as in metrics.jsonl, for example 1:3") from None
    if steps.start < 1 or not steps:
        raise DataError(f"--steps {text}: steps are counted from 1, as in metrics.jsonl, and A is not above B")
    return steps


def batch_rows(stream: Stream, step: int, *, ranks: int = 1, workers: int = 1, captions: bool = False) -> list[Row]:
    """The global batch of a step, row by row. Reads no picture, so bad samples are not replaced.

    Raises:
        DataError: the ranks cannot share the batch.
    """
    size = stream.batch_size
    if ranks < 1 or workers < 0 or size % ranks:
        raise DataError(f"data.batch_size {size} cannot be shared by {ranks} ranks: it must be a multiple of them")
    index = step - 1  # the stream counts updates made before, metrics.jsonl those made
    found: list[Row] = []
    texts = stream.captions(index) if captions else [""] * size
    for row, place in enumerate(stream.order.batch(index)):
        source = stream.sources[place.source]
        shard = source.indexes[place.shard]
        rank, worker = row // (size // ranks), index % max(1, workers)
        epoch, key = stream.order.epoch(place), shard.key(place.sample)
        found.append(Row(step, row, rank, worker, source.name, shard.shard, epoch, key, texts[row]))
    return found


def listing(
    stream: Stream, steps: range, *, ranks: int, workers: int, batches_only: bool, captions: bool = False
) -> Iterator[str]:
    """Lines of tab-separated columns, the first naming them."""
    if batches_only:
        yield "step\tbatch\tepoch\tfirst_key\tlast_key"
    else:
        yield "step\tbatch\trow\trank\tworker\tsource\tepoch\tshard\tkey" + "\tcaption" * captions
    for step in steps:
        rows = batch_rows(stream, step, ranks=ranks, workers=workers, captions=captions)
        total = f"{digest((one.row for one in rows), (one.key for one in rows)):016x}"
        if batches_only:
            epoch = stream.order.first(step) / stream.samples
            yield f"{step}\t{total}\t{epoch:.4f}\t{rows[0].key}\t{rows[-1].key}"
            continue
        for one in rows:
            columns = [step, total, one.row, one.rank, one.worker, one.source, one.epoch, one.shard, one.key]
            yield "\t".join(map(str, columns + [" ".join(one.caption.split())] * captions))
