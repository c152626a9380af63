"""A clean copy of shards: the samples that training could use, byte for byte, and a list of what was left out."""

from __future__ import annotations

import json
import tarfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from clip_train.data.files import ShardFiles
from clip_train.data.index_files import write_index
from clip_train.data.inspect import Inspection
from clip_train.data.inspect_shard import Scan
from clip_train.data.pack_folder import write_text
from clip_train.data.pack_shard import add_member, replace
from clip_train.data.remote import base_name
from clip_train.data.shards import data_fingerprint, index
from clip_train.errors import DataError


@dataclass(frozen=True)
class Fixed:
    """What a clean copy holds; `summary.json` has the same figures."""

    out: Path
    samples: int
    left_out: int
    shards: list[str]
    without: list[str]
    """Shards of which nothing could be kept."""
    fingerprint: str


def check_destination(out: Path, scans: list[Scan]) -> None:
    """Raises DataError where a copy cannot be put: before anything is measured."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"--fix {out}: is there already: name a new or an empty folder")
    names = Counter(base_name(one.shard) for one in scans)
    if twice := [name for name, count in names.items() if count > 1]:
        raise DataError(f"--fix {out}: several shards are called {twice[0]}: fix one folder at a time")


def fix(found: Inspection, out: Path) -> Fixed:
    """Copy what is good of each shard to `out`, under the shard's name.

    Writes `left_out.jsonl` (shard, key, cause) and `summary.json` beside.

    Raises:
        DataError: `out` is not empty; nothing is good; the disk is full.
    """
    check_destination(out, found.scans)
    looked_at = len(found.measured)
    if looked_at < found.figures["samples"]:
        raise DataError(f"--fix needs all samples looked at, not {looked_at} of them: leave --sample out")
    broken = defaultdict[str, set[str]](set)
    for one in found.broken:
        broken[one.shard].add(one.key)
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    without: list[str] = []
    for one in found.scans:
        path = out / base_name(one.shard)
        if _copy(one, path, broken[one.shard]):
            written.append(path)
        else:
            without.append(one.shard)
    if not written:
        raise DataError(f"--fix {out}: not one sample is good, so there is nothing to copy")
    lines = [one._asdict() for one in found.broken]
    lines += [{"shard": one.shard, "key": None, "cause": one.damage} for one in found.scans if one.damage]
    lines += [{"shard": one.shard, "key": name, "cause": "belongs to no sample"}
              for one in found.scans for name in one.strays]  # fmt: skip
    write_text(out / "left_out.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    indexes = [
        index(str(path)) for path in written
    ]  # reads them as training will: what is refused there is refused now
    for one in indexes:
        write_index(one)
    samples = sum(len(one) for one in indexes)
    fixed = Fixed(out, samples, len(found.broken), [path.name for path in written], without, data_fingerprint(indexes))
    summary = {
        "samples": samples,
        "left_out": len(found.broken),
        "fingerprint": fixed.fingerprint,
        "shards": [{"name": path.name, "samples": len(one), "bytes": one.size}
                   for path, one in zip(written, indexes, strict=True)],
    }  # fmt: skip
    write_text(out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return fixed


def _copy(one: Scan, path: Path, broken: set[str]) -> int:
    """Number of samples copied; without any no file is written."""
    if one.index is None or broken.issuperset(one.index.key(row) for row in range(len(one.index))):
        return 0
    files = ShardFiles()
    aside = path.with_name(path.name + ".new")
    copied = 0
    try:
        with tarfile.open(aside, "w", format=tarfile.PAX_FORMAT) as tar:
            for row in range(len(one.index)):
                key = one.index.key(row)
                if key in broken:
                    continue
                copied += 1
                for extension in one.index.extensions:
                    if place := one.index.member(row, extension):
                        add_member(tar, f"{key}.{extension}", files.read(one.index, *place))
        replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    return copied
