"""Tasks of sentences: word order, words in context, kinds of things."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import combinations

from clip_train.embedded.text_tasks.common import Row, Sides, Task, share, shuffled, words
from clip_train.embedded.text_tasks.wordnet import NOUN_CATEGORIES, Synset

LICENCE = "WordNet 3.0"
TOPICS = ("animal", "artifact", "body", "communication", "feeling", "food", "location", "person", "plant", "substance")


def clean(sentence: str) -> str:
    """Lower case, without the marks at its end: neither may give an answer away."""
    return re.sub(r"\s+", " ", sentence).strip(" .!?;:,").lower()


def acceptability(synsets: dict[str, Synset], sizes: dict[str, int]) -> Task:
    """Each sentence as it is (1), and with two of its words in each other's place (0)."""
    task = Task(
        "acceptability", "labels",
        "A usage example of WordNet, or the same with two of its words in each other's place.", LICENCE,
        ("swapped", "real"),
    )  # fmt: skip
    splits: dict[str, list[Row]] = {name: [] for name in sizes}
    total = sum(sizes.values())
    sides = Sides(task.name, {name: size / total for name, size in sizes.items()})
    taken: set[tuple[str, ...]] = set()
    for text in shuffled({clean(example) for one in synsets.values() for example in one.examples}, task.name):
        tokens = text.split(" ")
        bag = tuple(sorted(tokens))
        if not 5 <= len(tokens) <= 12 or bag in taken or not re.fullmatch(r"[a-z ',-]+", text):
            continue
        places = [(i, j) for i, j in combinations(range(len(tokens)), 2) if tokens[i] != tokens[j]]
        split = sides.natural(text)
        if not places or len(splits[split]) + 2 > sizes[split]:
            continue
        taken.add(bag)
        i, j = places[int(share(task.name, "swap", text) * len(places))]
        tokens[i], tokens[j] = tokens[j], tokens[i]
        splits[split] += [[text, 1], [" ".join(tokens), 0]]
    task.splits = splits
    return task


def topic(nouns: dict[str, Synset], sizes: dict[str, int]) -> Task:
    """Which of ten kinds of things a definition defines; equally many of each."""
    task = Task("topic", "labels", "Definitions of nouns: of what kind is the thing?", LICENCE, TOPICS)
    splits: dict[str, list[Row]] = {name: [] for name in sizes}
    total = sum(sizes.values())
    sides = Sides(task.name, {name: size / total for name, size in sizes.items()})
    counts: dict[tuple[str, int], int] = defaultdict(int)
    seen: set[str] = set()
    for key in shuffled(nouns, task.name):
        one = nouns[key]
        name = NOUN_CATEGORIES[one.category - 3]
        definition = clean(one.definition)
        if name not in TOPICS or not 4 <= len(words(definition)) <= 14 or definition in seen:
            continue
        label, split = TOPICS.index(name), sides.natural(definition)
        if counts[split, label] >= sizes[split] // len(TOPICS):
            continue
        counts[split, label] += 1
        seen.add(definition)
        splits[split].append([definition, label])
    task.splits = splits
    return task


def word_in_context(synsets: dict[str, Synset], sizes: dict[str, int]) -> Task:
    """Two sentences with a word in common: in one meaning (1) or in two (0); as many of each for every word.

    Derived here from WordNet's examples, in the form of WiC (Pilehvar & Camacho-Collados 2019) but not its data. The
    first text names the word, so that no position has to be marked.
    """
    task = Task(
        "word_in_context", "labels",
        "Is a word used in one meaning in two usage examples? Derived from WordNet; not the WiC data set.", LICENCE,
        ("different", "same"),
    )  # fmt: skip
    by_word: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for one in synsets.values():
        for example in map(clean, one.examples):
            if not 2 <= len(words(example)) <= 12:
                continue
            for lemma in {lemma.lower() for lemma in one.lemmas}:
                if lemma in words(example):
                    by_word[lemma][one.key].append(example)
    total = sum(sizes.values())
    sides = Sides(task.name, {name: size / total for name, size in sizes.items()})
    splits: dict[str, list[Row]] = {name: [] for name in sizes}
    for lemma in shuffled(by_word, task.name):
        meanings = by_word[lemma]
        twice = [key for key in sorted(meanings) if len(meanings[key]) > 1]
        for key in shuffled(twice, task.name, lemma)[:3]:
            others = [other for other in sorted(meanings) if other != key]
            if not others:
                continue
            other = shuffled(others, task.name, lemma, key)[0]
            first, second = shuffled(meanings[key], task.name, lemma)[:2]
            third = shuffled(meanings[other], task.name, lemma)[0]
            if len({first, second, third}) < 3:
                continue
            split = sides.claim([f"word {lemma}", key, other, first, second, third])
            if split is None or len(splits[split]) + 2 > sizes[split]:
                continue
            splits[split] += [[f"{lemma}: {first}", second, 1], [f"{lemma}: {first}", third, 0]]
    task.splits = splits
    return task
