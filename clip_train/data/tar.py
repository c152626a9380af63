"""Reading the headers of a tar file, and nothing else: where each member's bytes are.

Python's `tarfile` does this too, at ~60 us a member and silently stopping at damage. Here every header's
checksum and bound is checked, and what does not add up is a `DataError` that names the shard.

The file is read, not mapped: a mapped file that somebody cuts short takes the process with it (SIGBUS).

Source: POSIX.1-2001 pax (ustar blocks, pax headers `x` and `g`) and the GNU tar manual (long names `L`, base-256
sizes, sparse members `S` and `GNU.sparse.*`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from clip_train.errors import DataError

BLOCK = 512
_MOST_ATTRIBUTES = 1 << 20  # bytes of a long name or of pax attributes; no honest writer needs more
_SPECIAL = {b"1": "a hard link (pack with `tar --hard-dereference`)", b"2": "a link (pack with `tar --dereference`)",
            b"3": "a device", b"4": "a device", b"6": "a pipe"}  # fmt: skip
_MAGIC = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"(\xb5": "unzstd"}


class Member(NamedTuple):
    """A file in a tar: its name, and where its bytes lie in the tar."""

    name: str
    offset: int
    size: int
    problem: str = ""
    """Why its bytes cannot be used: it is a link, a device, or has holes."""


def members(path: Path) -> Iterator[Member]:
    """The files of a tar, in order. Directories are passed over.

    Raises:
        DataError: the file is no tar, is cut short or goes on after its end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:
            raise DataError(f"{path}: is empty (0 bytes): fetch or write this shard again")
        yield from _walk(path, descriptor, size)
    finally:
        os.close(descriptor)


def _walk(path: Path, descriptor: int, size: int) -> Iterator[Member]:
    offset = 0
    name: str | None = None  # set by an extended header for the member after it
    length: int | None = None
    sparse = False
    while True:
        header = os.pread(descriptor, BLOCK, offset)
        if len(header) < BLOCK and offset:
            raise DataError(_cut_short(path, offset, size))
        if not any(header):
            _check_end(path, descriptor, offset)
            return
        if len(header) < BLOCK or _checksum(header) != _number(header[148:156]):
            raise DataError(_not_a_header(path, header, offset))
        kind = header[156:157]
        extent = _number(header[124:136]) if length is None or kind in b"xgLK" else length
        if kind in b"123456":  # links, devices, directories: whatever their headers say, no bytes follow
            extent = 0
        if extent < 0 or (kind in b"xL" and extent > _MOST_ATTRIBUTES):
            raise DataError(_not_a_header(path, header, offset))
        start = offset + BLOCK
        offset = start + (extent + BLOCK - 1) // BLOCK * BLOCK
        if start + extent > size:
            raise DataError(_cut_short(path, start, size))
        if kind == b"x":  # pax: attributes of the next member
            try:
                attributes = _pax(os.pread(descriptor, extent, start))
                length = int(attributes["size"]) if "size" in attributes else length
            except ValueError as error:
                raise DataError(_not_a_header(path, header, start)) from error
            name = attributes.get("GNU.sparse.name") or attributes.get("path", name)
            sparse = any(key.startswith("GNU.sparse.") for key in attributes)
        elif kind == b"L":  # GNU: long name of the next member
            name = _text(os.pread(descriptor, extent, start).split(b"\0", 1)[0])
        elif kind in b"gKV":  # pax defaults (no names in them), long link targets, volume labels
            continue
        else:
            if name is None:
                name = _name(header)
            if kind == b"S":
                sparse = True
                more = header[482]
                while more:  # blocks that only list more holes
                    more = (os.pread(descriptor, BLOCK, start) or b"\0").ljust(BLOCK, b"\0")[504]
                    start, offset = start + BLOCK, offset + BLOCK
            if sparse:
                yield Member(name, start, extent, "has holes (a sparse file; pack without `tar --sparse`)")
            elif kind in (b"0", b"\0", b"7"):
                yield Member(name, start, extent)
            elif kind in _SPECIAL:
                yield Member(name, start, 0, f"is {_SPECIAL[kind]}; only regular files are read")
            elif kind != b"5":  # a directory
                yield Member(name, start, 0, f"is of the unknown kind {kind!r}; only regular files are read")
            name, length, sparse = None, None, False


def _check_end(path: Path, descriptor: int, offset: int) -> None:
    """After the first block of zeros there may be only zeros."""
    while chunk := os.pread(descriptor, 1 << 20, offset):
        if chunk.count(0) != len(chunk):
            raise DataError(
                f"{path}: goes on after its end-of-archive mark, as tars do that were joined with `cat`: what follows "
                "would never be read. Join with `tar --concatenate`, or keep the shards apart."
            )
        offset += len(chunk)


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
