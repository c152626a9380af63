"""Shards of JPEGs that weigh and decode like photographs, made here: no photographs ship with the project.

Pictograms (the embedded shards) at random places and sizes on a background of 1/f texture with sensor noise. What
decoding costs is the number of coded coefficients, so the noise is set to give 60 to 100 kB at quality 90, 4:2:0, for
512 x 384 pixels, as photographs have; file size and size in pixels differ from picture to picture.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clip_train.data.files import ShardFiles
from clip_train.data.shards import index, resolve

QUALITY = 90


def photo_shards(folder: Path, *, width: int = 512, height: int = 384, count: int = 512, shards: int = 2) -> list[Path]:
    """Make `NAME-0.tar`, … in `folder`, unless they are there: `jpg` and `txt` members, the same bytes every time.

    Sides are within 10 % of `width` and `height`; every fourth picture is upright.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"photos-{width}x{height}-{count}-{number}.tar" for number in range(shards)]
    if all(path.exists() for path in paths):
        return paths
    samples = _samples(width, height, count)
    for path in paths:
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file, tarfile.open(fileobj=file, mode="w") as tar:
            for _ in range(count // shards):
                for name, content in next(samples):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        Path(file.name).replace(path)
    return paths


def _samples(width: int, height: int, count: int) -> Iterator[list[tuple[str, bytes]]]:
    generator = np.random.default_rng(0)
    pictograms = list(_pictograms(256))
    for number in range(count):
        size = (np.array([width, height]) * generator.uniform(0.9, 1.1, 2)).astype(int).tolist()
        background = texture(size[::-1] if number % 4 == 3 else size, generator)
        picture, caption = pictograms[number % len(pictograms)]
        _paste(background, picture, generator)
        stream = io.BytesIO()
        Image.fromarray(background).save(stream, "JPEG", quality=QUALITY, subsampling=2)
        yield [(f"{number:06d}.jpg", stream.getvalue()), (f"{number:06d}.txt", caption.encode())]


def texture(size: list[int], generator: np.random.Generator) -> NDArray[np.uint8]:
    """(H, W, 3): amplitudes fall with 1 / frequency, as in photographs, more in grey than in colour; sensor noise."""
    width, height = size
    total = np.zeros((height, width, 3))
    for octave in range(2, 9):
        grid = (max(2, (height << octave) >> 9), max(2, (width << octave) >> 9))
        waves = generator.normal(size=(*grid, 1)) + 0.3 * generator.normal(size=(*grid, 3))
        planes = [Image.fromarray(waves[..., c].astype(np.float32)) for c in range(3)]
        smooth = [np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) for plane in planes]
        total += np.stack(smooth, -1) / 2.0 ** (octave - 2)
    noise = generator.normal(size=(height, width, 1)) * generator.uniform(6, 16)
    return np.clip(128 + 30 * total + noise, 0, 255).astype(np.uint8)


def _paste(background: NDArray[np.uint8], picture: NDArray[np.uint8], generator: np.random.Generator) -> None:
    """Put a pictogram on the background, the white around it left out."""
    side = int(generator.uniform(0.3, 0.6) * min(background.shape[:2]))
    large = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))
    top, left = (int(generator.integers(0, most - side)) for most in background.shape[:2])
    place = background[top : top + side, left : left + side]
    drawn = large.min(axis=2, keepdims=True) < 235
    np.copyto(place, large, where=drawn)


def _pictograms(count: int) -> Iterator[tuple[NDArray[np.uint8], str]]:
    files = ShardFiles()
    shard = index(resolve("embedded:pictograms/train-000000.tar")[0])
    for sample in range(count):
        image, words = shard.member(sample, "webp"), shard.member(sample, "json")
        assert image is not None and words is not None
        pixels = Image.open(io.BytesIO(files.read(shard, *image))).convert("RGB")
        yield np.asarray(pixels), json.loads(files.read(shard, *words))["captions"][-1]
