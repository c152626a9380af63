"""A web server on loopback that misbehaves on demand."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ShardServer(ThreadingHTTPServer):
    """Serves `files` (path -> bytes). `faults` are used up, one by each GET of a body (not by look-ups of one byte).

    Faults: a status code; `drop:N` breaks off after N bytes; `stall:N` is silent after N bytes; `drip` sends a byte
    now and then; `change:N` breaks off after N bytes, and the file is another one from then on; `hang` never answers;
    `page` answers everything with a page; `gzip` claims a compressed body.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: deque[str] = deque()
        self.always = ""  # a fault of every GET, look-ups too
        self.ranges = self.versions = True
        self.weak = False
        self.requests: list[tuple[str, str, str]] = []  # path, Range, If-Range
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> ShardServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def bodies(self, path: str | None = None) -> list[tuple[str, str]]:
        """Range and If-Range of each GET of a body."""
        return [(r, i) for p, r, i in self.requests if r != "bytes=0-0" and path in (None, p) and p.endswith(".tar")]


class Handler(BaseHTTPRequestHandler):
    server: ShardServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path, wanted = self.path.partition("?")[0][1:], self.headers.get("Range", "")
        condition = self.headers.get("If-Range", "")
        self.server.requests.append((path, wanted, condition))
        lookup = wanted == "bytes=0-0"
        fault = self.server.always
        if not lookup and path.endswith(".tar") and self.server.faults:
            fault = self.server.faults.popleft()
        if fault == "hang":
            self.server.closing.wait()
            return
        if fault.isdecimal():
            self.send_error(int(fault))
            return
        if path not in self.server.files and fault != "page":
            self.send_error(404)
            return
        data = b"<html>log in first</html>" if fault == "page" else self.server.files[path]
        tag = f'{"W/" * self.server.weak}"{hashlib.md5(data).hexdigest()}"'
        start, end = 0, len(data)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
        if asked and self.server.ranges and condition in ("", tag):
            start, end = int(asked[1]), min(len(data), int(asked[2]) + 1 if asked[2] else len(data))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - start))
        if self.server.versions:
            self.send_header("ETag", tag)
        if fault == "gzip":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self._body(path, data[start:end], fault)

    def _body(self, path: str, body: bytes, fault: str) -> None:
        kind, _, number = fault.partition(":")
        if kind == "drip":
            for byte in body:
                self.wfile.write(bytes([byte]))
                if self.server.closing.wait(0.02):
                    return
        if kind not in ("drop", "stall", "change"):
            self.wfile.write(body)
            return
        self.wfile.write(body[: int(number)])
        self.wfile.flush()
        if kind == "stall":
            self.server.closing.wait()
        if kind == "change":
            self.server.files[path] = bytes(reversed(self.server.files[path]))
        time.sleep(0.01)
        self.close_connection = True
