"""Captions out of files, for training and inspecting a vocabulary: .txt, .csv, .tsv, .jsonl and WebDataset .tar.

Any of them may be gzipped. A caption is a line of a `.txt`, a cell of a column of a `.csv` or `.tsv`, a
field of a line of a `.jsonl`, and in a `.tar` a `KEY.txt` or a field of a `KEY.json`. A field may hold a list of
captions. Without a name given, the first field there of `CAPTION_FIELDS` is taken.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, cast

CAPTION_FIELDS = ("captions", "caption", "text", "title", "TEXT")


def read_captions(paths: Iterable[Path], field: str | None = None) -> Iterator[str]:
    """The captions of all files, in order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file of another kind, damaged, not UTF-8, without captions, or without the field.
    """
    for path in paths:
        found = False
        try:
            for caption in _reader(path, field):
                found = True
                yield caption
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error}): convert it, for example with iconv") from None
        except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: truncated or damaged ({error}): get it again or leave it out") from None
        if not found:
            raise ValueError(f"{path}: holds no captions: leave it out")


def _reader(path: Path, field: str | None) -> Iterator[str]:
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind in ("tar", "tgz"):
        return _tar(path, field)
    if kind not in ("txt", "csv", "tsv", "jsonl"):
        raise ValueError(f"{path}: captions are read from .txt, .csv, .tsv, .jsonl (also .gz) and .tar files")
    return {"txt": _lines, "csv": _table, "tsv": _table, "jsonl": _jsonl}[kind](path, field)


def _open(path: Path) -> io.TextIOWrapper:
    if path.name.lower().endswith(".gz"):
        return io.TextIOWrapper(gzip.GzipFile(path), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _lines(path: Path, field: str | None) -> Iterator[str]:
    with _open(path) as file:
        for line in file:
            if line.strip():
                yield line


def _table(path: Path, field: str | None) -> Iterator[str]:
    with _open(path) as file:
        rows = csv.DictReader(file, delimiter="\t" if ".tsv" in path.name.lower() else ",")
        for number, row in enumerate(rows, 2):
            yield from _captions(row, field, f"{path}, line {number}")


def _jsonl(path: Path, field: str | None) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield from _captions(_json(line, f"{path}, line {number}"), field, f"{path}, line {number}")


def _tar(path: Path, field: str | None) -> Iterator[str]:
    """Of each sample the `.txt`, or where there is none, or a field was named, the `.json`."""
    seen: set[str] = set()
    with tarfile.open(path, "r:*") as tar:
        files = (member for member in tar if member.isfile())
        for key, members in groupby(files, lambda member: _split(member.name)[0]):
            parts = {_split(member.name)[1]: member for member in members}
            seen.update(parts)
            if "txt" in parts and field is None:
                yield _content(tar, parts["txt"])
            elif "json" in parts:
                where = f"{path}, {key}.json"
                yield from _captions(_json(_content(tar, parts["json"]), where), field, where)
    if not seen & {"txt", "json"}:
        raise ValueError(
            f"{path}: no .txt and no .json members with captions; it holds {', '.join(sorted(seen)) or 'nothing'}"
        )


def _split(name: str) -> tuple[str, str]:
    """A member's name -> its sample's key and its extension, which begins at the first dot, as in webdataset."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = tar.extractfile(member)
    assert file is not None
    return file.read().decode("utf-8")


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: a JSON object with a caption is wanted, not {text!r:.60}")
    return cast("dict[str, Any]", content)


def _captions(record: dict[str, Any], field: str | None, where: str) -> Iterator[str]:
    name = field or next((name for name in CAPTION_FIELDS if name in record), None)
    if name is None or name not in record:
        wanted = f"the field {field!r}" if field else "a field " + ", ".join(CAPTION_FIELDS)
        raise ValueError(
            f"{where}: {wanted} is missing; there are {', '.join(map(str, record))}: name one with --field"
        )
    value = record[name]
    for caption in cast("list[Any]", value) if isinstance(value, list) else [value]:
        if not isinstance(caption, str):
            raise ValueError(f"{where}: {name!r} holds {caption!r:.60}, which is no text")
        if caption.strip():
            yield caption
