"""What evaluation reads: a set of samples, each of which can be read by itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from clip_train.data.columns import BadSampleError, is_blank
from clip_train.data.decode import Pixels, decode


class Collection(Protocol):
    """Samples by number, in an order that never changes. Safe to be copied into reading processes.

    Reading raises BadSampleError or DecodeError for one that cannot be used, DataError where all of it is lost.
    """

    @property
    def parts(self) -> Sequence[str]:
        """Where samples lie: shards, or the set's one name."""
        ...

    @property
    def patterns(self) -> Sequence[str]:
        """What `parts` were asked for by."""
        ...

    @property
    def column(self) -> str:
        """The members with pictures, of shards; empty elsewhere."""
        ...

    @property
    def classes(self) -> Sequence[str] | None:
        """Names of its classes by number, where it has any."""
        ...

    def __len__(self) -> int: ...
    def part(self, number: int) -> int:
        """Index into `parts`."""
        ...

    def key(self, number: int) -> str: ...
    def pixels(self, number: int) -> Pixels: ...
    def label(self, number: int) -> int | str:
        """A number (into `classes`, where there are some), or a class's name."""
        ...

    def captions(self, number: int) -> list[str]: ...
    def check(self, *, label: bool, captions: bool) -> None:
        """Raise DataError at once where no sample has what will be read."""
        ...


class Whole:
    """What sets that lie in one place have in common."""

    def __init__(self, name: str, classes: Sequence[str] | None = None) -> None:
        self.name, self.classes = name, classes
        self.parts = self.patterns = (name,)
        self.column = ""

    def part(self, number: int) -> int:
        return 0


def read_picture(path: Path) -> Pixels:
    """A file's pixels. Raises BadSampleError, DecodeError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadSampleError(f"{path} cannot be read: {error.strerror}") from error
    if not data:
        raise BadSampleError(f"{path} is empty")
    return decode(data)


def as_captions(found: Any) -> list[str]:
    """A text or a list of texts, without the empty ones.

    Raises:
        BadSampleError: it is something else, or there is nothing in it.
    """
    several = isinstance(found, list | tuple)
    texts: list[Any] = list(cast("Sequence[Any]", found)) if several else [found]
    if not all(isinstance(text, str) for text in texts):
        raise BadSampleError(
            f"its caption is a {type(found).__name__} ({str(found)[:60]}): a text or a list of texts is wanted"
        )
    if not (texts := [text for text in texts if not is_blank(text)]):
        raise BadSampleError("its caption is empty")
    return texts


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sorts `class2` before `class10`."""
    pieces = re.split(r"([0-9]+)", name)
    return [(0, int(piece), "") if i % 2 else (1, 0, piece) for i, piece in enumerate(pieces) if piece], name
