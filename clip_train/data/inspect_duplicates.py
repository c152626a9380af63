"""Equal pictures, and pictures that look alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

NEAR = 3
"""Bits of 64 in which the difference hashes of look-alikes may differ."""
MOST_COMPARED = 200_000
"""With more pictures only equal hashes count as look-alikes: comparing more takes too long."""


def equal_groups(hashes: Sequence[Hashable]) -> list[list[int]]:
    """The places of equal things, in order; things that occur once are left out."""
    found: defaultdict[Hashable, list[int]] = defaultdict(list)
    for place, one in enumerate(hashes):
        found[one].append(place)
    return [group for group in found.values() if len(group) > 1]


def near_groups(hashes: Sequence[int], distance: int = NEAR) -> list[list[int]]:
    """The places of 64-bit hashes that a chain of pairs, at most `distance` (<= 3) bits apart, connects.

    Hashes that differ in at most 3 bits agree in one of their four 16-bit parts, so only those are compared.
    """
    if not 0 <= distance <= 3:
        raise ValueError(f"distance {distance}: 0 to 3 bits can be searched for")
    unique, which = np.unique(np.array(hashes, dtype=np.uint64), return_inverse=True)
    parent = list(range(len(unique)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    if distance > 0 and len(unique) <= MOST_COMPARED:
        for left, right in _near_pairs(unique, distance):
            parent[max(root(left), root(right))] = min(root(left), root(right))
    return equal_groups([root(int(one)) for one in which.ravel()])


def _near_pairs(unique: NDArray[np.uint64], distance: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for shift in range(0, 64, 16):
        part = (unique >> np.uint64(shift)) & np.uint64(0xFFFF)
        order = np.argsort(part, kind="stable")
        ends = np.flatnonzero(np.diff(part[order])) + 1
        for bucket in np.split(order, ends):
            for start in range(len(bucket) - 1):
                rest = bucket[start + 1 :]
                near = rest[_bits(unique[rest] ^ unique[bucket[start]]) <= distance]
                found += [(int(bucket[start]), int(other)) for other in near]
    return found


def _bits(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Number of set bits, by adding up neighbours (numpy < 2 has no bitwise_count)."""
    one, two, four = (np.uint64(mask) for mask in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F))
    values = values - ((values >> np.uint64(1)) & one)
    values = (values & two) + ((values >> np.uint64(2)) & two)
    values = (values + (values >> np.uint64(4))) & four
    return ((values * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.int64)
