"""Random numbers that are functions of what they are for, not of when they are drawn.

Everything random about the data (the order, a crop, the choice of a caption, a substitute, a masked token) is
`mix(seed, purpose, where...)`: SplitMix64 folded over integers. There is no generator whose state would have
to be saved, so any step can be worked out by itself on any process, and the result depends neither on numpy's
version nor on the machine.

Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014), the finaliser
known as SplitMix64.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Purposes: the second argument of every `mix`, so that no two uses share their numbers.
SHARDS, WINDOW, ROWS, CAPTION, AUGMENT, SUBSTITUTE, DRAW, TURN, MASK, MASK_COUNT, MASK_KIND, MASK_ID = range(1, 13)
SHOTS, CORRUPT = range(13, 15)


def mix(*parts: Any) -> NDArray[np.uint64]:
    """Hash integers, or broadcastable arrays of them (non-negative, < 2**63), to uint64 of their common
    shape.
    """
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is what is meant
        for part in parts:
            z = (state ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = z ^ (z >> np.uint64(31))
    return np.asarray(state, dtype=np.uint64)


def uniform(*parts: Any) -> NDArray[np.float64]:
    """As `mix`, but numbers in [0, 1): the upper 53 bits divided by 2**53."""
    return (mix(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(length: int, *parts: Any) -> NDArray[np.int64]:
    """A permutation of `range(length)`: its members sorted by `mix(*parts, member)`."""
    keys = mix(*parts, np.arange(length))
    return np.argsort(keys, kind="stable").astype(np.int64)


def text_hash(text: str) -> int:
    """A stable hash of a text, 0 <= hash < 2**63 (so that it fits an int64 tensor)."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
