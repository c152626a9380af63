"""Equal and nearly equal pictures.

Two pictures are equal when every pixel is. They are nearly equal when their fingerprints (the picture
averaged to 16×16 RGB) differ little beside how much ink both have: the root-mean-square difference over
the mean of their root-mean-square differences from white. A plain difference would call all faint line
drawings alike. The threshold in use was chosen on contact sheets (README.md beside the data).

Shapes: `N` pictures, `D` = GRID * GRID * 3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from clip_train.embedded.picture import SIZE, Pixels

GRID = 16
Fingerprints = NDArray[np.float64]
"""[N, D]: how far each averaged pixel is from white, scaled so that a row's norm is a root mean square."""


def digest(pixels: Pixels) -> str:
    """Equal exactly for equal pictures."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def fingerprints(pictures: Sequence[Pixels]) -> Fingerprints:
    """N pictures to [N, D]."""
    step = SIZE // GRID
    cells = [pixels.reshape(GRID, step, GRID, step, 3) for pixels in pictures]
    ink = np.stack([255.0 - cell.mean(axis=(1, 3)) for cell in cells])
    return (ink / np.sqrt(ink[0].size)).reshape(len(pictures), -1)


def near_pairs(
    left: Fingerprints, right: Fingerprints, threshold: float, block: int = 1024
) -> Iterator[tuple[int, int, float]]:
    """Every (i, j, distance) with `left[i]` and `right[j]` closer than `threshold`, ordered by i, then j."""
    right_ink = np.linalg.norm(right, axis=1)
    for start in range(0, len(left), block):
        rows = left[start : start + block]
        ink = np.linalg.norm(rows, axis=1)
        squared = ink[:, None] ** 2 + right_ink[None, :] ** 2 - 2 * rows @ right.T
        distance = 2 * np.sqrt(np.maximum(squared, 0)) / (ink[:, None] + right_ink[None, :])
        for i, j in zip(*np.nonzero(distance < threshold), strict=True):
            yield start + int(i), int(j), float(distance[i, j])


def clusters(prints: Fingerprints, threshold: float) -> list[int]:
    """For every row the smallest index that a chain of near pairs connects it to."""
    parent = list(range(len(prints)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for i, j, _ in near_pairs(prints, prints, threshold):
        low, high = sorted((root(i), root(j)))
        parent[high] = low
    return [root(node) for node in range(len(prints))]
