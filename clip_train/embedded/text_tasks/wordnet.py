"""WordNet's database files (`wndb(5WN)`): synsets, their pointers, definitions and usage examples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NOUN_CATEGORIES = (
    "Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling",
    "food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process",
    "quantity", "relation", "shape", "state", "substance", "time",
)  # fmt: skip
"""The noun files in the order of their numbers, which begin at 3 (`lexnames(5WN)`)."""
_EXAMPLE = re.compile(r'"([^"]+)"')


@dataclass(frozen=True)
class Synset:
    """One meaning."""

    key: str
    """Part of speech and offset: `n02084071`."""
    lemmas: tuple[str, ...]
    category: int
    """Number of its lexicographer file."""
    hypernyms: tuple[str, ...]
    """Keys, instances' included."""
    definition: str
    examples: tuple[str, ...]


def read_synsets(folder: Path, part: str) -> dict[str, Synset]:
    """All synsets of `noun`, `verb`, `adj` or `adv` by key, in the order of the file."""
    found: dict[str, Synset] = {}
    for line in _lines(folder / f"data.{part}"):
        data, _, gloss = line.partition(" | ")
        fields = data.split(" ")
        letter = part[0] if part != "adv" else "r"
        count = int(fields[3], 16)
        lemmas = tuple(_word(fields[4 + 2 * number]) for number in range(count))
        at = 4 + 2 * count
        pointers = [fields[at + 1 + 4 * number : at + 5 + 4 * number] for number in range(int(fields[at]))]
        above = tuple(kind[2] + kind[1] for kind in pointers if kind[0] in ("@", "@i"))
        definition = gloss.split('; "')[0].split(";")[0].strip().strip('"')
        key = letter + fields[0]
        examples = tuple(one.strip() for one in _EXAMPLE.findall(gloss))
        found[key] = Synset(key, lemmas, int(fields[1]), above, definition, examples)
    return found


def read_first_senses(folder: Path, part: str) -> dict[str, tuple[str, int]]:
    """Word -> key of its most frequent meaning, and how many of its meanings were met in the tagged texts."""
    letter = part[0] if part != "adv" else "r"
    found: dict[str, tuple[str, int]] = {}
    for line in _lines(folder / f"index.{part}"):
        fields = line.split()
        at = 4 + int(fields[3])
        found[_word(fields[0])] = (letter + fields[at + 2], int(fields[at + 1]))
    return found


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.startswith("  "):  # the licence stands above
                yield line.rstrip()


def _word(stored: str) -> str:
    return re.sub(r"\(\w+\)$", "", stored).replace("_", " ")
