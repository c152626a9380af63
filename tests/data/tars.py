"""Shards made on the spot."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from conftest import add_member
from numpy.typing import NDArray
from PIL import Image


class BytesTokenizer:
    """One id a byte, at most 200 between 1 and 2: enough for the stream."""

    def encode_counting_cuts(self, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
        ids = [np.array([1, *text.encode()[:200], 2], dtype=np.int32) for text in texts]
        cut = sum(len(text.encode()) > 200 for text in texts)
        return np.concatenate(ids), np.array([len(one) for one in ids], dtype=np.int32), cut


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], kind: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members:
            add_member(tar, name, content)
    return path
