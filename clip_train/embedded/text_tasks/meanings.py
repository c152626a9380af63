"""Tasks of WordNet's graph: what is a kind of what, and how near two meanings are."""

from __future__ import annotations

from collections import defaultdict
from functools import cache

from clip_train.embedded.text_tasks.common import Row, Sides, Task, overlap, share, shuffled, words
from clip_train.embedded.text_tasks.sentences import LICENCE, clean
from clip_train.embedded.text_tasks.wordnet import NOUN_CATEGORIES, Synset

CONCRETE = frozenset({"animal", "artifact", "body", "food", "object", "person", "plant", "substance", "phenomenon"})


class Graph:
    """Ancestors and nearness of nouns."""

    def __init__(self, nouns: dict[str, Synset]) -> None:
        self.nouns = nouns
        self.above = cache(self._above)

    def _above(self, key: str) -> dict[str, int]:
        """Every ancestor, the meaning itself included, with the fewest steps to it."""
        found, wave, steps = {key: 0}, [key], 0
        while wave:
            steps += 1
            wave = [up for one in wave for up in self.nouns[one].hypernyms if up not in found]
            found.update(dict.fromkeys(wave, steps))
        return found

    def depth(self, key: str) -> int:
        """Steps to the root, counted from 1."""
        return max(self.above(key).values()) + 1

    def similarity(self, first: str, second: str) -> float:
        """Wu & Palmer 1994: twice the depth of the deepest common ancestor over the depths by way of it."""
        a, b = self.above(first), self.above(second)
        common = max(a.keys() & b.keys(), key=lambda key: (self.depth(key), key))
        depth = self.depth(common)
        return 2 * depth / (a[common] + b[common] + 2 * depth)


def entailment(graph: Graph, common: set[str], sizes: dict[str, int]) -> Task:
    """A named and defined thing, and "a kind of Y": true (1) or false (0).

    Words alone do not tell: every Y is true of one thing and false of another, the false one is of the same broad kind
    where there is one, no word of Y stands in the definition, and neither things nor Ys of one split are in another
    (Levy et al. 2015 show what a probe learns otherwise: which words are general).
    """
    task = Task(
        "entailment", "labels",
        "A thing with its definition, and \"a kind of Y\": is it? Y is a hypernym at two to five steps, or another's.",
        LICENCE, ("false", "true"),
    )  # fmt: skip
    nouns = graph.nouns
    total = sum(sizes.values())
    sides = Sides(task.name, {name: size / total for name, size in sizes.items()})
    # Things by split and broad kind, each with an ancestor that its text does not name.
    groups: dict[tuple[str, int], list[tuple[str, str]]] = defaultdict(list)
    uses: dict[str, int] = defaultdict(int)
    for key in shuffled(nouns, task.name):
        one = nouns[key]
        if key not in common or not 4 <= len(words(one.definition)) <= 14:
            continue
        ups = [up for up, steps in sorted(graph.above(key).items()) if 2 <= steps <= 5 and graph.depth(up) >= 5]
        ups = [up for up in ups if uses[up] < 8 and not overlap(_text(one), nouns[up].lemmas[0])]
        for up in shuffled(ups, task.name, key):
            split = sides.claim([f"word {_name(nouns[up])}", f"word {_name(one)}", key])
            if split is not None:
                groups[split, one.category].append((key, up))
                uses[up] += 1
                break
    pairs: dict[str, list[Row]] = {name: [] for name in sizes}
    for (split, _), members in sorted(groups.items()):
        for (first, up), (second, other) in zip(members[::2], members[1::2], strict=False):
            crossed = ((first, other), (second, up))
            if up == other or any(
                y in graph.above(x) or overlap(_text(nouns[x]), nouns[y].lemmas[0]) for x, y in crossed
            ):
                continue
            rows = [(first, up, 1), (second, other, 1), (first, other, 0), (second, up, 0)]
            pairs[split].append([[_text(nouns[x]), f"a kind of {_name(nouns[y])}", label] for x, y, label in rows])
    for split, size in sizes.items():
        chosen = sorted(pairs[split], key=lambda rows: share(task.name, "quad", rows[0][0], rows[1][0]))[: size // 4]
        task.splits[split] = [row for rows in chosen for row in rows]
    return task


def similarity(graph: Graph, names: dict[str, str], sizes: dict[str, int], *, glosses: bool) -> Task:
    """Pairs of common concrete nouns, or of their definitions, rated by their nearness in the graph.

    Half of the pairs share an ancestor near by. No word stands in both, and no noun of one split is in another.

    Args:
        names: word -> key of its most frequent meaning.
    """
    what = "definitions of concrete nouns" if glosses else "concrete nouns"
    task = Task(
        f"wordnet_{'definitions' if glosses else 'names'}", "ratings",
        f"Pairs of {what}; the rating is Wu and Palmer's similarity in WordNet's graph of hypernyms.", LICENCE,
    )  # fmt: skip
    nouns = graph.nouns
    total = sum(sizes.values())
    sides = Sides(task.name, {name: size / total for name, size in sizes.items()})
    seen: set[str] = set()
    by_split: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for word in shuffled(names, task.name):
        key = names[word]
        one = nouns[key]
        if NOUN_CATEGORIES[one.category - 3] not in CONCRETE or key in seen or not word.isalpha():
            continue
        if glosses and not 4 <= len(words(one.definition)) <= 12:
            continue
        seen.add(key)
        by_split[sides.natural(key)].append((key, clean(one.definition) if glosses else word))
    for split, size in sizes.items():
        members = by_split[split][:1200]
        near: dict[str, list[int]] = defaultdict(list)
        for number, (key, _) in enumerate(members):
            for up, steps in graph.above(key).items():
                if 1 <= steps <= 3:
                    near[up].append(number)
        close = {
            (a, b) for together in near.values() if len(together) <= 40 for a in together for b in together if a < b
        }
        far = {
            (a, int(share(task.name, "far", a, turn) * len(members))) for a in range(len(members)) for turn in (0, 1)
        }
        rows: list[Row] = []
        for group in (close, far):
            kept: list[Row] = []
            for a, b in shuffled(group, task.name, split):
                (key, text), (other, second) = members[a], members[b]
                if a != b and not overlap(text, second) and len(kept) < size // 2:
                    kept.append([text, second, round(graph.similarity(key, other), 4)])
            rows += kept
        task.splits[split] = rows
    return task


def _name(one: Synset) -> str:
    return one.lemmas[0].lower()


def _text(one: Synset) -> str:
    return f"{_name(one)}: {clean(one.definition)}"
