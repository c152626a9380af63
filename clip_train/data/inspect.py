"""Looking at shards before training on them: counts, sizes, captions, duplicates, and everything that is broken."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from rich.console import Console

from clip_train.data import columns
from clip_train.data.cache import Cache
from clip_train.data.files import ShardFiles
from clip_train.data.hashing import permutation
from clip_train.data.index_files import ShardIndex
from clip_train.data.inspect_figures import (
    Figures,
    caption_figures,
    duplicate_figures,
    picture_figures,
    recipe_stanza,
    shard_figures,
)
from clip_train.data.inspect_shard import Broken, Measured, Scan, Work, measure, scan
from clip_train.data.pack_shard import CAPTION_FIELDS, EXTENSIONS, NO_PICTURE
from clip_train.data.pack_workers import progress_bar, worker_pool
from clip_train.data.remote import is_remote
from clip_train.data.shards import AT_ONCE, resolve
from clip_train.data.waiting import side_by_side
from clip_train.errors import DataError
from tokenizer import BPETokenizer

_PROBED = 16
_CHUNK = 256


@dataclass(frozen=True, eq=False)
class Inspection:
    """What was found."""

    patterns: list[str]
    scans: list[Scan]
    image: str
    """The column of the pictures, as a recipe names it, or `NO_PICTURE`."""
    caption: str
    measured: list[Measured]
    """Samples that were looked at, in the order of the shards."""
    broken: list[Broken]
    figures: Figures
    """What `inspect.json` holds."""

    @property
    def good(self) -> list[Measured]:
        return [one for one in self.measured if one.cause is None]

    @property
    def stanza(self) -> str:
        return str(self.figures["stanza"])


def inspect(
    patterns: str | Sequence[str],
    *,
    image: str | None = None,
    caption: str | None = None,
    tokenizer: BPETokenizer | None = None,
    sample: int | None = None,
    workers: int = 0,
    console: Console | None = None,
    cache: Cache | None = None,
) -> Inspection:
    """Read shards, also damaged ones, and measure their samples.

    Args:
        patterns: as `shards` in a recipe.
        image, caption: columns as in a recipe; by default what the shards hold under usual names. `image="none"` is for
            shards of texts alone.
        tokenizer: what captions are measured with; None is the shipped one.
        sample: look at so many samples only, drawn evenly. Headers are always read whole.
        workers: processes; 0 works in this one.
        console: where a progress bar is shown.
        cache: where shards from elsewhere are kept; by default `Cache()`.

    Raises:
        DataError: a pattern that names nothing, a shard that cannot be fetched, or a column that no sample has.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    tokenizer = tokenizer or BPETokenizer.default()
    if sample is not None and sample < 1:
        raise DataError("--sample must be at least 1")
    shards, cache = resolve(patterns), cache or Cache()
    scans = list(side_by_side(partial(scan, cache=cache), shards, AT_ONCE if any(map(is_remote, shards)) else 0))
    indexes = [one.index for one in scans if one.index is not None]
    if not indexes:
        raise DataError(f"no sample can be read: {'; '.join(one.damage or '' for one in scans[:3])}")
    image = image or _image_column(indexes)
    caption = caption or _caption_column(indexes)
    if image != NO_PICTURE:
        _check(image, "image", indexes)
    _check(caption, "caption", indexes)
    measured = list(_measure_all(scans, image, caption, tokenizer, sample, workers, console))
    known = {(one.shard, one.key) for each in scans for one in each.broken}
    broken = [one for each in scans for one in each.broken]
    broken += [
        Broken(scans[one.shard].shard, one.key, one.cause)
        for one in measured
        if one.cause is not None and (scans[one.shard].shard, one.key) not in known
    ]
    figures: Figures = {
        **shard_figures(scans),
        "looked_at": len(measured),
        "image": None if image == NO_PICTURE else picture_figures(image, measured),
        "captions": caption_figures(caption, measured, tokenizer),
        "duplicates": None if image == NO_PICTURE else duplicate_figures(scans, measured),
        "broken": [one._asdict() for one in broken],
    }
    figures["stanza"] = recipe_stanza(patterns, [one.shard for one in scans], image, caption, figures)
    return Inspection(patterns, scans, image, caption, measured, broken, figures)


def _measure_all(
    scans: Sequence[Scan],
    image: str,
    caption: str,
    tokenizer: BPETokenizer,
    sample: int | None,
    workers: int,
    console: Console | None,
) -> Iterator[Measured]:
    places = [(number, row) for number, one in enumerate(scans) if one.index for row in range(len(one.index))]
    if sample is not None and sample < len(places):
        places = [places[place] for place in sorted(permutation(len(places), 0)[:sample].tolist())]
    by_shard = defaultdict[int, list[int]](list)
    for number, row in places:
        by_shard[number].append(row)
    jobs: list[Work] = []
    for number, rows in by_shard.items():
        index = scans[number].index
        assert index is not None
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            pictures = None if image == NO_PICTURE else columns.parse(image)
            jobs.append(Work(number, index, chunk, pictures, columns.parse(caption)))
    task = partial(measure, tokenizer=tokenizer)
    with worker_pool(workers) as pool, progress_bar(console, len(places)) as progress:
        bar = progress.add_task("looking", total=len(places), skipped=0)
        bad = 0
        for part in pool.map(task, jobs) if pool else map(task, jobs):
            bad += sum(one.cause is not None for one in part)
            progress.update(bar, advance=len(part), skipped=bad)
            yield from part


# ------------------------------------------------------------------------------------------------- columns


def _image_column(indexes: Sequence[ShardIndex]) -> str:
    counts = Counter[str]()
    for one in indexes:
        counts.update(dict(zip(one.extensions, (one.offsets >= 0).sum(axis=0).tolist(), strict=True)))
    found = [name for name, _ in counts.most_common() if name in {*EXTENSIONS.values(), "jpeg", "tiff"}]
    if not found:
        raise DataError(f"{indexes[0].shard}: no member has a picture's name. It holds {indexes[0].contents()}. Name "
                        "the pictures' extension with --image; of texts alone say --image none.")  # fmt: skip
    return ";".join(found)


def _caption_column(indexes: Sequence[ShardIndex]) -> str:
    fields = Counter[str]()
    for one in indexes:
        for row in range(min(_PROBED, len(one))):
            if place := one.member(row, "json"):
                try:
                    content: Any = json.loads(ShardFiles().read(one, *place))
                except ValueError:
                    continue
                if isinstance(content, dict):
                    fields.update(cast("dict[str, Any]", content).keys())
    if fields["captions"]:  # several beat one
        return "json.captions"
    if any("txt" in one.extensions for one in indexes):
        return "txt"
    found = next((name for name in CAPTION_FIELDS if fields[name]), None)
    if found is None:
        held = indexes[0].contents() + (f"; fields of json: {', '.join(fields)}" if fields else "")
        raise DataError(
            f"{indexes[0].shard}: no member has a caption's name: txt, or json with a field "
            f"{', '.join(CAPTION_FIELDS)}. It holds {held}. Name it with --caption."
        )
    return f"json.{found}"


def _check(column: str, option: str, indexes: Sequence[ShardIndex]) -> None:
    wanted = [one.extension for one in columns.parse(column)]
    if not any(name in one.extensions for name in wanted for one in indexes):
        raise DataError(
            f"--{option} {column}: no sample has such a member. {indexes[0].shard} holds {indexes[0].contents()}."
        )
