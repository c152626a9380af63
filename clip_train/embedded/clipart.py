"""Public-domain clip art from Debian's `openclipart-svg`, captioned from the RDF inside each file.

The titles need care: a fifth of them name a series ("Part of the Flat Icon Collection"), one author
wrote in Italian and one in French. A title that many files share is replaced by the file's own name;
the words of those two authors are taken only where all of them occur in the English ones.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from clip_train.embedded.picture import Picture

SOURCE = "openclipart"
LICENSE = "CC-PDDC"  # SPDX for the Creative Commons public domain dedication that the package states

_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_DC = "{http://purl.org/dc/elements/1.1/}"
_CC = ("{http://web.resource.org/cc/}", "{http://creativecommons.org/ns#}")
_PUBLIC_DOMAIN = frozenset(
    ("http://web.resource.org/cc/PublicDomain", "http://creativecommons.org/licenses/publicdomain/")
)
# Icon themes and shapes (thousands of near-identical pictures), test patterns, logos (trade marks).
_LEFT_OUT = ("computer/icons/", "computer/buttons/", "buttons/", "shapes/", "special/", "logos/")
_NOT_ENGLISH = ("architetto", "yves guillou", "francesco rollandin")
_SERIES = 5
"""A title that this many files share names a series, unless the file's own name begins with it."""

_SERIES_PREFIX = re.compile(r"^clip\s?art by [^-]+ - ", re.IGNORECASE)
_NOISE = re.compile(
    r"\((wed|b and w|b&w|transparent fix)[^)]*\)|- rpg map elements|\bclip ?art\b|#\d+|"
    r"\bhash\b|^bb |^etiquette |\b0x[0-9a-f]+\b|0 symbol 1m bwh|- (stylized|body part|clothing)$",
    re.IGNORECASE,
)
_KEYWORD_NOISE = re.compile(
    r"^(hash(\(.*)?|0x[0-9a-f]+|\d+|unsorted|signs and symbols|united nations member|mapsym|map symbol|"
    r"networksym|weathersym|symbolsym|openclipart|clip ?art|special|menu|shape|icons?|theme|miscellany|"
    r"unknown|none|n/a|various|.*rollandin.*)$"
)
_KEYWORD_SPELLING = {
    "icecream": "ice cream",
    "roadsign": "road sign",
    "signalflag": "signal flag",
    "bodypart": "body part",
    "bullethole": "bullet hole",
    "unitedstates": "United States",
    "northamerica": "North America",
    "airtravel": "air travel",
    "roadtravel": "road travel",
    "xmas": "Christmas",
}
_SHOWS_NO_FLAG = frozenset(("map", "road sign"))
_NAME_SPELLING = {"baloon": "balloon", "glace": "ice cream", "whit": "with"}
_MISSPELT = re.compile(r"\b(baloon|glace|whit)\b", re.IGNORECASE)
_TAIL = re.compile(r"(?<=[a-z])0*\d{1,3}$|(?<!flag)\s0*\d{1,3}$|[ -](bw|r|aj)$", re.IGNORECASE)
_FOLDER_WORDS = {
    "breads and carbs": "bread",
    "meats and eggs": "meat",
    "signs and symbols": "sign",
    "map symbols": "map symbol",
    "aiga-symbols": "sign",
    "bodypart": "body part",
    "roadsigns": "road sign",
}
# A picture without a name whose keywords are all in here says too little to be a pair.
# fmt: off
_GENERIC = frozenset((
    "animal", "animals", "building", "buildings", "decoration", "decorations", "education",
    "electronics", "food", "holiday", "office", "people", "plant", "plants", "recreation", "road sign",
    "science", "sign", "symbol", "tool", "tools", "transport", "transportation",
))
# fmt: on
_SUITS = {"c": "clubs", "d": "diamonds", "h": "hearts", "s": "spades"}
_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_RANKS = {"a": "ace", "j": "jack", "q": "queen", "k": "king"} | {str(i + 2): n for i, n in enumerate(_NUMBERS)}
_SERIES_TITLE = re.compile(r"^(part of the flat|etiquette icons|lemon svg)", re.IGNORECASE)
_CARD = re.compile(r"^(?:bordered|ornamental|simple|white)_([cdhs])_([ajqk]|\d+)$")


@dataclass(frozen=True)
class Record:
    """The RDF of one file; `path` is relative to the package's `svg` folder."""

    path: str
    title: str
    keywords: tuple[str, ...]
    description: str
    creator: str
    public_domain: bool


def read_record(root: Path, path: Path) -> Record | None:
    """None where the file has no RDF or is not well-formed."""
    try:
        tree = ElementTree.parse(path)
    except ElementTree.ParseError:
        return None
    for namespace in _CC:
        work = tree.getroot().find(f".//{namespace}Work")
        if work is None:
            continue
        license_node = work.find(f"{namespace}license")
        creator = work.find(f"{_DC}creator")
        return Record(
            path=path.relative_to(root).as_posix(),
            title=_flat(work.findtext(f"{_DC}title")),
            keywords=tuple(_flat(item.text) for item in work.findall(f".//{_DC}subject//{_RDF}li")),
            description=_flat(work.findtext(f"{_DC}description")),
            creator=_flat(" ".join(creator.itertext())) if creator is not None else "",
            public_domain=license_node is not None
            and any(value in _PUBLIC_DOMAIN for value in license_node.attrib.values()),
        )
    return None


