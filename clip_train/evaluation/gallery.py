"""Which samples the report shows, and their pictures. Draws are random with a fixed seed: nothing is hand-picked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_train.data import columns
from clip_train.data.cache import Cache
from clip_train.data.collections.base import Collection
from clip_train.data.collections.opening import open_collection
from clip_train.data.collections.shards import Shards
from clip_train.data.decode import DecodeError
from clip_train.data.files import ShardFiles
from clip_train.data.shards import index, resolve
from clip_train.dataset_spec import is_spec
from clip_train.errors import DataError, UserError

Rows = Mapping[str, npt.NDArray[Any]]


class Album:
    """Pictures by shard and key. One that cannot be had is None, and its shard is noted once."""

    def __init__(self, folder: Path, notes: list[str], cache: Cache | None = None) -> None:
        self._folder = folder
        self.cache = cache
        """Where shards from elsewhere are kept."""
        self._notes = notes
        self._samples: dict[str, tuple[Collection, dict[str, int]] | None] = {}
        self._pictures: dict[tuple[str, str], Image.Image | None] = {}

    def picture(self, shard: str, key: str, image: str, patterns: Sequence[str] = ()) -> Image.Image | None:
        """The picture of a sample, whose member is named as a recipe does it (`jpg;png`).

        A shard that has gone from its place (another machine, another cache) is looked for by `patterns`.
        """
        if (shard, key) not in self._pictures:
            self._pictures[shard, key] = self._read(shard, key, image, patterns)
        return self._pictures[shard, key]

    def _read(self, shard: str, key: str, image: str, patterns: Sequence[str]) -> Image.Image | None:
        if shard not in self._samples:
            try:
                listing = self._open(shard, image, patterns)
                self._samples[shard] = listing, {listing.key(i): i for i in range(len(listing))}
            except UserError as error:
                self._samples[shard] = None
                self._notes.append(f"Pictures are missing: {error}")
        found = self._samples[shard]
        if found is None or key not in found[1]:
            return None
        try:
            return Image.fromarray(found[0].pixels(found[1][key]))
        except (columns.BadSampleError, DecodeError, DataError):
            return None

    def _open(self, shard: str, image: str, patterns: Sequence[str]) -> Collection:
        if is_spec(shard):
            return open_collection(shard, self._folder)
        return Shards([index(self._find(shard, patterns), self.cache)], image=image)

    def _find(self, shard: str, patterns: Sequence[str]) -> str:
        if not Path(shard).exists() and patterns:
            for found in resolve(list(patterns), relative_to=self._folder):
                if Path(found).name == Path(shard).name:
                    return found
        return shard


@dataclass(frozen=True)
class Named:
    """A classified picture."""

    picture: Image.Image | None
    truth: str
    guesses: list[tuple[str, float, bool]]
    """Class, probability, and whether it is the true one; best first."""
    right: bool


def named(rows: Rows, album: Album, right: bool, count: int, seed: int = 0) -> list[Named]:
    """`count` pictures drawn from those whose first guess was right (or from the others)."""
    among = np.flatnonzero((rows["ranks"] == 0) == right)
    return [_named(rows, album, int(i)) for i in _draw(among, count, seed)]


def _named(rows: Rows, album: Album, i: int) -> Named:
    classes = rows["classes"]
    label = int(rows["labels"][i])
    guesses = [
        (str(classes[c]), float(p), int(c) == label)
        for c, p in zip(rows["predictions"][i, :3], rows["probabilities"][i, :3], strict=True)
    ]
    return Named(_picture(rows, album, i), str(classes[label]), guesses, bool(rows["ranks"][i] == 0))


@dataclass(frozen=True)
class Confusion:
    """Two classes taken for each other."""

    truth: str
    guess: str
    count: int
    both_ways: bool
    probability: float
    """Mean probability of the wrong class."""
    of_truth: Image.Image | None
    of_guess: Image.Image | None


def confusions(rows: Rows, album: Album, count: int) -> list[Confusion]:
    """The pairs of classes that are most often taken for each other, in either direction.

    Sorted by the number of pictures, then by how sure the model was: with one picture a class all counts are small.
    """
    wrong = np.flatnonzero(rows["ranks"] > 0)
    pairs: dict[tuple[int, int], list[tuple[int, int, float]]] = {}
    for i in wrong:
        label, guess = int(rows["labels"][i]), int(rows["predictions"][i, 0])
        if label == guess:  # a tie, which counts as wrong
            continue
        pair = (min(label, guess), max(label, guess))
        pairs.setdefault(pair, []).append((label, int(i), float(rows["probabilities"][i, 0])))
    first: dict[int, int] = {}
    for i, label in enumerate(rows["labels"].tolist()):
        first.setdefault(label, i)
    ranked = sorted(pairs.items(), key=lambda item: (-len(item[1]), -sum(p for *_, p in item[1]), item[0]))
    classes, found = rows["classes"], list[Confusion]()
    for pair, cases in ranked[:count]:
        label, sample, _ = max(cases, key=lambda case: case[2])
        guess = pair[0] if label == pair[1] else pair[1]
        found.append(
            Confusion(
                str(classes[label]),
                str(classes[guess]),
                len(cases),
                len({case[0] for case in cases}) == 2,
                sum(p for *_, p in cases) / len(cases),
                _picture(rows, album, sample),
                _picture(rows, album, first[guess]) if guess in first else None,
            )
        )
    return found


@dataclass(frozen=True)
class Search:
    """A query of retrieval: a caption with pictures, or a picture with captions."""

    query: str
    """The caption, or the first caption of the picture."""
    picture: Image.Image | None
    rank: int
    """Of the first right answer, 1 is best."""
    candidates: int
    answers: list[tuple[str, Image.Image | None, bool]]


def searches(rows: Rows, album: Album, direction: str, count: int, seed: int = 1) -> list[Search]:
    """Up to `count` queries drawn at random, with their five best answers. `direction` as in the figures' names."""
    ranks, best = rows[f"{direction}_ranks"], rows[f"{direction}_top"]
    pairs = set(zip(rows["pair_image"].tolist(), rows["pair_caption"].tolist(), strict=True))
    captions = rows["captions"]
    found: list[Search] = []
    queries = _draw(np.arange(len(rows["keys"])), count, seed)
    if direction == "text_to_image":  # a caption each of pictures drawn, so that none is asked for twice
        rng = np.random.default_rng(seed)
        own = [rows["pair_caption"][rows["pair_image"] == image] for image in queries]
        queries = list(dict.fromkeys(int(rng.choice(captions_of)) for captions_of in own))
    for q in queries:
        query, picture, answers = "", None, list[tuple[str, Image.Image | None, bool]]()
        if direction == "text_to_image":
            query = str(captions[q])
            for i in best[q].tolist():
                answers.append((str(rows["keys"][i]), _picture(rows, album, i), (i, q) in pairs))
            among = len(rows["keys"])
        else:
            query = str(captions[int(rows["pair_caption"][np.searchsorted(rows["pair_image"], q)])])
            picture = _picture(rows, album, q)
            answers += [(str(captions[c]), None, (q, c) in pairs) for c in best[q].tolist()]
            among = len(captions)
        found.append(Search(query, picture, int(ranks[q]) + 1, among, answers))
    return found


