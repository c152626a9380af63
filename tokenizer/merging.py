"""The work horse of training: which pair comes next, and replacing it in every row.

A row is a distinct piece of the corpus as a string of tokens, `chr(id)` each, with its count. `Queue` knows the counts
of all pairs and yields the next one. Two stores hold the rows: `BulkRows` as flat numpy arrays, for the first merges,
which occur in a large part of all rows; `StringRows` as Python strings, for the many later ones that occur in a few
dozen, where a merge is `str.replace`. Both change the same counts in the same way.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from operator import add

import numpy as np
from numpy.typing import NDArray

from tokenizer.vocabulary import BASE, BASE_TOKENS

_HIGHEST = 0x10FFFF
_BETWEEN = _HIGHEST  # the "token" between rows
_DEAD = _HIGHEST - 1  # the place of a token merged into its left neighbour


class Queue:
    """Counts of pairs, and a heap that yields the pair with the highest count, of equals the greatest.

    A count rises only in the step that creates the pair. So entries of the heap may be too high, never too low, and are
    corrected when they surface. Pairs below `threshold` are not in the heap: it is filled again, with a lower
    threshold, when it runs empty.
    """

    def __init__(self, min_count: int) -> None:
        self.min_count = min_count
        self.counts: dict[str, int] = {}
        # For each token a string that sorts the other way round than its name, also where one name begins another.
        self._sort_keys = ["".join(chr(_HIGHEST - ord(c)) for c in name) + chr(_HIGHEST) for name in BASE_TOKENS]
        self._heap: list[tuple[int, str, str]] = []  # (-count, sort key, pair)
        self._threshold = 0

    def start(self, counts: dict[str, int]) -> None:
        self.counts = counts
        self._threshold = 1 + max(counts.values(), default=0)

    def pop(self) -> str | None:
        """The pair to merge next; None when none is left that occurs `min_count` times."""
        while True:
            while self._heap:
                negative, key, pair = self._heap[0]
                count = self.counts.get(pair, 0)
                if count == -negative:
                    heapq.heappop(self._heap)
                    return pair
                if count >= self._threshold:
                    heapq.heapreplace(self._heap, (-count, key, pair))
                else:
                    heapq.heappop(self._heap)
            if self._threshold <= self.min_count:
                return None
            self._threshold = max(self.min_count, self._threshold // 4)
            self._heap = [(-n, self._key(pair), pair) for pair, n in self.counts.items() if n >= self._threshold]
            heapq.heapify(self._heap)

    def merged(self, pair: str, created: Iterable[str]) -> None:
        """`pair` has become a token with the next id, and the pairs `created` with it have their counts."""
        first, second = map(ord, pair)
        self._sort_keys.append(self._sort_keys[first][:-1] + self._sort_keys[second])
        del self.counts[pair]
        for new in created:
            count = self.counts[new]
            if count >= self._threshold:
                heapq.heappush(self._heap, (-count, self._key(new), new))

    def _key(self, pair: str) -> str:
        return self._sort_keys[ord(pair[0])] + self._sort_keys[ord(pair[1])]


class BulkRows:
    """All rows in one array of tokens, doubly linked, and for each pair the sorted places of its first token."""

    def __init__(self, rows: Sequence[str], row_counts: Sequence[int], queue: Queue) -> None:
        between = chr(_BETWEEN)
        text = between + between.join(rows) + between
        self._tokens = np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.int32)
        size = len(self._tokens)
        self._before = np.arange(-1, size - 1, dtype=np.int32)
        self._after = np.arange(1, size + 1, dtype=np.int32)
        self._row_counts = np.array(row_counts, dtype=np.int64)
        self._row = np.cumsum(self._tokens == _BETWEEN, dtype=np.int32) - 1
        self._queue = queue

        inside = np.flatnonzero((self._tokens[:-1] != _BETWEEN) & (self._tokens[1:] != _BETWEEN)).astype(np.int32)
        keys = self._tokens[inside] * BASE + self._tokens[inside + 1]
        totals = np.bincount(keys, weights=self._counts_at(inside), minlength=1)
        self._places: dict[str, NDArray[np.int32]] = {}
        counts: dict[str, int] = {}
        for key, places in _grouped(keys, inside):
            pair = chr(key // BASE) + chr(key % BASE)
            self._places[pair] = places
            counts[pair] = int(totals[key])
        queue.start(counts)

    def merge(self, pair: str, token: str) -> None:
        """Replaces `pair` by `token` in every row and brings the queue's counts up to date."""
        tokens, before, after, counts = self._tokens, self._before, self._after, self._queue.counts
        first, second, merged = ord(pair[0]), ord(pair[1]), ord(token)
        left = self._places.pop(pair)
        right = after[left]
        there = (tokens[left] == first) & (tokens[right] == second)
        left, right = left[there], right[there]
        if first == second and len(left):  # in a run "aaaa" every other place begins a merge
            fresh = np.concatenate(([True], right[:-1] != left[1:]))
            number = np.arange(len(left))
            start = np.maximum.accumulate(np.where(fresh, number, 0))
            left, right = left[(number - start) % 2 == 0], right[(number - start) % 2 == 0]
        weights = self._counts_at(left)
        beyond = after[right]
        beyond_old = tokens[beyond]
        tokens[left], tokens[right] = merged, _DEAD
        after[left], before[beyond] = beyond, left

        # To the right of each merge, (second, x) becomes (token, x); x may itself have just become `token`.
        created: list[str] = []
        for old, count in _totals(beyond_old, weights):
            if old != first or pair[0] != pair[1]:
                counts[pair[1] + chr(old)] -= count
        beyond_new = tokens[beyond]
        for new, count in _totals(beyond_new, weights):
            counts[token + chr(new)] = count
            created.append(token + chr(new))
        for new, places in _grouped(beyond_new, left):
            self._places[token + chr(new)] = places
        # To the left (x, first) becomes (x, token), unless x is a merge too, which the above has seen.
        previous = before[left]
        previous_token = tokens[previous]
        other = previous_token != merged
        previous, previous_token, weights = previous[other], previous_token[other], weights[other]
        for new, count in _totals(previous_token, weights):
            if pair[0] != pair[1] or new != first:
                counts[chr(new) + pair[0]] -= count
            counts[chr(new) + token] = count
            created.append(chr(new) + token)
        for new, places in _grouped(previous_token, previous):
            self._places[chr(new) + token] = places
        self._queue.merged(pair, created)

    def to_strings(self) -> StringRows:
        """The same rows for the other store, without those that have become one token."""
        alive = self._tokens[self._tokens != _DEAD].astype("<u4")
        rows = alive.tobytes().decode("utf-32-le", errors="surrogatepass").split(chr(_BETWEEN))[1:-1]
        counts = self._row_counts.tolist()
        kept = [number for number, row in enumerate(rows) if len(row) > 1]
        return StringRows([rows[number] for number in kept], [counts[number] for number in kept], self._queue)

    def _counts_at(self, places: NDArray[np.int32]) -> NDArray[np.int64]:
        return self._row_counts[self._row[places]]


