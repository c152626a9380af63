"""Which picture is trained on and which one is asked for.

Training: five emoji hands and nine tenths of the clip art. Tests: one emoji hand that no training
picture comes from (`unseen_style`), and a tenth of the clip art (`openclipart_test`). No test picture
equals, or nearly equals, a training picture: where one does, the test picture goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from clip_train.embedded.dedup import Fingerprints, clusters, digest, fingerprints, near_pairs
from clip_train.embedded.shards import Sample, shuffled

LARGEST_TEST_FAMILY = 3
"""A clip-art picture with more near twins than this stays in training: a test would cost all of them."""


@dataclass(frozen=True)
class Splits:
    """The three splits, and what was removed on the way (for summary.json)."""

    train: list[Sample]
    unseen_style: list[Sample]
    openclipart_test: list[Sample]
    removed: dict[str, object] = field(default_factory=dict[str, object])


def make_splits(
    emoji: Sequence[Sample], unseen: Sequence[Sample], clip_art: Sequence[Sample], near: float, seed: int
) -> Splits:
    """Split and clean.

    Args:
        emoji: the training hands.
        unseen: the held-out hand.
        clip_art: pictures of which a tenth becomes a test.
        near: threshold of `dedup.near_pairs`.
        seed: decides which clip art is held out.
    """
    removed: dict[str, object] = {}
    emoji, merged = merge_equal(emoji)
    removed["train_emoji_equal_merged"] = merged
    clip_art, merged = merge_equal(clip_art)
    removed["openclipart_equal_merged"] = merged

    clip_train, clip_test, dropped = _hold_out(clip_art, emoji, near, seed)
    removed["openclipart_near_a_test_picture"] = dropped
    train = [*emoji, *clip_train]

    labels = {sample.picture.label for sample in emoji}
    known = [sample for sample in unseen if sample.picture.label in labels]
    removed["unseen_style_concept_not_trained"] = len(unseen) - len(known)
    distinct, twins = _first_of_equal(known)
    removed["unseen_style_equal_to_another"] = twins
    kept, exact, close = _apart(distinct, train, near)
    removed["unseen_style_equal_to_training"] = exact
    removed["unseen_style_near_training"] = close
    return Splits(train, kept, clip_test, removed)


def merge_equal(samples: Sequence[Sample]) -> tuple[list[Sample], int]:
    """One sample for pictures that are equal in every pixel, with the captions of all, first ones first.

    Kept apart they would be contradictions ("person running" and "man running" are one drawing in some
    sets); dropped, the second name would be lost.
    """
    merged: dict[str, Sample] = {}
    for sample in samples:
        key = digest(sample.pixels)
        if key in merged:
            first = merged[key].picture
            captions = tuple(dict.fromkeys((*first.captions, *sample.picture.captions)))
            merged[key] = replace(merged[key], picture=replace(first, captions=captions))
        else:
            merged[key] = sample
    return list(merged.values()), len(samples) - len(merged)


def _first_of_equal(samples: Sequence[Sample]) -> tuple[list[Sample], list[str]]:
    """The first of equal pictures, and the labels of the others, which nobody could tell apart."""
    first: dict[str, Sample] = {}
    for sample in samples:
        first.setdefault(digest(sample.pixels), sample)
    kept = list(first.values())
    labels = {sample.picture.label for sample in kept}
    return kept, sorted({str(sample.picture.label) for sample in samples} - {str(label) for label in labels})


def _apart(test: Sequence[Sample], train: Sequence[Sample], near: float) -> tuple[list[Sample], list[str], list[str]]:
    """The test pictures that no training picture is near to; the labels of those equal; and of those near."""
    hashes = {digest(sample.pixels) for sample in train}
    exact = {i for i, sample in enumerate(test) if digest(sample.pixels) in hashes}
    twin: dict[int, tuple[float, str]] = {}
    for i, j, distance in near_pairs(_prints(test), _prints(train), near):
        twin[i] = min(twin.get(i, (near, "")), (distance, train[j].picture.key))
    close = [
        f"{test[i].picture.label} ({key}, {distance:.3f})"
        for i, (distance, key) in sorted(twin.items(), key=lambda item: item[1])
        if i not in exact
    ]
    kept = [sample for i, sample in enumerate(test) if i not in exact and i not in twin]
    return kept, sorted(str(test[i].picture.label) for i in exact), close


def _hold_out(
    clip_art: Sequence[Sample], emoji: Sequence[Sample], near: float, seed: int
) -> tuple[list[Sample], list[Sample], int]:
    """Training, test, and how many near twins of test pictures belong to neither.

    A test picture has a caption of its own (retrieval could not tell two apart otherwise), few near
    twins, and is near no emoji of the training set.
    """
    prints = _prints(clip_art)
    family = clusters(prints, near)
    size = Counter(family)
    like_emoji = {i for i, _, _ in near_pairs(prints, _prints(emoji), near)}
    names = Counter(sample.picture.captions[0].lower() for sample in clip_art)
    index = {sample.picture.key: i for i, sample in enumerate(clip_art)}
    wanted = round(len(clip_art) / 10)
    chosen: dict[int, int] = {}
    for sample in shuffled(clip_art, seed):
        i = index[sample.picture.key]
        alone = names[sample.picture.captions[0].lower()] == 1 and len(sample.picture.captions) > 1
        if len(chosen) < wanted and alone and size[family[i]] <= LARGEST_TEST_FAMILY and i not in like_emoji:
            chosen.setdefault(family[i], i)
    test = [clip_art[i] for i in sorted(chosen.values())]
    train = [sample for i, sample in enumerate(clip_art) if family[i] not in chosen]
    return train, test, len(clip_art) - len(train) - len(test)


def _prints(samples: Sequence[Sample]) -> Fingerprints:
    return fingerprints([sample.pixels for sample in samples]) if samples else np.zeros((0, 1))
