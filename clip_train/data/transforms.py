"""Pixels -> what the image tower is fed: random views in training, a fixed one in evaluation.

Training has two halves. The geometry that needs the whole picture, a random crop resized with antialiasing,
is done one picture at a time, since pictures differ in size. What follows (zoom out, rotate, flip, colours)
is done on
the batch: one affine sampling, and one 3x4 matrix a picture for all colour changes together.

Every parameter is a function of (seed, epoch, source, shard, sample), so a resumed run sees the same pixels;
and batched arithmetic is elementwise, so that they do not depend on which samples share a batch.

Sources: torchvision's RandomResizedCrop and ColorJitter for the distributions; Pillow's resize for the
filter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from clip_train.data.decode import SHRINKS, Pixels, decode, shrinkable_size, to_rgb

if TYPE_CHECKING:
    from clip_train.data.rand_augment import RandAugment

Interpolation = Literal["bicubic", "bilinear"]
Resize = Literal["shortest", "longest", "squash"]
Box = tuple[int, int, int, int]
"""(left, top, width, height) in pixels."""
Matrix = NDArray[np.float64]

LUMA = np.array([0.299, 0.587, 0.114])
"""Grey = LUMA . RGB (ITU-R BT.601, as Pillow and torchvision)."""
_CHROMA = np.array([LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])  # RGB -> YIQ
_FROM_CHROMA = np.linalg.inv(_CHROMA)

_IN_CACHE = 1 << 17

DRAWS = 40
"""Uniform numbers that one sample's view is made from: 11 for the batch's half, 20 from 12 on for the crop, 8 from 32
on for RandAugment."""


def resize_crop(pixels: Pixels, box: Box, size: int, interpolation: Interpolation) -> Tensor:
    """The part `box = (left, top, width, height)` of a picture, resized to a square.

    Antialiased, as Pillow's `resize` (to one grey level). Torch has a fast kernel for uint8 pictures in
    channels-last order, which is what decoders give.

    Returns:
        (3, size, size) uint8.
    """
    return resize(pixels, box, (size, size), interpolation)


def resize(pixels: Pixels, box: Box, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    """As `resize_crop`, to any `(height, width)`."""
    left, top, width, height = box
    part = torch.from_numpy(pixels)[top : top + height, left : left + width].permute(2, 0, 1)
    if (height, width) == size:
        return part
    return functional.interpolate(part[None], size, mode=interpolation, antialias=True)[0]


# ----------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Preprocess:
    """The fixed view: a Pillow image to the tower's input. It travels with every export.

    With `resize = "shortest"` this is what OpenCLIP and CLIP do: the shortest side to `size`, the centre cut
    out.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation = "bicubic"
    resize: Resize = "shortest"

    def __call__(self, image: Image.Image) -> Tensor:
        """A Pillow image of any mode -> (3, size, size) float32, normalised."""
        return normalize(self.pixels(to_rgb(image))[None], self.mean, self.std)[0]

    def pixels(self, pixels: Pixels) -> Tensor:
        """(H, W, 3) uint8 -> (3, size, size) uint8."""
        height, width, _ = pixels.shape
        whole = (0, 0, width, height)
        if self.resize == "squash":
            return resize_crop(pixels, whole, self.size, self.interpolation)
        if self.resize == "longest":
            scale = self.size / max(height, width)
            fitted = (max(1, round(height * scale)), max(1, round(width * scale)))
            top, left = (self.size - fitted[0]) // 2, (self.size - fitted[1]) // 2
            canvas = torch.zeros((3, self.size, self.size), dtype=torch.uint8)  # black bars, as OpenCLIP
            canvas[:, top : top + fitted[0], left : left + fitted[1]] = resize(
                pixels, whole, fitted, self.interpolation
            )
            return canvas
        short = min(height, width)
        scaled = (int(self.size * height / short), int(self.size * width / short))
        top, left = round((scaled[0] - self.size) / 2), round((scaled[1] - self.size) / 2)
        return resize(pixels, whole, scaled, self.interpolation)[:, top : top + self.size, left : left + self.size]


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """(B, 3, H, W) uint8 -> (x / 255 - mean) / std, in float32 on the images' device, then `dtype`."""
    scale = torch.tensor([255.0 * s for s in std], device=images.device).view(1, 3, 1, 1)
    shift = torch.tensor([255.0 * m for m in mean], device=images.device).view(1, 3, 1, 1)
    floats = images.to(torch.float32, copy=True)
    return floats.sub_(shift).div_(scale).to(dtype)  # in place: new memory costs more than the arithmetic


