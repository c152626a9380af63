"""Reading the headers of a tar file, and nothing else: where each member's bytes are.

Python's `tarfile` does this too, at ~60 us a member and silently stopping at damage. Here every header's
checksum and bound is checked, and what does not add up is a `DataError` that names the shard.

Source: POSIX.1-2001 pax (ustar blocks, pax headers `x` and `g`) and the GNU tar manual (long names `L`,
base-256 sizes).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from clip_train.errors import DataError

BLOCK = 512
_MAGIC = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"(\xb5": "unzstd"}


class Member(NamedTuple):
    """A regular file in a tar: its name, and where its bytes lie in the tar."""

    name: str
    offset: int
    size: int


def members(path: Path) -> Iterator[Member]:
    """The regular files of a tar, in order. Directories are passed over.

    Raises:
        DataError: the file is no tar, is cut short, holds links or goes on after its end.
    """
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path}: is empty (0 bytes): fetch or write this shard again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield from _walk(path, data, size)


def _walk(path: Path, data: mmap.mmap, size: int) -> Iterator[Member]:
    offset = 0
    name: str | None = None  # set by an extended header for the member after it
    length: int | None = None
    while True:
        header = data[offset : offset + BLOCK]
        if len(header) < BLOCK and offset:
            raise DataError(_cut_short(path, offset, size))
        if not any(header):
            _check_end(path, data, offset)
            return
        if len(header) < BLOCK or _checksum(header) != _number(header[148:156]):
            raise DataError(_not_a_header(path, header, offset))
        kind = header[156:157]
        extent = _number(header[124:136]) if length is None or kind in b"xgLK" else length
        if extent < 0:
            raise DataError(_not_a_header(path, header, offset))
        start = offset + BLOCK
        offset = start + (extent + BLOCK - 1) // BLOCK * BLOCK
        if start + extent > size:
            raise DataError(_cut_short(path, start, size))
        if kind == b"x":  # pax: attributes of the next member
            try:
                attributes = _pax(data[start : start + extent])
                length = int(attributes["size"]) if "size" in attributes else length
            except ValueError as error:
                raise DataError(_not_a_header(path, header, start)) from error
            name = attributes.get("path", name)
        elif kind == b"L":  # GNU: long name of the next member
            name = _text(data[start : start + extent].split(b"\0", 1)[0])
        elif kind in b"gKV":  # pax defaults (no names in them), long link targets, volume labels
            continue
        else:
            if name is None:
                name = _name(header)
            if kind in (b"0", b"\0", b"7"):
                yield Member(name, start, extent)
            elif kind != b"5":  # a directory
                raise DataError(
                    f"{path}: member {name!r} is a link or a special file; only regular files are read. "
                    "Pack the shard again with links followed (tar --dereference)."
                )
            name = length = None


def _check_end(path: Path, data: mmap.mmap, offset: int) -> None:
    """After the first block of zeros there may be only zeros."""
    data.seek(offset)
    while chunk := data.read(1 << 20):
        if chunk.count(0) != len(chunk):
            raise DataError(
                f"{path}: goes on after its end-of-archive mark, as tars do that were joined with `cat`: "
                "what follows "
                "would never be read. Join with `tar --concatenate`, or keep the shards apart."
            )


def _cut_short(path: Path, offset: int, size: int) -> str:
    return (
        f"{path}: the tar is cut short: {size} bytes, and byte {offset} begins a part that is not all there. "
        "Fetch or write this shard again. (If only its end mark is missing, `truncate --size=+1024` adds "
        "one.)"
    )


def _not_a_header(path: Path, header: bytes, offset: int) -> str:
    for magic, tool in _MAGIC.items():
        if offset == 0 and header.startswith(magic):
            return f"{path}: is compressed. Samples are read at random places: unpack it once with `{tool}`."
    if offset == 0:
        return f"{path}: is not a tar file (it begins with {header[:16]!r}). Check what `shards` names."
    return f"{path}: is damaged at byte {offset} (no tar header there). Fetch or write this shard again."


def _checksum(header: bytes) -> int:
    return sum(header) - sum(header[148:156]) + 8 * 32


def _number(field: bytes) -> int:
    """An octal number, or GNU's base-256 where the top bit is set; -1 where it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name = _text(header[:100].split(b"\0", 1)[0])
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return f"{_text(prefix)}/{name}" if prefix else name


def _pax(body: bytes) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n`."""
    found: dict[str, str] = {}
    while body:
        digits, _, _ = body.partition(b" ")
        end = int(digits)
        if end <= len(digits):
            raise ValueError("a record ends before it begins")
        record, body = body[len(digits) + 1 : end - 1], body[end:]
        key, _, value = record.partition(b"=")
        found[_text(key)] = _text(value)
    return found
