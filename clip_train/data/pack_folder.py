"""The folder that shards are packed into: what is finished there, and the figures beside the shards.

While a pack is under way `.pack/` holds its settings and a record of each finished shard. At the end they become
`summary.json` and `skipped.jsonl`. Nothing in them depends on time, place or the number of processes.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clip_train.data.index_files import write_index
from clip_train.data.pack_shard import ShardRecord, Skipped, replace
from clip_train.data.shards import data_fingerprint, index
from clip_train.errors import DataError


@dataclass(frozen=True)
class Packed:
    """What a pack came to; `summary.json` has the same figures."""

    out: Path
    samples: int
    captions: int
    skipped: list[Skipped]
    formats: dict[str, int]
    """Pictures of each extension."""
    fingerprint: str
    """The one that checkpoints keep: `clip_train.data.shards.data_fingerprint`."""
    shards: list[ShardRecord]
    already: bool
    """Nothing had to be written."""

    def stanza(self, name: str = "mine") -> str:
        """The recipe's part that reads these shards."""
        extensions = sorted(self.formats, key=lambda one: -self.formats[one])
        several = self.captions > self.samples
        shards = json.dumps(str(self.out.resolve() / "*.tar"), ensure_ascii=False)
        lines = [
            f"[data.sources.{name}]",
            f"shards = {shards}",
            *([f'image = "{";".join(extensions)}"'] if extensions else []),
            'caption = "json.captions"',
        ]
        return "\n".join(lines + ['caption_choice = "random"'] * several)


@contextmanager
def open_output(folder: Path, settings: dict[str, Any]) -> Generator[tuple[Path, dict[str, ShardRecord]]]:
    """The folder, locked against a second writer, and its shards that are finished.

    Raises:
        DataError: it holds something else, or is being written to.
    """
    settings = json.loads(json.dumps(settings))
    begun, summary = folder / ".pack" / "settings.json", folder / "summary.json"
    entries = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    try:
        before: Any = json.loads((summary if summary.exists() else begun).read_text())
        before = before.get("settings") if summary.exists() else before
    except (OSError, ValueError, AttributeError):
        before = None
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file; name a folder")
    if before is None and entries not in ([], [".pack"]):
        raise DataError(f"{folder}: already holds {', '.join(entries[:4])}: name a new or an empty folder")
    if before is not None and before != settings:
        differing = [f"{key} {before.get(key)!r}, now {value!r}" for key, value in settings.items()
                     if before.get(key) != value]  # fmt: skip
        raise DataError(
            f"{folder}: was begun with {'; '.join(differing)}. Use the same, name another folder, or remove it."
        )
    try:
        (folder / ".pack").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written to: {error.strerror}") from error
    with (folder / ".pack" / "lock").open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{folder}: another pack is being written here; wait for it to end") from error
        if before is None:
            write_text(begun, json.dumps(settings))
        yield folder, _finished(folder, summary)


def _finished(folder: Path, summary: Path) -> dict[str, ShardRecord]:
    """Shards that are whole, by name. What a killed pack left besides is removed."""
    found: dict[str, ShardRecord] = {}
    if summary.exists():
        skipped = folder / "skipped.jsonl"
        left_out = [json.loads(line) for line in skipped.read_text().splitlines()] if skipped.exists() else []
        for one in json.loads(summary.read_text())["shards"]:
            own = [
                {key: bad[key] for key in ("row", "name", "cause")} for bad in left_out if bad["shard"] == one["name"]
            ]
            found[one["name"]] = ShardRecord.load(json.dumps({**one, "skipped": own}))
    for path in (folder / ".pack").iterdir():
        if path.name.endswith(".tar.json"):
            record = ShardRecord.load(path.read_text())
            found[record.name] = record
        elif path.name not in ("lock", "settings.json"):
            path.unlink()
    for name, record in list(found.items()):
        tar = folder / name
        if record.samples and not (tar.exists() and tar.stat().st_size == record.bytes):
            del found[name]  # somebody removed or damaged it: it is written again
    return found


def finish(folder: Path, settings: dict[str, Any], done: list[ShardRecord], already: bool) -> Packed:
    """Write `summary.json` and `skipped.jsonl`."""
    if not any(record.samples for record in done):
        first = "; ".join(f"{one.name}: {one.cause}" for record in done for one in record.skipped[:3])
        raise DataError(f"{folder}: there are no samples to pack{': ' * bool(first)}{first}")
    indexes = [index(str(folder / record.name)) for record in done if record.samples]
    fingerprint = data_fingerprint(indexes)
    packed = Packed(
        out=folder,
        samples=sum(record.samples for record in done),
        captions=sum(record.captions for record in done),
        skipped=[one for record in done for one in record.skipped],
        formats=dict(sum((Counter(record.formats) for record in done), Counter[str]())),
        fingerprint=fingerprint,
        shards=done,
        already=already and (folder / "summary.json").exists(),
    )
    summary = {
        "samples": packed.samples,
        "captions": packed.captions,
        "skipped": len(packed.skipped),
        "bytes": sum(record.bytes for record in done),
        "formats": packed.formats,
        "fingerprint": fingerprint,
        "settings": settings,
        "shards": [{key: value for key, value in asdict(record).items() if key != "skipped"} for record in done],
    }
    if not packed.already:
        for one in indexes:
            write_index(one)
        lines = [json.dumps({"shard": record.name, **asdict(one)}, ensure_ascii=False) + "\n"
                 for record in done for one in record.skipped]  # fmt: skip
        if lines:
            write_text(folder / "skipped.jsonl", "".join(lines))
        write_text(folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    shutil.rmtree(folder / ".pack")
    return packed


def write_text(path: Path, text: str) -> None:
    """Whole or not at all. What UTF-8 cannot say (names that are not UTF-8) is written as JSON's escapes."""
    try:
        path.with_name(path.name + ".new").write_bytes(text.encode("utf-8", "backslashreplace"))
        replace(path.with_name(path.name + ".new"), path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from error
