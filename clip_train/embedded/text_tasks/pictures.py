"""Tasks of pictures' captions: which two belong to one picture, and how near two concepts are by their keywords."""

from __future__ import annotations

import json
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from clip_train import embedded
from clip_train.embedded.text_tasks.common import Row, Sides, Task, overlap, share, shuffled, stems

CLDR = "Unicode-3.0"
CLIP_ART = "CC-PDDC"
_SHARDS = {
    "train": [f"train-{number:06}" for number in range(10)],
    "unseen_style": ["unseen_style-000000", "unseen_style-000001"],
    "openclipart_test": ["openclipart_test-000000"],
}


def read_captions(split: str) -> Iterator[dict[str, Any]]:
    """The JSON of every picture of a split of the embedded pictures, with its `key`."""
    for shard in _SHARDS[split]:
        with tarfile.open(embedded.path(f"pictograms/{shard}.tar")) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    stream = archive.extractfile(member)
                    assert stream is not None
                    yield {"key": member.name.removesuffix(".json"), **json.load(stream)}


class Captioned:
    """A picture's name and the keywords that do not repeat it."""

    def __init__(self, key: str, name: str, keywords: list[str]) -> None:
        self.key, self.name, self.keywords = key, name, keywords
        self.rest = [word for word in keywords if not overlap(word, name)]
        self.shared = [word for word in keywords if overlap(word, name) and " " not in word]


def read_pictures(split: str) -> list[Captioned]:
    """Pictures of a split with a name, and two keywords or more beside it; of equal names the first."""
    found: dict[str, Captioned] = {}
    for sample in read_captions(split):
        captions: list[str] = sample["captions"]
        if len(captions) < 3 or captions[0].startswith("flag"):
            continue
        keywords = [word.strip().lower() for word in captions[1].split(",") if word.strip().isascii()]
        one = Captioned(sample["key"], captions[0].lower(), keywords)
        if len(one.rest) > 1 and one.name.isascii():
            found.setdefault(one.name, one)
    return list(found.values())


def same_picture(name: str, split: str, about: str, dev: float, *, negative: str) -> Task:
    """A name, and keywords of the same picture (1) or of another (0), as many of each.

    Every name and every list of keywords stands in one true pair; no picture of dev is in test.

    Args:
        negative: `any` other picture; a `near` one, which has a keyword of the right one; or `word`: both lists hold
            just one word of the name. But for `word`, no list of keywords holds a word of the name.
    """
    pictures = read_pictures(split)
    sides = Sides(split, {"dev": dev, "test": 1 - dev})
    task = Task(name, "same", about, CLDR if split == "unseen_style" else CLIP_ART, ("another", "same"))
    for part in ("dev", "test"):
        members = [one for one in pictures if sides.natural(one.name) == part]
        rows: list[Row] = []
        for one in shuffled_pictures(members, name):
            for other in shuffled_pictures(members, name, one.key):
                if other is one or (overlap(other.name, one.name) and negative != "word"):
                    continue
                pair = _pair(one, other, negative)
                if pair is not None:
                    rows += pair
                    break
        task.splits[part] = rows
    return task


def _pair(one: Captioned, other: Captioned, negative: str) -> list[Row] | None:
    right, wrong = one.rest, other.rest
    if negative == "word":
        common = [word for word in one.shared if word in other.keywords]
        if not common:
            return None
        right = sorted([common[0], *one.rest])
        wrong = sorted([common[0], *(word for word in other.keywords if not overlap(word, one.name))])
        if len(wrong) < 3:
            return None
    else:
        if any(overlap(word, one.name) for word in wrong):
            return None
        if negative == "near" and not set(right) & set(wrong):
            return None
    length = min(len(right), len(wrong), 6)  # how many there are may not tell
    return [[one.name, ", ".join(_some(right, length, one)), 1], [one.name, ", ".join(_some(wrong, length, one)), 0]]


def _some(keywords: list[str], length: int, one: Captioned) -> list[str]:
    """That many of them, a word of the name first, in their own order."""
    ranked = sorted(keywords, key=lambda word: (not overlap(word, one.name), share("keyword", one.key, word)))[:length]
    return [word for word in keywords if word in ranked]


def shuffled_pictures(pictures: list[Captioned], *purpose: object) -> list[Captioned]:
    return sorted(pictures, key=lambda one: share(*purpose, one.key))


def keyword_similarity(sizes: dict[str, int]) -> Task:
    """Pairs of emoji names rated by how many of their keywords are equal (Jaccard), the names' own words left out."""
    task = Task(
        "keywords", "ratings",
        "Pairs of emoji names without a word in common; the rating is the share of CLDR keywords that both have.", CLDR,
    )  # fmt: skip
    concepts: dict[str, Captioned] = {}
    for split in ("train", "unseen_style"):
        for sample in read_captions(split):
            if "label" in sample and len(sample["captions"]) >= 3 and not sample["label"].startswith("flag"):
                keywords = [word.strip().lower() for word in sample["captions"][1].split(",")]
                one = Captioned(sample["label"], sample["label"].lower(), keywords)
                if len(one.rest) > 1:
                    concepts.setdefault(one.name, one)
    total = sum(sizes.values())
    sides = Sides(task.name, {name: size / total for name, size in sizes.items()})
    for split, size in sizes.items():
        members = [one for name, one in sorted(concepts.items()) if sides.natural(name) == split]
        by_word: dict[str, list[int]] = defaultdict(list)
        for number, one in enumerate(members):
            for word in one.rest:
                by_word[word].append(number)
        close = {(a, b) for together in by_word.values() for a in together for b in together if a < b}
        far = {
            (a, int(share(task.name, "far", a, turn) * len(members))) for a in range(len(members)) for turn in (0, 1)
        }
        rows: list[Row] = []
        for group, count in ((close, size * 2 // 3), (far - close, size - size * 2 // 3)):
            kept: list[Row] = []
            for a, b in shuffled(group, task.name, split):
                one, other = members[a], members[b]
                if a == b or stems(one.name) & stems(other.name) or len(kept) >= count:
                    continue
                first, second = set(one.rest), set(other.rest)
                kept.append([one.name, other.name, round(len(first & second) / len(first | second), 4)])
            rows += kept
        task.splits[split] = rows
    return task
