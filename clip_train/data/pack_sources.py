"""What can be packed: a folder with captions, a table (csv, tsv, jsonl, parquet), lines of text, or any rows.

All of them become rows: mappings from columns to values. No picture is opened here.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

from clip_train.data.pack_shard import CAPTION_FIELDS, NO_PICTURE, Record, lookup
from clip_train.data.pack_tables import Row, Source, lines, parquet, read_csv, read_jsonl, read_texts
from clip_train.errors import DataError

IMAGE_FIELDS = ("image", "img", "picture", "jpg", "png", "webp", "image_bytes", "bytes", "image_path", "img_path",
                "path", "file_name", "filename", "filepath", "file", "image_file")  # fmt: skip
"""Where pictures are looked for if nothing is said, in this order."""
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm")


@dataclass(frozen=True)
class Fields:
    """Which columns are used."""

    image: str
    """`NO_PICTURE` where texts alone are packed."""
    caption: str | None
    """None: of the caption files of a folder, the usual names."""
    keep: tuple[str, ...]


def open_source(path: Path, *, image_root: Path | None = None, encoding: str = "utf-8-sig") -> Source:
    """Look at a folder or a table, as `clip-train data pack` is given it.

    Raises:
        DataError: not there, of an unknown kind, or a folder with two files that could hold the captions.
    """
    if path.is_dir():
        return _folder(path, image_root, encoding)
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    kind = "".join(path.suffixes[-2:]).lower().removesuffix(".gz")
    kind = "." + kind.rpartition(".")[2]
    root = image_root or path.parent
    if kind in (".csv", ".tsv"):
        return lines(path, root, lambda: read_csv(path, "\t" if kind == ".tsv" else ",", encoding))
    if kind in (".jsonl", ".ndjson"):
        return lines(path, root, lambda: read_jsonl(path, encoding))
    if kind == ".parquet":
        return parquet([path], root)
    if kind == ".txt":
        return lines(path, root, lambda: read_texts(path, encoding))
    raise DataError(
        f"{path}: a folder, .csv, .tsv, .jsonl, .txt (also .gz) or .parquet can be packed, not {path.suffix!r}"
    )


def from_rows(samples: Iterable[Any]) -> Source:
    """Rows from Python: mappings, or (picture, captions) pairs as torchvision's data sets give them."""
    rows = _as_rows(samples)
    head = list(islice(rows, 1))
    total = len(samples) if hasattr(samples, "__len__") else None  # pyright: ignore[reportArgumentType]
    return Source("the samples", list(head[0]) if head else [], lambda _: chain(head, rows), None, total)


def _as_rows(samples: Iterable[Any]) -> Iterator[Row]:
    # torchvision's data sets can be indexed, but only some end when they are iterated over.
    if hasattr(samples, "__len__") and hasattr(samples, "__getitem__"):
        indexed = cast("Sequence[Any]", samples)
        samples = (indexed[number] for number in range(len(indexed)))
    for number, sample in enumerate(samples):
        if isinstance(sample, Mapping):
            yield cast(Row, sample)
        elif isinstance(sample, tuple) and len(cast("tuple[Any, ...]", sample)) == 2:
            yield dict(zip(("image", "caption"), cast("tuple[Any, Any]", sample), strict=True))
        else:
            raise DataError(f"sample {number} is a {type(sample).__name__}: a mapping or (image, caption) is wanted")


def choose(source: Source, image: str | None, caption: str | None, keep: Sequence[str]) -> Fields:
    """Which columns hold the pictures and the captions: those named, else the first usual name that is there.

    Raises:
        DataError: a column that is not there; the nearest one is named.
    """

    def one(wanted: str | None, usual: Sequence[str], option: str) -> str:
        if wanted is None:
            found = next((name for name in usual if name in source.columns), None)
            if found is None:
                raise DataError(
                    f"{source.where}: no column has a usual name for the {option} ({', '.join(usual)}). "
                    f"There are: {', '.join(source.columns) or 'none'}. Name it with --{option}"
                    + (f", or pack texts alone with --image {NO_PICTURE}." if option == "image" else ".")
                )
            return found
        if wanted in source.columns or wanted.partition(".")[0] in source.columns:
            return wanted
        nearest = difflib.get_close_matches(wanted, source.columns, n=1, cutoff=0.4)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise DataError(
            f"{source.where}: there is no column {wanted!r} (--{option}).{hint} "
            f"There are: {', '.join(source.columns) or 'none'}."
        )

    if source.columns == _FOLDER_COLUMNS:
        if image is not None or keep:
            raise DataError(f"{source.where}: a folder of pictures has no columns: leave --image and --keep out")
        return Fields("image", caption, ())
    texts_alone = image == NO_PICTURE or (image is None and source.columns == ["text"])
    return Fields(
        NO_PICTURE if texts_alone else one(image, IMAGE_FIELDS, "image"),
        one(caption, CAPTION_FIELDS, "caption"),
        tuple(one(name, (), "keep") for name in keep),
    )


