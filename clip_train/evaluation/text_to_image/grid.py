"""Generated pictures side by side: a row a caption, a column an encoder."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from clip_train.errors import DataError
from clip_train.evaluation.text_to_image.generator import Generator

SCALE, GAP, WORDS, HEAD = 2, 4, 170, 26


def picture_grid(captions: Sequence[str], columns: Mapping[str, Tensor], path: Path) -> None:
    """Write a PNG.

    Args:
        columns: by heading, uint8 `(rows * k, 3, S, S)`: `k` pictures of each caption, one after the other.

    Raises:
        DataError: no captions, no columns, or pictures that cannot be dealt out to the captions.
    """
    if not captions or not columns:
        raise DataError("a picture grid needs a caption and a column at least")
    rows = len(captions)
    for name, pictures in columns.items():
        if not len(pictures) or len(pictures) % rows:
            raise DataError(f"column {name!r} has {len(pictures)} pictures for {rows} captions: give k of each")
    strips = {name: _strips(pictures, rows) for name, pictures in columns.items()}
    height = next(iter(strips.values())).shape[1]
    width = WORDS + sum(strip.shape[2] + 3 * GAP for strip in strips.values())
    canvas = Image.new("RGB", (width, HEAD + rows * (height + GAP)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    left = WORDS
    for name, strip in strips.items():
        draw.text((left, 8), _cut(name, strip.shape[2], font), fill="black", font=font)
        for row in range(rows):
            canvas.paste(Image.fromarray(strip[row]), (left, HEAD + row * (height + GAP)))
        left += strip.shape[2] + 3 * GAP
    for row, text in enumerate(captions):
        lines = textwrap.wrap(text, 27)
        for number, line in enumerate(lines[:4] if len(lines) <= 4 else [*lines[:3], lines[3][:24] + " …"]):
            draw.text((4, HEAD + row * (height + GAP) + 13 * number), line, fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    canvas.save(aside, "PNG")
    aside.replace(path)


def grid_of_codes(
    generator: Generator, captions: Sequence[str], codes: Mapping[str, NDArray[np.generic]], path: Path
) -> None:
    """As `picture_grid`, of the codes `(rows * k, L)` that `exp3` kept for several encoders (`exp3/grid`)."""
    decoded = {name: generator.codebook.decode(torch.from_numpy(np.asarray(one)).long()) for name, one in codes.items()}
    picture_grid(captions, decoded, path)


def _strips(pictures: Tensor, rows: int) -> NDArray[np.uint8]:
    """`(rows * k, 3, S, S)` -> `(rows, height, width, 3)`, the k beside each other, enlarged."""
    grouped = pictures.view(rows, -1, *pictures.shape[1:]).permute(0, 3, 1, 4, 2).numpy()  # (rows, S, k, S, 3)
    padded = np.pad(grouped, ((0, 0), (0, 0), (0, 0), (0, 1), (0, 0)), constant_values=255)
    flat = padded.reshape(rows, padded.shape[1], -1, 3)
    return np.ascontiguousarray(flat.repeat(SCALE, 1).repeat(SCALE, 2))


def _cut(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2].rstrip("…") + "…"
    return text
