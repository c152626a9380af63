"""Shards in object stores, and wherever else fsspec reads: `s3://`, `gs://`, `az://`, `hdfs://`, …

Credentials and end points are fsspec's business: the usual files and variables (`AWS_…`), or `FSSPEC_S3_…`.
"""

from __future__ import annotations

from typing import Any

import fsspec
import fsspec.config
import fsspec.core

from clip_train.data.transfer import Absent, Found, Sink, Temporary, Transfer, changed
from clip_train.errors import DataError

_BLOCK = 1 << 23
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "mtime", "modified", "created")
_EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}


def look_up(shard: str, transfer: Transfer) -> Found:
    """What the store lists."""
    files, path = _open(shard, transfer)
    return _found(shard, files, path)


def fetch(shard: str, sink: Sink, expected: Found, transfer: Transfer) -> None:
    """One attempt, from `sink.done` on, in ranges; then asks whether the shard is still what it was."""
    files, path = _open(shard, transfer)
    if expected.size is None or not expected.version:  # parts could be of different files
        sink.restart()
    if expected.size is None:
        sink.write(_call(shard, files.cat_file, path))
    while expected.size is not None and sink.done < expected.size:
        data = _call(shard, files.cat_file, path, start=sink.done, end=min(sink.done + _BLOCK, expected.size))
        if not data:
            raise Temporary(f"the store sent {sink.done} of {expected.size} bytes")
        sink.write(data)
    now = _found(shard, files, path)
    if not expected.agrees(now):
        raise changed(shard, expected, now)


def read(shard: str, transfer: Transfer) -> bytes:
    """A small file, whole."""
    files, path = _open(shard, transfer)
    return _call(shard, files.cat_file, path)


def glob(pattern: str, transfer: Transfer) -> list[str]:
    """The files that match, sorted."""
    files, path = _open(pattern, transfer)
    return sorted(str(files.unstrip_protocol(name)) for name in _call(pattern, files.glob, path))


def _open(shard: str, transfer: Transfer) -> tuple[Any, str]:
    """The file system, and the path in it. Asked for each time: fsspec keeps one for each process, and a worker
    may not use its parent's.
    """
    scheme = shard.partition("://")[0]
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme in ("s3", "s3a") and "config_kwargs" not in fsspec.config.conf.get("s3", {}):
        limits = {"connect_timeout": transfer.timeout, "read_timeout": transfer.timeout, "retries": {"max_attempts": 1}}
        options["config_kwargs"] = limits  # botocore's own would add up to minutes
    try:
        files, path = fsspec.core.url_to_fs(shard, **options)
    except ImportError as error:
        package = _EXTRAS.get(scheme)
        how = "pip install 'clip-train[remote]'" if package else "install the package that fsspec wants for it"
        raise DataError(f"{shard}: nothing is installed that reads {scheme}:// ({error}). Do: {how}.") from error
    except ValueError as error:
        raise DataError(f"{shard}: {error}. Known are local paths, http(s), pipe: and what fsspec reads.") from error
    return files, str(path)


def _found(shard: str, files: Any, path: str) -> Found:
    files.invalidate_cache()
    entry = _call(shard, files.info, path)
    if entry.get("type") == "directory":
        raise Absent("is a folder")
    size = entry.get("size")
    version = next((str(entry[name]) for name in _VERSIONS if entry.get(name)), "")
    return Found(None if size is None else int(size), version)


def _call(shard: str, function: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return function(*arguments, **options)
    except FileNotFoundError as error:
        raise Absent("does not exist") from error
    except PermissionError as error:
        raise Absent(f"may not be read ({error})") from error
    except (ValueError, NotImplementedError, ImportError) as error:
        raise DataError(f"{shard}: cannot be fetched: {type(error).__name__}: {error}") from error
    except Exception as error:  # every store has its own errors
        if "Credential" in type(error).__name__:
            raise DataError(f"{shard}: {error}. Give credentials as this store's own tools take them.") from error
        raise Temporary(f"{type(error).__name__}: {error}") from error
