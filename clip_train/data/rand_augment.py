"""RandAugment: a few operations out of a list, all at one magnitude.

Source: Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space" (2020), with the
operations and magnitudes of torchvision's `v2.RandAugment`, computed by torchvision's functions. What is drawn is a
function of the sample's random numbers, not of a generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

MOST_OPS = 4
BINS = 31
"""Magnitudes are 0 … 30."""
OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip


@dataclass(frozen=True)
class RandAugment:
    """`ops` operations, each drawn from all, at `magnitude` of 30; what comes into the picture is `fill`."""

    ops: int = 2
    magnitude: int = 9

    def __call__(self, image: Tensor, draws: NDArray[np.float64], fill: int) -> Tensor:
        """One picture.

        Args:
            image: (3, S, S) uint8.
            draws: (>= 2 * ops,) uniform numbers: an operation and a sign each.

        Returns:
            (3, S, S) uint8.
        """
        for number in range(self.ops):
            which, sign = draws[2 * number : 2 * number + 2].tolist()
            image = apply(image, OPERATIONS[int(which * len(OPERATIONS))], self.magnitude, sign < 0.5, fill)
        return image


def apply(image: Tensor, operation: str, magnitude: int, negative: bool, fill: int) -> Tensor:
    """One of `OPERATIONS` on (3, S, S) uint8; those without a direction pass over `negative`."""
    side = image.shape[-1]

    def level(most: float) -> float:  # as torchvision has it, to the bit
        found = float(torch.linspace(0.0, most, BINS)[magnitude])
        return -found if negative else found

    match operation:
        case "identity":
            return image
        case "shear_x" | "shear_y":
            degrees = math.degrees(math.atan(level(0.3)))
            shear = [degrees, 0.0] if operation == "shear_x" else [0.0, degrees]
            return _affine(image, fill, shear=shear, center=[0.0, 0.0])
        case "translate_x" | "translate_y":
            pixels = int(level(150.0 / 331.0 * side))
            return _affine(image, fill, translate=[pixels, 0] if operation == "translate_x" else [0, pixels])
        case "rotate":
            return functional.rotate(image, level(30.0), InterpolationMode.BILINEAR, fill=[float(fill)] * 3)
        case "brightness":
            return functional.adjust_brightness(image, 1.0 + level(0.9))
        case "color":
            return functional.adjust_saturation(image, 1.0 + level(0.9))
        case "contrast":
            return _contrast(image, 1.0 + level(0.9))
        case "sharpness":
            return functional.adjust_sharpness(image, 1.0 + level(0.9))
        case "posterize":
            return functional.posterize(image, 8 - round(4 * magnitude / (BINS - 1)))
        case "solarize":
            return functional.solarize(image, 255 * float(torch.linspace(1.0, 0.0, BINS)[magnitude]))
        case "autocontrast":
            return functional.autocontrast(image)
        case "equalize":
            return functional.equalize(image)
        case _:
            raise ValueError(f"no operation {operation!r}")


def _affine(
    image: Tensor,
    fill: int,
    *,
    translate: list[int] | None = None,
    shear: list[float] | None = None,
    center: list[float] | None = None,
) -> Tensor:
    return functional.affine(
        image,
        angle=0.0,
        translate=[float(value) for value in translate or (0, 0)],
        scale=1.0,
        shear=shear or [0.0, 0.0],
        interpolation=InterpolationMode.BILINEAR,
        fill=[float(fill)] * 3,
        center=center,
    )


def _contrast(image: Tensor, factor: float) -> Tensor:
    """torchvision's `adjust_contrast`, its mean in integers: the same on any number of threads."""
    grey = functional.rgb_to_grayscale(image)
    mean = int(grey.sum()) / grey.numel()
    return image.float().mul_(factor).add_((1 - factor) * mean).clamp_(0, 255).to(image.dtype)