def records(source: Source, fields: Fields) -> Iterator[Record]:
    """The rows as records.

    Raises:
        DataError: the pictures are URLs; a table is damaged.
    """
    caption = fields.caption or "caption"
    of_folder = source.columns == _FOLDER_COLUMNS
    wanted = ["caption" if of_folder else caption, *fields.keep]
    if fields.image != NO_PICTURE:
        wanted.append(fields.image)
    for number, row in enumerate(source.rows([name.partition(".")[0] for name in wanted])):
        image, name = NO_PICTURE, f"row {number}"
        if fields.image != NO_PICTURE:
            image, name = _image(lookup(row, fields.image), source, number)
        yield Record(
            row=number,
            name=str(row["name"]) if of_folder else name,
            image=image,
            caption=row["caption"] if of_folder else lookup(row, caption),
            caption_field=fields.caption if of_folder else None,
            kept={column: lookup(row, column) for column in fields.keep},
        )


def _image(value: Any, source: Source, number: int) -> tuple[Any, str]:
    """A cell -> picture and name. `{"bytes": …, "path": …}` is how Hugging Face's data sets store pictures."""
    name = f"row {number}"
    if isinstance(value, Mapping):
        struct = cast(Row, value)
        path = struct.get("path")
        name = str(path) if path else name
        value = struct.get("bytes") or path
        if isinstance(value, bytes):
            return value, name
    if isinstance(value, str) and value:
        if "://" in value[:10]:
            raise DataError(
                f"{source.where}: row {number}: the picture is a URL ({value[:80]}). Nothing is fetched here: fetch "
                "with img2dataset (its shards can be used as they are), or name a column with paths by --image."
            )
        return (source.root / value if source.root else Path(value)), value
    return (None if value == "" else value), name


_FOLDER_COLUMNS = ["image", "caption", "name"]


def _folder(folder: Path, image_root: Path | None, encoding: str) -> Source:
    """A folder: one table in it with the captions, parquet files, or pictures with .txt or .json beside them."""
    top = sorted(entry for entry in folder.iterdir() if entry.is_file())
    parquets = [path for path in top if path.suffix.lower() == ".parquet"]
    tables = [path for path in top if path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv", ".jsonl"))]
    if len(tables) > 1 or (tables and parquets):
        names = ", ".join(path.name for path in [*tables, *parquets][:6])
        raise DataError(
            f"{folder}: there are several files that could hold the captions ({names}). Name the one: "
            f"clip-train data pack {folder / tables[0].name} OUT"
        )
    if parquets:
        return parquet(parquets, image_root or folder)
    files = sorted(walk(folder), key=lambda path: path.relative_to(folder).as_posix())
    pictures = [path for path in files if path.suffix.lower() in PICTURES]
    beside = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".json"}
    beside |= {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    if tables:
        if any(path.with_suffix("") in beside for path in pictures):
            raise DataError(
                f"{folder}: there are captions in {tables[0].name} and in files beside the pictures. To use the "
                f"table name it: clip-train data pack {tables[0]} OUT; else move it away."
            )
        return open_source(tables[0], image_root=image_root or folder, encoding=encoding)
    if not pictures:
        shown = ", ".join(path.name for path in files[:6]) or "nothing"
        raise DataError(f"{folder}: holds no pictures ({', '.join(PICTURES)}) and no table of captions, but {shown}")
    if not beside:
        raise DataError(
            f"{folder}: {len(pictures)} pictures but no captions: write KEY.txt or KEY.json beside KEY.jpg, or a "
            "captions.csv with the columns file_name and caption"
        )

    def rows(_: Sequence[str]) -> Iterator[Row]:
        for path in pictures:
            stem = path.with_suffix("")
            # A path that is not there is reported with the sample.
            caption = beside.get(stem, stem.with_suffix(".txt"))
            yield {"image": path, "caption": caption, "name": path.relative_to(folder).as_posix()}

    return Source(str(folder), _FOLDER_COLUMNS, rows, None, len(pictures))


def walk(folder: Path) -> Iterator[Path]:
    """All files, links followed; a folder that contains itself by a link is entered once.

    Raises:
        DataError: a folder cannot be read, so pictures in it would be lost in silence.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}. Make it readable, or move it away.")

    entered: set[tuple[int, int]] = set()
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        stat = Path(where).stat()
        if (stat.st_dev, stat.st_ino) in entered:
            folders.clear()
            continue
        entered.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(where, name) for name in names if not name.startswith("."))