# ------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Augment:
    """Random views. The defaults change nothing but the crop; see `[data.augment]` for the meaning of each
    field.
    """

    size: int
    interpolation: Interpolation = "bicubic"
    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    rotate: float = 0.0
    zoom_out: float = 1.0
    fill: int = 255
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    color_probability: float = 0.8
    grayscale: float = 0.0
    scaled_decode: bool = False
    rand_augment: RandAugment | None = None

    def view(self, data: bytes, draws: NDArray[np.float64]) -> Tensor:
        """The first half of a view, from a file's bytes: as `crop(decode(data), draws)`, but for `scaled_decode`.

        Raises:
            DecodeError: as `decode`.
        """
        return self._resized(*self.part(data, draws), draws)

    def part(self, data: bytes, draws: NDArray[np.float64]) -> tuple[Pixels, Box]:
        """The decoded picture, and the box in it that becomes the view.

        With `scaled_decode` a JPEG is decoded at 1/2, 1/4 or 1/8 where the box still has `size` pixels a side then.
        The box is drawn for the true size: it is the same part of the picture, to half a pixel of the shrunk one.
        """
        if self.scaled_decode and (size := shrinkable_size(data)):
            box = crop_box(*size, self.crop_scale, self.crop_ratio, draws[12:])
            for shrink in reversed(SHRINKS):
                if min(box[2:]) // shrink >= self.size:
                    return decode(data, shrink), shrunk_box(box, shrink)
            return decode(data), box
        pixels = decode(data)
        height, width, _ = pixels.shape
        return pixels, crop_box(width, height, self.crop_scale, self.crop_ratio, draws[12:])

    def crop(self, pixels: Pixels, draws: NDArray[np.float64]) -> Tensor:
        """First half, one picture: the random crop, resized; RandAugment.

        Args:
            pixels: (H, W, 3) uint8.
            draws: (DRAWS,) uniform numbers of this sample.

        Returns:
            (3, size, size) uint8.
        """
        height, width, _ = pixels.shape
        return self._resized(pixels, crop_box(width, height, self.crop_scale, self.crop_ratio, draws[12:]), draws)

    def _resized(self, pixels: Pixels, box: Box, draws: NDArray[np.float64]) -> Tensor:
        view = resize_crop(pixels, box, self.size, self.interpolation)
        return view if self.rand_augment is None else self.rand_augment(view, draws[32:], self.fill)

    def batch(self, images: Tensor, draws: NDArray[np.float64]) -> Tensor:
        """Second half, the batch: zoom out, rotate, flip, colours.

        Args:
            images: (B, 3, size, size) uint8; may be overwritten.
            draws: (B, DRAWS) uniform numbers, a row a sample.

        Returns:
            (B, 3, size, size) uint8.
        """
        flips = draws[:, 0] < self.flip
        bends = self.rotate > 0 or self.zoom_out > 1
        changes = any((self.brightness, self.contrast, self.saturation, self.hue, self.grayscale))
        if not bends and flips.any():
            for row in np.flatnonzero(flips).tolist():  # one by one: 20 times as fast as indexing with all of them
                images[row] = images[row].flip(-1)
        if not bends and not changes:
            return images
        # Means in integers: their sum is the same in any order, on any number of threads.
        means = images.numpy().reshape(len(images), 3, -1).sum(-1, dtype=np.uint32) / (self.size * self.size)
        maps, colours = self._affine(draws, flips), self._colours(means, draws)
        # A few pictures at a time, so that the floats between the steps stay in the processor's cache.
        few = max(1, _IN_CACHE // (3 * self.size * self.size))
        for start in range(0, len(images), few):
            part = slice(start, start + few)
            view = images[part].float()
            if bends:
                view = warp(view, maps[part], self.fill, self.interpolation)
            if changes:
                view = recolour(view, colours[part])
            images[part] = view.round_().clamp_(0, 255)
        return images

    def _affine(self, draws: NDArray[np.float64], flips: NDArray[np.bool_]) -> Matrix:
        """(B, 2, 3): where in the picture each place of the result comes from, both in [-1, 1]."""
        maps = np.empty((len(draws), 2, 3))
        for row, (draw, flip) in enumerate(zip(draws.tolist(), flips.tolist(), strict=True)):
            angle = math.radians(self.rotate) * (2 * draw[1] - 1)
            zoom = self.zoom_out ** draw[2]
            # The shrunk picture lies anywhere on the canvas where it fits.
            x, y = (zoom - 1) * (2 * draw[3] - 1), (zoom - 1) * (2 * draw[4] - 1)
            cos, sin, mirror = zoom * math.cos(angle), zoom * math.sin(angle), -1.0 if flip else 1.0
            maps[row] = [[mirror * cos, mirror * -sin, mirror * x], [sin, cos, y]]
        return maps

    def _colours(self, means: NDArray[np.float64], draws: NDArray[np.float64]) -> Matrix:
        """(B, 3, 4): brightness, contrast, saturation, hue, grey, in this order, as one matrix and offset.

        Contrast goes towards the mean grey, which is a function of the mean colours `means` (B, 3).
        """
        matrices = np.zeros((len(draws), 3, 4))
        for row, draw in enumerate(draws.tolist()):
            matrix, offset = np.eye(3), np.zeros(3)
            if draw[5] < self.color_probability:
                signed = [2 * d - 1 for d in draw[6:10]]
                matrix = matrix * (1 + self.brightness * signed[0])
                factor = 1 + self.contrast * signed[1]
                offset = offset + (1 - factor) * float(LUMA @ matrix @ means[row])
                matrix = matrix * factor
                for change in (
                    saturation_matrix(1 + self.saturation * signed[2]),
                    hue_matrix(self.hue * signed[3]),
                ):
                    matrix, offset = change @ matrix, change @ offset
            if draw[10] < self.grayscale:
                matrix, offset = saturation_matrix(0.0) @ matrix, saturation_matrix(0.0) @ offset
            matrices[row, :, :3], matrices[row, :, 3] = matrix, offset
        return matrices


def crop_box(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draws: NDArray[np.float64],
) -> Box:
    """The random resized crop: `(left, top, width, height)`.

    An area (uniform in `scale`, of the whole) and an aspect ratio (log-uniform in `ratio`) are drawn until
    the box fits, five times at most; then it is the largest centred box whose ratio is allowed.

    Args:
        draws: (>= 20,) uniform numbers.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for tries in range(0, 20, 4):
        a, r, x, y = draws[tries : tries + 4].tolist()
        area = width * height * (scale[0] + a * (scale[1] - scale[0]))
        aspect = math.exp(low + r * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(x * (width - w + 1)), int(y * (height - h + 1)), w, h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def shrunk_box(box: Box, shrink: int) -> Box:
    """The box in a picture that was decoded at 1 / shrink: its edges rounded, its sides at least floor(side / shrink).

    It lies in the shrunk picture, whose sides are rounded up.
    """
    left, top, width, height = (int(value / shrink + 0.5) for value in (*box[:2], box[0] + box[2], box[1] + box[3]))
    return left, top, width - left, height - top


def warp(images: Tensor, maps: Matrix, fill: int, interpolation: Interpolation) -> Tensor:
    """Sample (B, 3, S, S) float pictures along affine maps (B, 2, 3); what lies outside is `fill`."""
    size = images.shape[-1]
    theta = torch.from_numpy(maps.astype(np.float32))
    at = (torch.arange(size, dtype=torch.float32) * 2 + 1) / size - 1
    # As affine_grid, but elementwise: the same bits for a sample in any batch, and faster.
    x = theta[:, :, 0, None, None] * at[None, None, None, :]
    y = theta[:, :, 1, None, None] * at[None, None, :, None]
    grid = (x + y + theta[:, :, 2, None, None]).permute(0, 2, 3, 1)
    shown = functional.grid_sample(images - fill, grid, mode=interpolation, padding_mode="zeros", align_corners=False)
    return shown.add_(fill)


def recolour(images: Tensor, matrices: Matrix) -> Tensor:
    """Apply (B, 3, 4) colour matrices with offsets to (B, 3, H, W) float pictures of 0..255."""
    m = torch.from_numpy(matrices.astype(np.float32))[..., None, None]
    red, green, blue = images[:, None, 0], images[:, None, 1], images[:, None, 2]
    return red.mul(m[:, :, 0]).add_(green.mul(m[:, :, 1])).add_(blue.mul(m[:, :, 2])).add_(m[:, :, 3])


def saturation_matrix(factor: float) -> Matrix:
    """A blend of a picture and its grey: 1 is the picture, 0 is grey."""
    return factor * np.eye(3) + (1 - factor) * np.tile(LUMA, (3, 1))


def hue_matrix(turns: float) -> Matrix:
    """Turn hues by a part of the circle, keeping grey and brightness.

    A rotation about the grey axis in YIQ: linear, unlike torchvision's detour through HSV, and the same to
    the eye.
    """
    cos, sin = math.cos(2 * math.pi * turns), math.sin(2 * math.pi * turns)
    turn = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])
    return _FROM_CHROMA @ turn @ _CHROMA