def read(root: Path) -> Iterator[Picture]:
    """The pictures with a usable caption, in path order. `root` is the folder with `animals`, `food`, …"""
    records = [read_record(root, path) for path in sorted(root.rglob("*.svg"))]
    chosen = [
        record
        for record in records
        if record is not None and record.public_domain and not record.path.startswith(_LEFT_OUT)
    ]
    captioner = Captioner(chosen)
    used: Counter[str] = Counter()
    for record in chosen:
        captions = captioner.captions(record)
        if captions:
            key = re.sub(r"[^a-z0-9]+", "-", record.path.removesuffix(".svg").lower()).strip("-")
            used[key] += 1  # file names that differ in an accent or a hyphen
            key += f"-{used[key]}" if used[key] > 1 else ""
            svg = (root / record.path).read_text("utf-8", errors="replace")
            yield Picture(f"{SOURCE}-{key}", svg, captions, SOURCE, LICENSE, trim=True)


class Captioner:
    """Knows which titles name a series and which words are English, from all the records together."""

    def __init__(self, records: Iterable[Record]) -> None:
        records = list(records)
        self._titles = Counter(record.title for record in records)
        self._descriptions = Counter(record.description for record in records)
        english = [record for record in records if not _foreign(record)]
        self._english = frozenset(
            word for record in english for word in _words(" ".join((record.title, *record.keywords)))
        )

    def captions(self, record: Record) -> tuple[str, ...]:
        """The name, the keywords, both, and the description; without repeats. Empty: nothing usable."""
        name = self._name(record)
        keywords = _keywords(record)
        extra = [word for word in keywords if word.lower() not in name.lower()]
        if not name and _GENERIC.issuperset(keywords):
            return ()
        captions = [name] if name else []
        if keywords and (extra or not name):
            captions.append(", ".join(keywords))
        if name and extra:
            captions.append(f"{name}: {', '.join(extra)}")
        description = self._description(record)
        if description:
            captions.append(description)
        unique: dict[str, str] = {}
        for caption in captions:
            unique.setdefault(caption.lower(), caption)
        return tuple(unique.values())

    def _name(self, record: Record) -> str:
        stem = Path(record.path).stem
        card = _CARD.match(stem)
        if card:
            return f"{_RANKS.get(card[2], card[2])} of {_SUITS[card[1]]}"
        title = _clean(_SERIES_PREFIX.sub("", record.title))
        own = _clean(_without_creator(stem, record.creator))
        series = self._titles[record.title] >= _SERIES and not _slug(stem).startswith(_slug(title))
        if _SERIES_TITLE.match(record.title) or (_SERIES_PREFIX.match(record.title) and self._titles[record.title] > 1):
            series = True
        for candidate in (own, title) if series else (title, own):
            words = _words(candidate)
            if not words or (_foreign(record) and not self._english.issuperset(words)):
                continue
            if candidate == title and series and "stick" not in words:
                continue
            shows_flag = _SHOWS_NO_FLAG.isdisjoint(_keywords(record))
            return _as_flag(candidate, record.path) if shows_flag else candidate
        return ""

    def _description(self, record: Record) -> str:
        text = record.description.strip(" .")
        count = len(text.split())
        if _foreign(record) or self._descriptions[record.description] > 3 or not 3 <= count <= 20:
            return ""
        return "" if re.search(r"@|http|www|eps|sodipodi|inkscape|submission|\bgpl\b", text.lower()) else text


def _foreign(record: Record) -> bool:
    return record.creator.lower().startswith(_NOT_ENGLISH)


def _flat(text: str | None) -> str:
    return " ".join(html.unescape(text or "").split())


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]{3,}", text.lower())


def _clean(text: str) -> str:
    """Spaces for underscores and CamelCase, no counters at the end, no stray punctuation."""
    text = _NOISE.sub(" ", text.replace("_", " "))
    text = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", text.strip())
    if " " not in text and text.count("-") > 1:
        text = text.replace("-", " ")
    text = re.sub(r"^aiga ", "", text, flags=re.IGNORECASE)
    text = _TAIL.sub("", text.strip())
    text = _MISSPELT.sub(lambda word: _NAME_SPELLING[word[0].lower()], text)
    return " ".join(text.split()).strip(" .,-_!?|:")


def _without_creator(stem: str, creator: str) -> str:
    """File names end in the author's name, cut off, and a counter: "house_christoph_brill_01"."""
    names = [name for name in re.split(r"[^a-z0-9]+", creator.lower()) if name]
    tokens = [token for token in re.split(r"[_\s]+", stem) if token]
    while len(tokens) > 1:
        last = tokens[-1].lower().strip(".")
        if last.isdigit() or last in ("r", "bw", "ganson") or any(name.startswith(last) for name in names):
            tokens.pop()
        else:
            break
    return " ".join(tokens)


def _as_flag(name: str, path: str) -> str:
    """Files of the flag folders are named by the place: say that they show its flag."""
    folder = path.partition("/flags/")[2].partition("/")[0]
    if folder not in ("africa", "america", "asia", "europe", "oceania") or "flag" in name.lower():
        return name
    name = re.sub(r"\s+-\s+", ", ", name)
    return f"flag of {name.title() if name.islower() else name}"


def _keywords(record: Record) -> list[str]:
    """At most eight: the record's own without noise, then the folder it lies in."""
    found: dict[str, str] = {}
    folder = Path(record.path).parent.name.replace("_", " ")
    for raw in (*record.keywords, _FOLDER_WORDS.get(folder, folder)):
        word = _flat(raw.replace("_", " ").strip(" .,;")).lower()
        if not word or len(word) > 30 or _KEYWORD_NOISE.match(word):
            continue
        word = _KEYWORD_SPELLING.get(word, word)
        singular = re.sub(r"(?<=[a-z]{3})(s|y|ies)$", "", _slug(word))
        found.setdefault(singular, word)
    return list(found.values())[:8]
