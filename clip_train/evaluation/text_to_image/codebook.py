"""Pictures as a few numbers and back: a vector-quantised autoencoder (van den Oord et al. 2017).

Shapes: `B` pictures of `S` x `S`, `G = S / patch` places a side, `L = G * G` codes of `K`, `C` width of a code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Residual(nn.Module):
    """`x + conv(gelu(conv(gelu(x))))`, each 3 x 3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.first(F.gelu(x))))


class Codebook(nn.Module):
    """One code of `codes` for each `patch` x `patch` pixels; encoder and decoder also look at the neighbours.

    Raises:
        ValueError: `size` is no multiple of `patch`.
    """

    codes: Tensor

    def __init__(self, size: int = 30, patch: int = 5, codes: int = 512, width: int = 96, code_width: int = 32) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"size={size} is no multiple of patch={patch}")
        self.size, self.patch, self.side = size, patch, size // patch
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, patch + 4, stride=patch, padding=2),
            _Residual(width),
            _Residual(width),
            nn.Conv2d(width, code_width, 1),
        )
        fine = max(8, width // 6)
        self.decoder = nn.Sequential(
            nn.Conv2d(code_width, width, 3, padding=1),
            _Residual(width),
            _Residual(width),
            nn.GELU(),
            nn.Conv2d(width, fine * patch * patch, 1),
            nn.PixelShuffle(patch),
            nn.Conv2d(fine, fine, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(fine, 3, 3, padding=1),
        )
        self.register_buffer("codes", torch.randn(codes, code_width))

    @property
    def length(self) -> int:
        """Codes of a picture."""
        return self.side * self.side

    def latents(self, pixels: Tensor) -> Tensor:
        """`(B, 3, S, S)` in [-1, 1] -> `(B, C, G, G)`."""
        return self.encoder(pixels)

    def nearest(self, latents: Tensor) -> Tensor:
        """`(..., C)` -> int64 `(...)`, the nearest code (Euclid)."""
        flat = latents.reshape(-1, latents.shape[-1])
        distances = self.codes.square().sum(1) - 2 * flat @ self.codes.T
        return distances.argmin(1).view(latents.shape[:-1])

    def pixels(self, latents: Tensor) -> Tensor:
        """`(B, C, G, G)` -> `(B, 3, S, S)`, about [-1, 1]."""
        return self.decoder(latents)

    @torch.inference_mode()
    def encode(self, images: Tensor, batch: int = 256) -> Tensor:
        """uint8 `(B, 3, S, S)` -> int64 `(B, L)`, row by row. Raises ValueError for another size."""
        if tuple(images.shape[1:]) != (3, self.size, self.size):
            raise ValueError(
                f"pictures are {tuple(images.shape[1:])}, the codebook takes (3, {self.size}, {self.size})"
            )
        parts = [
            self.nearest(self.latents(to_floats(part)).permute(0, 2, 3, 1)).flatten(1) for part in images.split(batch)
        ]
        return torch.cat(parts)

    @torch.inference_mode()
    def decode(self, ids: Tensor, batch: int = 256) -> Tensor:
        """int64 `(B, L)` -> uint8 `(B, 3, S, S)`."""
        parts: list[Tensor] = []
        for part in ids.split(batch):
            grid = F.embedding(part, self.codes).view(len(part), self.side, self.side, -1).permute(0, 3, 1, 2)
            parts.append(((self.pixels(grid) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
        return torch.cat(parts)


def to_floats(images: Tensor) -> Tensor:
    """uint8 of 0..255 -> float32 of -1..1."""
    return images.float() / 127.5 - 1
