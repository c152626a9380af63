"""Pictures spoiled on purpose: noise, blur, weather and digital damage in five degrees of severity.

The kinds and what their degrees mean follow ImageNet-C (Hendrycks & Dietterich 2019, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations", section 3); the code is our own and not that of its data set, so
accuracies compare between models measured here and not with published ones. Of its fifteen, glass blur, snow and frost
are left out; speckle noise and Gaussian blur are of its extra set. Lengths in pixels are those of pictures of 224
pixels and scale with the size of the view.

A corruption is a pure function of (seed, key of the sample, kind, severity): the number of processes, workers and the
batch size change nothing.

Shapes: `x` is `(3, S, S)` float32 in 0..1; `S` is the side of the view.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torch.nn import functional as F

from clip_train.data.hashing import CORRUPT, mix, text_hash

SEVERITIES = 5


@dataclass(frozen=True)
class Corruption:
    """One kind at one severity; 0 leaves a picture as it is."""

    name: str
    severity: int
    seed: int = 0

    def __call__(self, pixels: Tensor, key: str) -> Tensor:
        """`(3, S, S)` uint8 and the sample's key -> `(3, S, S)` uint8."""
        if self.severity == 0:
            return pixels
        kind, degrees = CORRUPTIONS[self.name]
        parts = (self.seed, CORRUPT, text_hash(key), text_hash(self.name), self.severity)
        # Philox's key is the whole state: equal on every machine, and cheap to set up for each picture.
        rng = np.random.Generator(np.random.Philox(key=int(mix(*parts))))
        spoiled = kind(pixels.float() / 255, degrees[self.severity - 1], rng)
        return (spoiled.clamp(0, 1) * 255).round().to(torch.uint8)


def _of_224(x: Tensor, length: float) -> float:
    """A length at 224 pixels in pixels of this view."""
    return length * x.shape[-1] / 224


def _normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


# ---------------------------------------------------------------------------------------------- noise


def gaussian_noise(x: Tensor, deviation: float, rng: np.random.Generator) -> Tensor:
    """x + N(0, deviation²), as in poor light."""
    return x + deviation * _normal(rng, *x.shape)


def shot_noise(x: Tensor, photons: float, rng: np.random.Generator) -> Tensor:
    """Poisson(x · photons) / photons: light comes in pieces; fewer are worse."""
    return torch.from_numpy(rng.poisson(x.numpy() * photons).astype(np.float32)) / photons


