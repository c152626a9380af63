"""What all tasks share: order and splits that are functions of the words, and what counts as a shared word."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

Item = TypeVar("Item")
Row = list[Any]
"""`[text, answer]` or `[first, second, answer]`."""


@dataclass
class Task:
    """What becomes one file."""

    name: str
    kind: str
    """`labels` (the answer is the number of a class), `ratings` (a number) or `same` (1 where both belong together)."""
    about: str
    licence: str
    classes: tuple[str, ...] = ()
    splits: dict[str, list[Row]] = field(default_factory=dict[str, list[Row]])


def share(*words: object) -> float:
    """A number in [0, 1) that depends on the words alone."""
    digest = hashlib.blake2b("\x1f".join(map(str, words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def shuffled(items: Iterable[Item], *purpose: object) -> list[Item]:
    """The items in an order that depends on them and the purpose alone."""
    return sorted(items, key=lambda item: share(*purpose, item))


class Sides:
    """Which split a word or meaning belongs to: none is ever on two."""

    def __init__(self, task: str, shares: dict[str, float]) -> None:
        self._task, self._shares = task, shares
        self._side: dict[str, str] = {}

    def natural(self, name: str) -> str:
        """The split that the hash of a name gives it."""
        number = share(self._task, "side", name)
        for split, part in self._shares.items():
            number -= part
            if number < 0:
                return split
        return list(self._shares)[-1]

    def claim(self, names: Sequence[str]) -> str | None:
        """The split of an item that is about all these names, or None where they belong to different ones."""
        split = self._side.get(names[0]) or self.natural(names[0])
        if any(self._side.get(name, split) != split for name in names):
            return None
        self._side.update(dict.fromkeys(names, split))
        return split


def words(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return re.findall(r"[^\W_]+", text.lower())


_SMALL = set("a an the of in on with and or to for by from at is are as its it that this".split())  # noqa: SIM905


def stems(text: str) -> set[str]:
    """The words that carry meaning, cut to four letters so that "elf"/"elves" aside, forms of one word are equal."""
    return {word[:4] for word in words(text) if word not in _SMALL}


def overlap(first: str, second: str) -> bool:
    """Whether a word, or a form of it, stands in both; runs such as "videogame"/"video" count too."""
    return bool(stems(first) & stems(second))
