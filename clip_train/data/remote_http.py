"""Shards on web servers. The standard library's client: one connection a transfer, and time limits on all of it."""

from __future__ import annotations

import http.client
import re
import ssl
import time
import urllib.error
import urllib.request

from clip_train.data.transfer import Absent, Found, Sink, Temporary, Transfer, changed
from clip_train.errors import DataError

_BLOCK = 1 << 20
_LEAST = 1 << 16  # bytes in `timeout` seconds; what is slower is as good as hanging
_MAY_PASS = {408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524, 529}
_LARGEST_READ = 1 << 28


def look_up(shard: str, transfer: Transfer) -> Found:
    """Asks for the first byte: servers and signed URLs that answer GET need not answer HEAD."""
    with _get(shard, transfer, {"Range": "bytes=0-0"}) as response:
        return _found(response)


def fetch(shard: str, sink: Sink, expected: Found, transfer: Transfer) -> None:
    """One attempt; goes on from `sink.done` where the version allows to say "only if unchanged"."""
    strong = expected.version and not expected.version.startswith("W/")
    asked = {"Range": f"bytes={sink.done}-", "If-Range": expected.version} if sink.done and strong else {}
    with _get(shard, transfer, asked) as response:
        now = _found(response)
        if not expected.agrees(now):
            raise changed(shard, expected, now)
        if not (response.status == 206 and _first_byte(response) == sink.done):
            sink.restart()
            if response.status == 206:
                raise Temporary("the server sent another range than the one asked for")
        _copy(response, sink, transfer)
    size = expected.size if expected.size is not None else now.size
    if size is not None and sink.done > size:
        sink.restart()
        raise Temporary(f"the server sent more than the {size} bytes it spoke of")
    if size is not None and sink.done < size:
        raise Temporary(f"the connection ended after {sink.done} of {size} bytes")


def read(shard: str, transfer: Transfer) -> bytes:
    """A small file, whole."""
    content = _Bytes()
    with _get(shard, transfer, {}) as response:
        size = _found(response).size
        if size is not None and size > _LARGEST_READ:
            raise DataError(f"{shard}: has {size} bytes, too many for an index")
        _copy(response, content, transfer)
    if size is not None and content.done != size:
        raise Temporary(f"the connection ended after {content.done} of {size} bytes")
    return bytes(content.data)


class _Bytes:
    def __init__(self) -> None:
        self.data = bytearray()

    @property
    def done(self) -> int:
        return len(self.data)

    def write(self, data: bytes) -> None:
        self.data += data


def _get(shard: str, transfer: Transfer, headers: dict[str, str]) -> http.client.HTTPResponse:
    headers = {"User-Agent": "clip-train", "Accept-Encoding": "identity", **headers}
    try:
        response = urllib.request.urlopen(urllib.request.Request(shard, headers=headers), timeout=transfer.timeout)
    except urllib.error.HTTPError as error:
        with error:
            if error.code in _MAY_PASS:
                raise Temporary(f"the server answered {error.code} {error.reason}") from error
            if error.code == 416 and (error.headers.get("Content-Range") or "").strip() == "bytes */0":
                raise DataError(f"{shard}: is empty (0 bytes): write this shard again") from error
            what = {401: "may not be read", 403: "may not be read", 404: "does not exist", 410: "does not exist"}
            if error.code in what:
                raise Absent(f"{what[error.code]} (the server answered {error.code} {error.reason})") from error
            raise DataError(f"{shard}: the server answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError | ValueError | http.client.InvalidURL):
            raise DataError(f"{shard}: cannot be fetched: {reason}") from error
        raise Temporary(_no_answer(reason, transfer)) from error
    if response.headers.get("Content-Encoding", "identity") != "identity":
        response.close()
        raise DataError(f"{shard}: the server compresses it as it is sent; places in it cannot be told. Turn that off.")
    return response


def _copy(response: http.client.HTTPResponse, sink: _Bytes | Sink, transfer: Transfer) -> None:
    since, had = time.monotonic(), sink.done
    try:
        while data := response.read1(_BLOCK):
            sink.write(data)
            if time.monotonic() - since > transfer.timeout:
                if sink.done - had < _LEAST:
                    raise Temporary(f"only {sink.done - had} bytes came in {transfer.timeout:g} s")
                since, had = time.monotonic(), sink.done
    except (OSError, http.client.HTTPException) as error:
        raise Temporary(f"after {sink.done} bytes: {_no_answer(error, transfer)}") from error


def _no_answer(reason: object, transfer: Transfer) -> str:
    return f"no answer for {transfer.timeout:g} s" if isinstance(reason, TimeoutError) else f"{reason}"


def _found(response: http.client.HTTPResponse) -> Found:
    version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    if response.status == 206:
        total = re.fullmatch(r"bytes \d+-\d+/(\d+)", (response.headers.get("Content-Range") or "").strip())
        return Found(int(total[1]) if total else None, version)
    length = response.headers.get("Content-Length") or ""
    return Found(int(length) if length.isdecimal() else None, version)


def _first_byte(response: http.client.HTTPResponse) -> int | None:
    start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
    return int(start[1]) if start else None
