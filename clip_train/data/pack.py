"""Making shards: any source of pictures with captions, or of texts alone -> tars, and what is in them.

Row i goes to shard i // per_shard whatever becomes of the rows before it. So shards do not depend on each other:
worker processes write them side by side, and a pack that was interrupted goes on with those that are missing.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from clip_train.data.bad_samples import too_many
from clip_train.data.pack_folder import Packed, finish, open_output, write_text
from clip_train.data.pack_shard import Format, PictureOptions, Record, ShardRecord, Skipped, write_shard
from clip_train.data.pack_sources import Fields, Source, choose, from_rows, records
from clip_train.data.pack_workers import progress_bar, worker_pool
from clip_train.errors import DataError


def pack(
    samples: Iterable[Any] | Source,
    out: Path | str,
    *,
    image: str | None = None,
    caption: str | None = None,
    keep: Sequence[str] = (),
    per_shard: int = 1000,
    name: str = "shard",
    max_size: int | None = None,
    format: Format | None = None,
    quality: int = 90,
    workers: int = 0,
    max_bad_fraction: float = 0.01,
    console: Console | None = None,
) -> Packed:
    """Write samples as shards: `pack(load_dataset(…), "shards")`, `pack(CocoCaptions(…), "shards")`.

    Args:
        samples: mappings with a picture (bytes, path, Pillow image, or `{"bytes", "path"}`) and captions (a text or
            a list of them), or pairs of these. They must come in the same order each time for a pack to be resumed.
        out: a new or empty folder, or one in which the same pack was begun.
        image, caption: columns; by default the first usual name that is there. `image="none"` packs texts alone.
        keep: further columns to be kept in the JSON member.
        per_shard: samples in a shard, less those that are skipped.
        name: shards are `NAME-000000.tar`, ….
        max_size, format, quality: see `PictureOptions`.
        workers: processes; 0 works in this one.
        max_bad_fraction: share of skipped samples above which the pack stops (after 8 of 100).
        console: where a progress bar is shown.

    Raises:
        DataError: no such column, too many bad samples, no samples, or `out` holds something else.
    """
    source = samples if isinstance(samples, Source) else from_rows(samples)
    if per_shard < 1 or workers < 0 or (max_size is not None and max_size < 1):
        raise DataError("per_shard and max_size must be at least 1, workers at least 0")
    if not name or "/" in name or any(letter in name for letter in "*?[]{}"):
        raise DataError(f"name {name!r}: shards are called NAME-000000.tar, so leave out / and the signs of patterns")
    if not source.columns:
        raise DataError(f"{source.where}: there are no samples to pack")
    fields = choose(source, image, caption, keep)
    options = PictureOptions(max_size, format, quality)
    settings = {"name": name, "per_shard": per_shard, **asdict(fields), **asdict(options)}
    with open_output(Path(out), settings) as (folder, finished):
        known = set(finished)
        jobs = _jobs(source, fields, folder, name, per_shard)
        budget = _Budget(max_bad_fraction)
        done: list[ShardRecord] = []
        # Processes first: they are forked, and the bar has a thread.
        with worker_pool(workers) as pool, progress_bar(console, source.total) as progress:
            task = progress.add_task("packing", total=source.total, skipped=0)
            for record in _run(jobs, finished, options, pool, ahead=workers + 1):
                if record.name not in known:
                    write_text(folder / ".pack" / f"{record.name}.json", record.dump())
                done.append(record)
                budget.add(record)
                progress.update(task, advance=record.samples + len(record.skipped), skipped=budget.bad)
        if missing := known - {record.name for record in done}:
            raise DataError(
                f"{folder}: holds {min(missing)}, but {source.where} ends before it. The source is not the one that "
                "this pack was begun with: name another folder."
            )
        return finish(folder, settings, done, already=known == {record.name for record in done})


@dataclass(frozen=True)
class _Job:
    path: Path
    inputs: str
    records: list[Record]


def _jobs(source: Source, fields: Fields, folder: Path, name: str, per_shard: int) -> Iterator[_Job]:
    batch: list[Record] = []
    number = 0
    for record in records(source, fields):
        batch.append(record)
        if len(batch) == per_shard:
            yield _Job(folder / f"{name}-{number:06d}.tar", _inputs(batch), batch)
            batch, number = [], number + 1
    if batch:
        yield _Job(folder / f"{name}-{number:06d}.tar", _inputs(batch), batch)


def _inputs(batch: list[Record]) -> str:
    """A digest of rows without opening their pictures: to notice that a source has changed."""
    digest = hashlib.blake2b(digest_size=16)
    for one in batch:
        size = len(one.image) if isinstance(one.image, bytes) else 0
        caption = one.caption.name if isinstance(one.caption, Path) else one.caption
        digest.update(json.dumps([one.name, size, caption, one.kept], default=str).encode())
    return digest.hexdigest()


def _run(
    jobs: Iterator[_Job],
    finished: dict[str, ShardRecord],
    options: PictureOptions,
    pool: ProcessPoolExecutor | None,
    ahead: int,
) -> Iterator[ShardRecord]:
    """The records of all shards, in order; those of finished ones as they are."""
    waiting: deque[Future[ShardRecord] | ShardRecord] = deque()
    for job in jobs:
        if known := finished.get(job.path.name):
            if known.inputs != job.inputs:
                raise DataError(
                    f"{job.path}: was made from other rows than the source has now. Put the old source back, or "
                    "name another folder."
                )
            waiting.append(known)
        elif pool is None:
            waiting.append(write_shard(job.path, job.inputs, job.records, options))
        else:
            waiting.append(pool.submit(write_shard, job.path, job.inputs, job.records, options))
        while len(waiting) > ahead or (waiting and _is_ready(waiting[0])):
            yield _result(waiting.popleft())
    while waiting:
        yield _result(waiting.popleft())


def _is_ready(one: Future[ShardRecord] | ShardRecord) -> bool:
    return isinstance(one, ShardRecord) or one.done()


def _result(one: Future[ShardRecord] | ShardRecord) -> ShardRecord:
    try:
        return one if isinstance(one, ShardRecord) else one.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a packing process was killed, most often for want of memory: lower the number of workers or the samples "
            "in a shard. The same command goes on where this one stopped."
        ) from error


class _Budget:
    """Stops a pack that would leave out too much."""

    def __init__(self, max_fraction: float) -> None:
        self.max_fraction, self.bad, self.seen = max_fraction, 0, 0
        self.first: list[Skipped] = []

    def add(self, record: ShardRecord) -> None:
        self.bad += len(record.skipped)
        self.seen += record.samples + len(record.skipped)
        self.first = (self.first + record.skipped)[:3]
        if too_many(self.bad, self.seen, self.max_fraction):
            first = "; ".join(f"{one.name}: {one.cause}" for one in self.first)
            raise DataError(
                f"{self.bad} of {self.seen} samples could not be used, more than max_bad_fraction = "
                f"{self.max_fraction:g} allows. First: {first}. Mend the source; or, if these may be lost, raise "
                "--max-bad-fraction: the same command then goes on."
            )
