"""One picture with its words, on its way from a source to a shard; and how an SVG becomes pixels."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import resvg_py
from numpy.typing import NDArray
from PIL import Image, ImageOps

SIZE = 64
"""Side of a stored picture, pixels."""
OVERSAMPLE = 4
"""An SVG is rendered at SIZE * OVERSAMPLE and averaged down: the rasteriser's own antialiasing is harsher."""

Pixels = NDArray[np.uint8]
"""[SIZE, SIZE, 3], RGB."""


@dataclass(frozen=True)
class Picture:
    """What a source yields. `key` is unique in the whole data set and has no dot (WebDataset's separator)."""

    key: str
    svg: str
    captions: tuple[str, ...]
    source: str
    license: str
    label: str | None = None
    concept: str | None = None
    """Emoji: the character sequence without variation selectors; equal in every set that draws it."""
    flip: bool = False
    """Mirror the picture (an icon stored as the mirror image of another)."""
    trim: bool = False
    """Crop to what is drawn (clip art drawn in the corner of a page)."""


def rasterise(picture: Picture) -> Pixels:
    """Render, centre on a white square and average down to SIZE.

    System fonts are left out, so that the same SVG gives the same pixels on every machine.

    Raises:
        ValueError: the SVG cannot be rendered, or nothing is drawn.
    """
    side = SIZE * OVERSAMPLE
    image = _render(picture.svg, side)
    if picture.trim:
        box = image.getchannel("A").getbbox()
        if box is None:
            raise ValueError("nothing is drawn")
        if max(box[2] - box[0], box[3] - box[1]) < 0.9 * side:
            # A small drawing on a large page: render larger so that the crop is still sharp.
            grown = min(8 * side, side * side // max(box[2] - box[0], box[3] - box[1]))
            image = _render(picture.svg, grown)
            box = image.getchannel("A").getbbox()
        inner = side - 4 * OVERSAMPLE
        image = ImageOps.contain(image.crop(box), (inner, inner), Image.Resampling.BOX)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2), image)
    if picture.flip:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BOX))
    if int(pixels.max()) - int(pixels.min()) < 8:
        raise ValueError("nothing is drawn")
    return pixels


def _render(svg: str, side: int) -> Image.Image:
    """RGBA, the longer side `side` pixels. dpi=96 because resvg cannot read sizes in mm without one."""
    png = resvg_py.svg_to_bytes(svg_string=svg, dpi=96, width=side, height=side, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def encode_webp(pixels: Pixels, quality: int) -> bytes:
    """Lossy WebP. Sharp YUV: the chroma of flat art bleeds at this size without it."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "WEBP", quality=quality, method=6, use_sharp_yuv=True)
    return stream.getvalue()