class StringRows:
    """Rows as strings, and for each pair the numbers of the rows it occurs in (a superset, with repetitions)."""

    def __init__(self, rows: list[str], row_counts: list[int], queue: Queue) -> None:
        self._rows, self._row_counts, self._queue = rows, row_counts, queue
        self._rows_of: defaultdict[str, list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            for pair in map(add, row, row[1:]):
                self._rows_of[pair].append(number)

    def merge(self, pair: str, token: str) -> None:
        """Replaces `pair` by `token` in every row and brings the queue's counts up to date."""
        first, second = pair
        rows, row_counts, rows_of, counts = self._rows, self._row_counts, self._rows_of, self._queue.counts
        created: defaultdict[str, int] = defaultdict(int)
        for number in rows_of.pop(pair, ()):
            row = rows[number]
            at = row.find(pair)
            if at < 0:
                continue
            count = row_counts[number]
            merged = rows[number] = row.replace(pair, token)
            if first != second and len(merged) == len(row) - 1:  # one occurrence, by far the most frequent case
                if at:
                    left = row[at - 1]
                    counts[left + first] -= count
                    new = left + token
                    created[new] += count
                    rows_of[new].append(number)
                if at + 1 < len(merged):
                    right = merged[at + 1]
                    counts[second + right] -= count
                    new = token + right
                    created[new] += count
                    rows_of[new].append(number)
            else:
                for old in map(add, row, row[1:]):
                    counts[old] -= count
                for new in map(add, merged, merged[1:]):
                    if token in new:
                        created[new] += count
                        rows_of[new].append(number)
                    else:
                        counts[new] += count
        counts.update(created)
        self._queue.merged(pair, created)


def _totals(tokens: NDArray[np.int32], weights: NDArray[np.int64]) -> list[tuple[int, int]]:
    """(token, sum of its weights) for each token that occurs, the one between rows left out."""
    inside = tokens < _DEAD
    sums = np.bincount(tokens[inside], weights=weights[inside])
    present = np.flatnonzero(sums)
    return list(zip(present.tolist(), sums[present].astype(np.int64).tolist(), strict=True))


def _grouped(keys: NDArray[np.int32], places: NDArray[np.int32]) -> Iterable[tuple[int, NDArray[np.int32]]]:
    """(key, its places in their order) for each key that occurs, the one between rows left out."""
    order = np.argsort(keys, kind="stable")
    keys, places = keys[order], places[order]
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1]))) if len(keys) else np.zeros(0, np.int64)
    ends = [*starts[1:].tolist(), len(keys)]
    for key, start, end in zip(keys[starts].tolist(), starts.tolist(), ends, strict=False):
        if key != _BETWEEN:
            yield key, places[start:end]
