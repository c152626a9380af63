"""Emoji drawn by several hands, named by the Unicode CLDR.

Pictures: npm `@iconify/json` (`json/<set>.json`). Words: npm `cldr-annotations-full` and
`cldr-annotations-derived-full`, English. A concept is a character sequence without variation selectors,
so that sets that call a picture by different slugs still agree on what it is.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_train.embedded.fxemoji import LEFT_OUT, SLUG_TO_NAME
from clip_train.embedded.picture import Picture

TRAIN_SETS = ("noto", "noto-v1", "fluent-emoji", "fluent-emoji-flat", "fxemoji")
UNSEEN_SET = "twemoji"

_VARIATION_SELECTORS: dict[int, str] = {0xFE0E: "", 0xFE0F: ""}
_SKIN_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
_TONE_SLUG = re.compile(r"(-(light|medium-light|medium|medium-dark|dark)|-tone[1-5])(-|$)")


@dataclass(frozen=True)
class Concept:
    """A character sequence with its CLDR short name ("red apple") and keywords ("apple", "fruit", "red")."""

    sequence: str
    name: str
    keywords: tuple[str, ...]


def read_cldr(annotations: Path, derived: Path) -> dict[str, Concept]:
    """All English concepts by sequence; skin tones and the sequences that contain one are left out."""
    concepts: dict[str, Concept] = {}
    for path, key in ((annotations, "annotations"), (derived, "annotationsDerived")):
        entries: dict[str, dict[str, list[str]]] = json.loads(path.read_text("utf-8"))[key]["annotations"]
        for text, entry in entries.items():
            sequence = text.translate(_VARIATION_SELECTORS)
            if "tts" not in entry or any(char in _SKIN_TONES for char in sequence):
                continue
            concepts.setdefault(sequence, Concept(sequence, entry["tts"][0], tuple(entry.get("default", ()))))
    return concepts


def captions(concept: Concept) -> tuple[str, ...]:
    """The short name; the keywords; both. Flags also read as a phrase: "flag of Japan"."""
    name = concept.name
    if name.startswith("flag: "):
        place = name.removeprefix("flag: ")
        return (name, f"flag of {place}")
    keywords = ", ".join(concept.keywords)
    if not keywords or keywords.lower() == name.lower():
        return (name,)
    return (name, keywords, f"{name}: {keywords}")


def load_set(directory: Path, name: str) -> dict[str, Any]:
    """One iconify set, as it is stored."""
    return json.loads((directory / f"{name}.json").read_text("utf-8"))


class SlugResolver:
    """From an icon's slug to its concept: the set's own code points, other sets' aliases, then CLDR names."""

    def __init__(self, sets: dict[str, dict[str, Any]], concepts: dict[str, Concept]) -> None:
        self._concepts = concepts
        self._own = {name: _code_points(data) for name, data in sets.items()}
        self._shared: dict[str, str] = {}
        for name in ("noto", "twemoji", "fluent-emoji-flat"):
            for slug, sequence in self._own.get(name, {}).items():
                self._shared.setdefault(slug, sequence)
        self._by_name = {fold(concept.name): sequence for sequence, concept in reversed(concepts.items())}
        self._by_unicode: dict[str, str] = {}
        for code in (*range(0x2000, 0x3400), *range(0x1F000, min(sys.maxunicode, 0x1FB00))):
            unicode_name = unicodedata.name(chr(code), "")
            if unicode_name and chr(code) in concepts:
                self._by_unicode.setdefault(fold(unicode_name), chr(code))
        self._fxemoji: dict[str, str] = {}
        for slug, concept_name in SLUG_TO_NAME.items():
            if fold(concept_name) not in self._by_name:
                raise ValueError(f"fxemoji {slug!r}: CLDR has no name {concept_name!r}")
            self._fxemoji[slug] = self._by_name[fold(concept_name)]

    def concept(self, set_name: str, slug: str) -> Concept | None:
        """None when the icon is no concept of CLDR's (letters, digits, logos) or has a skin tone."""
        folded = fold(slug)
        if set_name == "fxemoji":
            if slug in LEFT_OUT:
                return None
            sequence = self._fxemoji.get(slug) or self._by_unicode.get(folded) or self._by_name.get(folded)
        else:
            slug = slug.removeprefix("flag-for-")
            sequence = self._own[set_name].get(slug) or self._shared.get(slug) or self._by_name.get(fold(slug))
        return self._concepts.get(sequence) if sequence else None


def fold(text: str) -> str:
    """Letters and digits only, lower case, no accents: "man’s shoe" and "mans-shoe" become one."""
    decomposed = unicodedata.normalize("NFKD", text)
    return re.sub(r"[^a-z0-9]", "", decomposed.lower())


def _code_points(data: dict[str, Any]) -> dict[str, str]:
    """Slug, or alias, to sequence, as the set itself maps them."""
    table: dict[str, str] = {}
    for codes, slug in data.get("chars", {}).items():
        table[slug] = "".join(chr(int(code, 16)) for code in codes.split("-")).translate(_VARIATION_SELECTORS)
    for slug, alias in data.get("aliases", {}).items():
        if slug not in table and not _mirrored(alias) and alias["parent"] in table:
            table[slug] = table[alias["parent"]]
    return table


def _mirrored(alias: dict[str, Any]) -> bool:
    return bool(alias.get("hFlip") or alias.get("vFlip") or alias.get("rotate"))


def read_set(name: str, data: dict[str, Any], resolver: SlugResolver) -> Iterator[Picture]:
    """The pictures of one set, in slug order, at most one a concept."""
    seen: set[str] = set()
    spdx: str = data["info"]["license"]["spdx"]
    aliases = {slug: alias for slug, alias in data.get("aliases", {}).items() if alias.get("hFlip")}
    for slug in sorted({*data["icons"], *aliases}):
        alias = aliases.get(slug)
        icon: dict[str, Any] = data["icons"][alias["parent"] if alias else slug]
        concept = resolver.concept(name, slug)
        if concept is None or concept.sequence in seen or icon.get("hidden") or _TONE_SLUG.search(slug):
            continue
        seen.add(concept.sequence)
        yield Picture(
            key=f"{name}-{re.sub(r'[^a-z0-9]+', '-', slug.lower()).strip('-')}",
            svg=_svg(icon, data),
            captions=captions(concept),
            source=name,
            license=spdx,
            label=concept.name,
            concept=concept.sequence,
            flip=alias is not None,
        )


def _svg(icon: dict[str, Any], data: dict[str, Any]) -> str:
    """The icon's body in a square view box around its own (16 is iconify's default size)."""
    left, top = icon.get("left", data.get("left", 0)), icon.get("top", data.get("top", 0))
    width, height = icon.get("width", data.get("width", 16)), icon.get("height", data.get("height", 16))
    side = max(width, height)
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    body = icon["body"].replace("currentColor", "#000")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{side:g}" height="{side:g}">{body}</svg>'
    )
