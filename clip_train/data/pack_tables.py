"""Tables of pictures and captions, read row by row: csv, tsv, jsonl (also gzipped), parquet; and lines of text."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from clip_train.errors import DataError

Row = Mapping[str, Any]
_PEEK = 100
"""Rows that are looked at for columns, where there is no list of them."""


@dataclass(frozen=True)
class Source:
    """Rows, and what is known of them before they are read."""

    where: str
    """For messages."""
    columns: list[str]
    rows: Callable[[Sequence[str]], Iterator[Row]]
    """All rows, in order; only the columns named need be there."""
    root: Path | None
    """What relative paths of pictures are relative to."""
    total: int | None
    """Number of rows, where it is known."""


def lines(path: Path, root: Path, read: Callable[[], Iterator[Row]]) -> Source:
    columns = list(dict.fromkeys(name for row in islice(read(), _PEEK) for name in row))
    return Source(str(path), columns, lambda _: read(), root, None)


def _open(path: Path, encoding: str) -> io.TextIOWrapper:
    if path.suffix.lower() == ".gz":
        return io.TextIOWrapper(gzip.GzipFile(path), encoding=encoding, newline="")
    return path.open(encoding=encoding, newline="")


def read_csv(path: Path, delimiter: str, encoding: str) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    line = 1
    try:
        with _open(path, encoding) as file:
            for row in csv.DictReader(file, delimiter=delimiter):
                line += 1
                if cast("dict[str | None, Any]", row).get(
                    None
                ):  # more cells than columns: which caption was meant is anybody's guess
                    raise DataError(
                        f"{path}: row {line - 2} has more cells than the first line has columns: put quotes around "
                        "captions that contain the separator"
                    )
                yield row
    except (UnicodeDecodeError, csv.Error, OSError, EOFError) as error:
        raise DataError(_unreadable(path, f"after row {line - 2}" if line > 1 else "at its start", error)) from error


def read_jsonl(path: Path, encoding: str) -> Iterator[Row]:
    number = 0
    try:
        with _open(path, encoding) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                content: Any = json.loads(line)
                if not isinstance(content, dict):
                    raise DataError(f"{path}: line {number} is not a JSON object but {line.strip()[:60]!r}")
                yield cast(Row, content)
    except DataError:
        raise
    except (ValueError, OSError, EOFError, RecursionError) as error:
        raise DataError(_unreadable(path, f"near line {number}", error)) from error


def read_texts(path: Path, encoding: str) -> Iterator[Row]:
    """A text a line, empty lines left out."""
    try:
        with _open(path, encoding) as file:
            yield from ({"text": line} for line in file if line.strip())
    except (ValueError, OSError, EOFError) as error:
        raise DataError(_unreadable(path, "somewhere", error)) from error


def _unreadable(path: Path, where: str, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"{path}: not UTF-8 {where} ({error}). Say what it is, for example --encoding latin-1."
    return f"{path}: cannot be read {where}: {error}"


def parquet(paths: list[Path], root: Path) -> Source:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{paths[0]}: to read parquet install pyarrow: pip install 'clip-train[pack]'") from error

    def opened(path: Path) -> Any:
        try:
            return pq.ParquetFile(path)
        except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses
            raise DataError(f"{path}: is damaged or no parquet file: {error}") from error

    files = [opened(path) for path in paths]
    names: list[list[str]] = [list(file.schema_arrow.names) for file in files]
    for path, one in zip(paths, names, strict=True):
        if set(one) != set(names[0]):
            raise DataError(f"{path}: its columns ({', '.join(one)}) are not those of {paths[0].name}")

    def rows(columns: Sequence[str]) -> Iterator[Row]:
        for path, file in zip(paths, files, strict=True):
            try:
                for batch in file.iter_batches(batch_size=256, columns=list(dict.fromkeys(columns))):
                    yield from batch.to_pylist()
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: is damaged: {error}") from error

    return Source(str(paths[0]), names[0], rows, root, sum(file.metadata.num_rows for file in files))
