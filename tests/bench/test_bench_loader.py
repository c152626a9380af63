from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from clip_train.bench.loader import check_same_pixels
from clip_train.bench.photos import photo_shards
from clip_train.data.stream import open_source
from clip_train.data.transforms import Augment
from clip_train.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return photo_shards(tmp_path_factory.mktemp("photos"), width=96, height=72, count=64, shards=2)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {one.name: file.read() for one in tar if (file := tar.extractfile(one))}


def test_photos_are_jpegs_with_captions_the_same_every_time(shards: list[Path], tmp_path: Path) -> None:
    assert len(shards) == 2
    for path in shards:
        content = members(path)
        pictures = [Image.open(io.BytesIO(data)) for name, data in content.items() if name.endswith(".jpg")]
        assert len(pictures) == 32 and len(content) == 64
        assert all(picture.format == "JPEG" and min(picture.size) >= 64 for picture in pictures)
        assert sum(picture.height > picture.width for picture in pictures) == 8  # every fourth is upright
        assert all(data.decode().strip() for name, data in content.items() if name.endswith(".txt"))
    again = photo_shards(tmp_path, width=96, height=72, count=64, shards=2)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in shards]


def test_other_pixels_than_open_clips_are_refused(shards: list[Path]) -> None:
    source = open_source("s", [str(path) for path in shards], "jpg", "txt")
    console = Console(file=io.StringIO())
    check_same_pixels(source, Augment(48), console)
    with pytest.raises(UserError, match=r"differ by \d+\.\d grey levels"):
        check_same_pixels(source, Augment(48, interpolation="bilinear"), console)


def test_the_command_compares_and_judges(shards: list[Path], tmp_path: Path) -> None:
    """In its own process: it leaves workers' iterators to the end."""
    command = [sys.executable, "-m", "clip_train", "bench", "loader", *map(str, shards), "--size", "32", "--scaled"]
    command += ["--batch-size", "8", "--batches", "2", "--rounds", "1", "--threads", "2", "--ways", "0:1"]
    found = subprocess.run(
        [*command, "--bar", "1000"], capture_output=True, text=True, timeout=600, env=os.environ | {"COLUMNS": "200"}
    )
    lines = found.stdout.splitlines()
    assert found.returncode == 1, found.stderr
    assert "below the bar of 1000.00" in lines[-2]
    assert 0 < float(lines[-1].removeprefix("ratio ")) < 1000
    assert "64 pictures in 2 shards" in found.stdout
    assert "scaled decoding shrinks 32 of 32 pictures; PSNR" in found.stdout
    for row in ("open_clip, 1 x 1", "clip-train, 1 x 2", "clip-train, 0 x 1", "decoding alone, 2 threads"):
        assert row in found.stdout
