"""Encoders to stand beside: what words alone give, and what no text at all gives.

Both have the shape of a `TextEncoder` (evaluation/text/encoder.py) as far as experiment 3 asks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clip_train.evaluation.text_to_image.model import words_of

Vectors = NDArray[np.float32]


class BagOfWords:
    """The sum of a fixed random vector a word over the root of their number: all the words, no order, no meaning."""

    pools = ("own",)

    def __init__(self, width: int = 256) -> None:
        self.name, self.width = "bag of words", width

    def features(self, texts: Sequence[str]) -> dict[str, Vectors]:
        """`(N, width)`."""
        vectors = {word: _noise(word, self.width) for text in texts for word in words_of(text)}
        rows = [[vectors[word] for word in sorted(set(words_of(text)))] for text in texts]
        zero = np.zeros(self.width, np.float32)
        return {"own": np.stack([np.sum(row, 0) / len(row) ** 0.5 if row else zero for row in rows]).astype(np.float32)}

    def encode(self, texts: Sequence[str], pool: str = "own") -> Vectors:
        return self.features(texts)[pool]


class RandomFeatures:
    """A fixed random vector a text, whatever its words: what a prefix learns without any text."""

    pools = ("own",)

    def __init__(self, width: int = 256) -> None:
        self.name, self.width = "random features", width

    def features(self, texts: Sequence[str]) -> dict[str, Vectors]:
        """`(N, width)`."""
        return {"own": np.stack([_noise(text, self.width) for text in texts])}

    def encode(self, texts: Sequence[str], pool: str = "own") -> Vectors:
        return self.features(texts)[pool]


def _noise(text: str, width: int) -> Vectors:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).standard_normal(width).astype(np.float32)