def impulse_noise(x: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    """A share of all values is set to 0 or 1, as by broken bits."""
    drawn = torch.from_numpy(rng.random(x.shape, dtype=np.float32))
    return torch.where(drawn < share / 2, 0.0, torch.where(drawn < share, 1.0, x))


def speckle_noise(x: Tensor, deviation: float, rng: np.random.Generator) -> Tensor:
    """x · (1 + N(0, deviation²))."""
    return x + x * deviation * _normal(rng, *x.shape)


# ----------------------------------------------------------------------------------------------- blur


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """Each channel with a kernel `(h, w)` of odd sides, the border repeated."""
    tall, wide = kernel.shape
    padded = F.pad(x[None], (wide // 2, wide // 2, tall // 2, tall // 2), mode="replicate")[0]
    return F.conv2d(padded[:, None], kernel[None, None])[:, 0]


def _gaussian(x: Tensor, deviation: float) -> Tensor:
    """A Gaussian, what of it falls on each pixel: narrower than a pixel it still reaches the next one."""
    reach = max(1, math.ceil(3 * deviation))
    edges = (torch.arange(-reach, reach + 2) - 0.5) / (deviation * math.sqrt(2))
    line = torch.erf(edges).diff()
    line = line / line.sum()
    return _convolved(_convolved(x, line[None, :]), line[:, None])


def gaussian_blur(x: Tensor, deviation: float, rng: np.random.Generator) -> Tensor:
    """A Gaussian of this deviation (pixels of 224)."""
    return _gaussian(x, _of_224(x, deviation))


def defocus_blur(x: Tensor, radius: float, rng: np.random.Generator) -> Tensor:
    """A disc, as a lens out of focus draws a point; its edge is shared out among the pixels it cuts."""
    radius = _of_224(x, radius)
    reach = math.ceil(radius)
    at = torch.arange(-reach, reach + 1).float()
    disc = (radius + 0.5 - torch.hypot(at[:, None], at[None, :])).clamp(0, 1)
    return _convolved(x, disc / disc.sum())


def motion_blur(x: Tensor, length: float, rng: np.random.Generator) -> Tensor:
    """A stroke of this length, within 45° of the horizontal."""
    length, angle = _of_224(x, length), float(rng.uniform(-math.pi / 4, math.pi / 4))
    reach = max(1, math.ceil(length / 2))
    at = torch.arange(-reach, reach + 1).float()
    along = at[None, :] * math.cos(angle) + at[:, None] * math.sin(angle)
    across = at[:, None] * math.cos(angle) - at[None, :] * math.sin(angle)
    stroke = (length / 2 + 0.5 - along.abs()).clamp(0, 1) * (1 - across.abs()).clamp(0, 1)
    return _convolved(x, stroke / stroke.sum())


def zoom_blur(x: Tensor, most: float, rng: np.random.Generator) -> Tensor:
    """The mean of the picture enlarged by 1 to `most` about its centre, as a camera that moves towards it."""
    factors = torch.linspace(1, most, max(2, round((most - 1) / 0.02) + 1))
    seen = x.new_zeros(x.shape)
    for factor in factors.tolist():
        theta = torch.tensor([[1 / factor, 0, 0], [0, 1 / factor, 0]])[None]
        grid = F.affine_grid(theta, [1, *x.shape], align_corners=False)
        seen += F.grid_sample(x[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]
    return seen / len(factors)


# -------------------------------------------------------------------------------------------- weather


def fog(x: Tensor, density: float, rng: np.random.Generator) -> Tensor:
    """A cloud of 1 / f noise over the picture, the whole then dimmed to the brightness it had at most.

    The cloud's mean is a half and its deviation 0.15, so that one is as thick as another.
    """
    side = x.shape[-1]
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :]) * side
    spectrum = np.fft.rfft2(rng.standard_normal((side, side))) / np.maximum(frequency, 1) ** 1.5
    spectrum[0, 0] = 0
    cloud = np.fft.irfft2(spectrum, (side, side))
    cloud = np.clip(0.5 + 0.15 * cloud / max(float(cloud.std()), 1e-9), 0, 1)
    most = float(x.max())
    thick = density * torch.from_numpy(cloud.astype(np.float32))
    return (x + thick) * (most / max(most + density, 1e-9))


def brightness(x: Tensor, more: float, rng: np.random.Generator) -> Tensor:
    """The value of HSV, which is the largest channel, raised by `more`, hue and saturation kept."""
    value = x.amax(0, keepdim=True)
    raised = (value + more).clamp(max=1)
    return torch.where(value > 0, x * (raised / value.clamp_min(1e-9)), raised)


def contrast(x: Tensor, left: float, rng: np.random.Generator) -> Tensor:
    """What is `left` of each channel's distance from its mean."""
    mean = x.mean((1, 2), keepdim=True)
    return (x - mean) * left + mean


# -------------------------------------------------------------------------------------------- digital


def elastic_transform(x: Tensor, reach: float, rng: np.random.Generator) -> Tensor:
    """Every point moved by a smooth random field, `reach` pixels of 224 by root mean square, as a rubber sheet."""
    side = x.shape[-1]
    field = _gaussian(_normal(rng, 2, side, side), _of_224(x, 12.0))
    field = field - field.mean((1, 2), keepdim=True)
    field = field * (_of_224(x, reach) / field.square().sum(0).mean().sqrt().clamp_min(1e-9))
    at = torch.arange(side).float()
    grid = torch.stack([at[None, :] + field[0], at[:, None] + field[1]], dim=-1)
    grid = (2 * grid + 1) / side - 1
    return F.grid_sample(x[None], grid[None], mode="bilinear", padding_mode="reflection", align_corners=False)[0]


def pixelate(x: Tensor, scale: float, rng: np.random.Generator) -> Tensor:
    """As many pixels as a picture of `scale` times the side has: means of boxes, drawn large."""
    side = x.shape[-1]
    count = max(1, int(side * scale))
    edges, at = torch.arange(count + 1) * (side / count), torch.arange(side)
    # How much of each pixel lies in each box.
    share = (torch.minimum(edges[1:, None], at + 1) - torch.maximum(edges[:-1, None], at)).clamp_min(0) * (count / side)
    return F.interpolate((share @ x @ share.T)[None], size=(side, side), mode="nearest-exact")[0]


def jpeg_compression(x: Tensor, quality: float, rng: np.random.Generator) -> Tensor:
    """Encoded as a JPEG of this quality, with half the colours' resolution, and decoded."""
    pixels = (x * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    encoded = simplejpeg.encode_jpeg(
        pixels, quality=int(quality), colorspace="RGB", colorsubsampling="420", fastdct=False
    )
    decoded = simplejpeg.decode_jpeg(encoded, "RGB", fastdct=False, fastupsample=False)
    return torch.from_numpy(decoded).permute(2, 0, 1).float() / 255


CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float, np.random.Generator], Tensor], tuple[float, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "speckle_noise": (speckle_noise, (0.15, 0.20, 0.35, 0.45, 0.60)),
    "gaussian_blur": (gaussian_blur, (1, 2, 3, 4, 6)),
    "defocus_blur": (defocus_blur, (3, 4, 6, 8, 10)),
    "motion_blur": (motion_blur, (10, 15, 20, 28, 36)),
    "zoom_blur": (zoom_blur, (1.10, 1.16, 1.22, 1.28, 1.34)),
    "fog": (fog, (0.6, 1.0, 1.6, 2.5, 4.0)),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (elastic_transform, (1.5, 3.0, 4.5, 6.5, 9.0)),
    "pixelate": (pixelate, (0.60, 0.50, 0.40, 0.30, 0.25)),
    "jpeg_compression": (jpeg_compression, (25, 18, 15, 10, 7)),
}
"""Each kind with its function and what its five severities are."""