@dataclass(frozen=True)
class Example:
    """A training pair."""

    picture: Image.Image | None
    captions: list[str]
    source: str


def training_examples(
    recipe: Mapping[str, Any], folder: Path, album: Album, notes: list[str], count: int, seed: int = 2
) -> list[Example]:
    """Pairs drawn from all sources of a recipe, as many from each."""
    sources = recipe.get("data", {}).get("sources", {})
    found: list[Example] = []
    files = ShardFiles()
    for name, source in sources.items():
        try:
            shards = resolve(source["shards"], relative_to=folder)
            rng = np.random.default_rng(seed)
            share = -(-count // max(1, len(sources)))
            listings = [
                index(shards[s], album.cache) for s in sorted({int(rng.integers(len(shards))) for _ in range(share)})
            ]
            for n in range(share):
                listing = listings[n % len(listings)]
                sample = int(rng.integers(len(listing)))
                column, data = columns.read(files, listing, sample, columns.parse(source.get("caption", "txt")))
                image = source.get("image", "jpg;jpeg;png;webp")
                picture = album.picture(listing.shard, listing.key(sample), image)
                found.append(Example(picture, columns.read_captions(column, data), name))
        except (DataError, columns.BadSampleError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"Samples of source {name!r} are not shown: {error}")
    return found[:count]


def _picture(rows: Rows, album: Album, i: int) -> Image.Image | None:
    shard = str(rows["shards"][int(rows["shard"][i])])
    return album.picture(shard, str(rows["keys"][i]), str(rows["image"]), rows["patterns"].tolist())


def _draw(among: npt.NDArray[np.int64], count: int, seed: int) -> list[int]:
    if len(among) <= count:
        return [int(i) for i in among]
    return [int(i) for i in np.random.default_rng(seed).choice(among, count, replace=False)]
