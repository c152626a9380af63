"""One shard being written: records -> a tar whose bytes depend on nothing but the records and the options.

Each usable record becomes `KEY.EXT`, the picture (unless texts alone are packed), and `KEY.json` with its captions (a
list), the name of where it came from, and the columns that are kept. A record that cannot be used is left out and named
with its cause.
"""

from __future__ import annotations

import io
import json
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from PIL import Image

from clip_train.data.columns import MOST_CHARACTERS, is_blank
from clip_train.data.decode import DecodeError, Pixels, cause_of, decode, to_rgb
from clip_train.errors import DataError

Format = Literal["jpg", "png", "webp"]
CAPTION_FIELDS = ("captions", "caption", "text", "texts", "sentences", "title", "TEXT")
"""Where captions are looked for if nothing is said, in this order."""
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif",
              "AVIF": "avif", "PPM": "ppm"}  # fmt: skip
_PILLOW = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


NO_PICTURE = "none"
"""In place of the column of pictures, or of a picture: texts alone are packed."""


class SkippedError(Exception):
    """This record cannot be used; the text is the cause."""


@dataclass(frozen=True)
class Record:
    """One row of a source."""

    row: int
    """Its number in the source, from 0."""
    name: str
    """What a person would look for: the picture's path, or `row N`."""
    image: Any
    """Path, bytes, or a Pillow image; `NO_PICTURE` in texts alone."""
    caption: Any
    """A text, several, or the Path of a .txt or .json file with them."""
    caption_field: str | None = None
    """Field of a .json file; None tries the usual names."""
    kept: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further columns for the JSON member."""


@dataclass(frozen=True)
class PictureOptions:
    """What is done to pictures. With the defaults their bytes stay as they are."""

    max_size: int | None = None
    """Longest side in pixels; larger pictures are shrunk (bicubic, antialiased), smaller ones never touched."""
    format: Format | None = None
    """Encode every picture as this."""
    quality: int = 90
    """Of JPEG and WebP, where a picture is encoded."""


@dataclass(frozen=True)
class Skipped:
    """A record that is in no shard."""

    row: int
    name: str
    cause: str


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a finished shard."""

    name: str
    samples: int
    captions: int
    bytes: int
    inputs: str
    """Digest of the records it was made from."""
    formats: dict[str, int]
    skipped: list[Skipped]

    def dump(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @staticmethod
    def load(text: str) -> ShardRecord:
        fields = json.loads(text)
        fields["skipped"] = [Skipped(**one) for one in fields["skipped"]]
        return ShardRecord(**fields)


def write_shard(path: Path, inputs: str, records: list[Record], options: PictureOptions) -> ShardRecord:
    """Write `path`, aside first and then renamed, so that it is there whole or not at all.

    Where no record is usable no file is written.

    Raises:
        DataError: the disk is full, or the folder cannot be written to.
    """
    aside = path.parent / ".pack" / f"{path.name}.{os.getpid()}"
    skipped: list[Skipped] = []
    formats: Counter[str] = Counter()
    samples, captions = 0, 0
    try:
        with tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar:
            for record in records:
                try:
                    texts = read_captions(record)
                    alone = isinstance(record.image, str) and record.image == NO_PICTURE
                    picture = None if alone else encode_picture(record.image, options)
                except (SkippedError, DecodeError) as error:
                    skipped.append(Skipped(record.row, record.name, str(error)))
                    continue
                content = {"captions": texts, "name": record.name, **record.kept}
                if picture is not None:
                    add_member(tar, f"{record.row:09d}.{picture[0]}", picture[1])
                    formats[picture[0]] += 1
                text = json.dumps(content, ensure_ascii=False, default=str)
                add_member(tar, f"{record.row:09d}.json", text.encode("utf-8", "backslashreplace"))
                samples += 1
                captions += len(texts)
        if samples:
            replace(aside, path)
        else:
            aside.unlink()
            path.unlink(missing_ok=True)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    size = path.stat().st_size if samples else 0
    return ShardRecord(path.name, samples, captions, size, inputs, dict(sorted(formats.items())), skipped)


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """A member without a time or an owner."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(content), 0o644, 0
    tar.addfile(info, io.BytesIO(content))


def replace(aside: Path, path: Path) -> None:
    """Rename once the bytes are on the disk."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)


def read_captions(record: Record) -> list[str]:
    """The captions of a record, white space around them and empty ones left out."""
    found = record.caption
    if isinstance(found, Path):
        found = _caption_file(found, record.caption_field)
    texts: list[Any] = list(cast("list[Any]", found)) if isinstance(found, list | tuple) else [found]
    for text in texts:
        if text is not None and not isinstance(text, str):
            shown = f"{type(text).__name__} {str(text)[:40]!r}"
            raise SkippedError(f"its caption is {shown}: a text or a list of texts is wanted")
        if text is not None and len(text) > MOST_CHARACTERS:
            raise SkippedError(f"its caption has {len(text):,} characters, above {MOST_CHARACTERS:,}")
    texts = [text.strip() for text in texts if text and not is_blank(text)]
    if not texts:
        raise SkippedError("its caption is empty")
    return texts


def _caption_file(path: Path, name: str | None) -> Any:
    try:
        _check_file(path)
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SkippedError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SkippedError(f"{path.name} is not UTF-8 at byte {error.start}") from error
    if path.suffix.lower() != ".json":
        return text
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SkippedError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise SkippedError(f"{path.name} is not a JSON object with a caption")
    fields = cast("dict[str, Any]", content)
    for wanted in (name,) if name else CAPTION_FIELDS:
        if (found := lookup(fields, wanted)) is not None:
            return found
    raise SkippedError(f"{path.name} has no {name or 'caption'}, only {', '.join(fields) or 'nothing'}")


def lookup(row: Mapping[str, Any], name: str) -> Any:
    """A column, or `a.b`, the field b of column a; None where there is none."""
    if name in row:
        return row[name]
    head, dot, rest = name.partition(".")
    inner = row.get(head) if dot else None
    return lookup(cast("Mapping[str, Any]", inner), rest) if isinstance(inner, Mapping) else None


def encode_picture(image: Any, options: PictureOptions) -> tuple[str, bytes]:
    """The extension and the bytes that are stored: the given ones where nothing has to change.

    Raises:
        SkippedError, DecodeError: there is no such file, or it is no picture that can be used. Whatever is stored
            was decoded once as training will.
    """
    if isinstance(image, Image.Image):
        try:
            return _encode(to_rgb(image), options, options.format or "png")
        except (OSError, SyntaxError) as error:  # Pillow reads its file only now
            raise SkippedError(f"not a readable picture: {cause_of(error)}") from error
    data = _picture_bytes(image)
    if not data:
        raise SkippedError("its picture is empty (0 bytes)")
    pixels = decode(data)
    extension = _extension(data)
    fits = options.max_size is None or max(pixels.shape[:2]) <= options.max_size
    if fits and options.format in (None, extension):
        return extension, data
    return _encode(pixels, options, options.format or _lossless_unless(extension))


def _check_file(path: Path) -> None:
    """A pipe would be waited for, a device read for ever. Raises OSError where there is nothing."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise SkippedError(f"{path}: is no regular file")


def _picture_bytes(image: Any) -> bytes:
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, Path):
        try:
            _check_file(image)
            return image.read_bytes()
        except OSError as error:
            raise SkippedError(f"{image}: {error.strerror}") from error
    if image is None:
        raise SkippedError("it has no picture")
    raise SkippedError(f"its picture is a {type(image).__name__}: bytes, a path or a Pillow image is wanted")


def _extension(data: bytes) -> str:
    """By content: names lie."""
    with Image.open(io.BytesIO(data)) as image:
        name = image.format or ""
        return EXTENSIONS.get(name, name.lower())


def _lossless_unless(extension: str) -> Format:
    return extension if extension in ("jpg", "webp") else "png"


def _encode(pixels: Pixels, options: PictureOptions, extension: Format) -> tuple[str, bytes]:
    image = Image.fromarray(pixels)
    if options.max_size is not None and max(image.size) > options.max_size:
        scale = options.max_size / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, _PILLOW[extension], **({} if extension == "png" else {"quality": options.quality}))
    return extension, out.getvalue()
