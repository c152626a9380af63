"""Learning merges from captions: byte-pair encoding by the rule of subword-nmt (Sennrich et al. 2016).

Start: every distinct piece of the corpus, with its count, is a row of bytes, the last one ending the word. Step: count
each pair of neighbours over all pieces; the pair with the **highest count** becomes a token, and of several with that
count the **greatest pair**, comparing the two token strings (bytes in GPT-2's characters, with `</w>`) first by first,
then second by second, by code point, as Python compares tuples of strings. Replace it everywhere, from left to right.
Stop at the wanted number of ids, or when no pair is left that occurs `min_count` times.

Worked example, `{"low": 5, "lower": 2, "newest": 6, "widest": 3}`: (e, s) and (s, t</w>) both occur 9 times; "s" > "e",
so the first merge is s + t</w>, then e + st</w> (9), then (l, o) and (o, w) with 7 each: no, (o, w) is split between
w and w</w>, so l + o.

How it is fast: see `merging.py`. Counts change only around a merge, so nothing is ever counted twice.
"""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

from tokenizer.bpe import BPETokenizer
from tokenizer.cleaning import PIECES, clean_words
from tokenizer.merging import BulkRows, Queue, StringRows
from tokenizer.vocabulary import (
    BASE,
    BASE_TOKENS,
    ID_OF_BYTE,
    OWN_CONTEXT,
    OWN_SPECIALS,
    OWN_VOCAB,
    Merge,
    own_vocabulary,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

BULK_MERGES = 2048  # merges by numpy before going on with strings: about where the two are equally fast


class SmallVocabularyWarning(UserWarning):
    """The corpus was exhausted before the vocabulary had the size asked for."""


def train_bpe(
    texts: Iterable[str],
    vocab_size: int = OWN_VOCAB,
    *,
    context_length: int = OWN_CONTEXT,
    min_count: int = 2,
    provenance: str = "",
    console: Console | None = None,
) -> BPETokenizer:
    """Learns a vocabulary of exactly `vocab_size` ids: 512 of bytes, the merges, 4 specials.

    Args:
        texts: captions, read once; they are cleaned as they are for encoding.
        min_count: a pair must occur this often to be merged.
        provenance: a note on where the captions come from, kept in the file.
        console: shows progress there; None is silent.

    Warns:
        SmallVocabularyWarning: the corpus has too few pairs, so the vocabulary is smaller than asked for.

    Raises:
        ValueError: no words in `texts`, an item that is no string, or a `vocab_size` below 516.
    """
    if isinstance(texts, str | bytes):
        raise ValueError("train_bpe takes an iterable of captions, not one string: pass [text]")
    if vocab_size < BASE + OWN_SPECIALS:
        raise ValueError(f"vocab_size {vocab_size}: bytes and specials alone are {BASE + OWN_SPECIALS} ids")
    if min_count < 1:
        raise ValueError(f"min_count {min_count}: a pair must occur at least once")
    with _progress(console) as report, _no_garbage_collection():
        pieces = count_pieces(_watched(texts, report))
        if not pieces:
            raise ValueError("no words to learn from: every caption is empty after cleaning, or there are none")
        wanted = vocab_size - BASE - OWN_SPECIALS
        merges = learn_merges(pieces, wanted, min_count, lambda done: report("merges", done, wanted))
        report("merges", len(merges), len(merges))
    if len(merges) < wanted:
        warnings.warn(
            f"the vocabulary has {vocab_size - wanted + len(merges):,} ids and not {vocab_size:,}: no further pair"
            f" occurs {min_count} times in {len(pieces):,} distinct words. Give more captions"
            + (", or lower min_count" if min_count > 1 else ""),
            SmallVocabularyWarning,
            stacklevel=2,
        )
    return BPETokenizer(own_vocabulary(merges, context_length, provenance))


def count_pieces(texts: Iterable[str]) -> dict[str, int]:
    """Cleaned captions -> how often each piece occurs. The pattern runs once a distinct word."""
    words = Counter(chain.from_iterable(map(clean_words, texts)))
    pieces: dict[str, int] = {}
    for word, count in words.items():
        for piece in (word,) if word.isascii() and word.isalpha() else PIECES.findall(word):
            pieces[piece] = pieces.get(piece, 0) + count
    return pieces


def learn_merges(
    pieces: Mapping[str, int],
    wanted: int,
    min_count: int = 2,
    progress: Callable[[int], None] | None = None,
    bulk_merges: int = BULK_MERGES,
) -> tuple[Merge, ...]:
    """Piece counts -> at most `wanted` merges, in order, by the rule at the top of this file.

    `bulk_merges` says when to change the way of storing rows; it has no influence on the result.
    """
    rows: list[str] = []  # the pieces as rows of tokens, chr(id) each
    counts: list[int] = []
    for piece, count in pieces.items():
        row = piece.encode("utf-8").translate(ID_OF_BYTE).decode("latin-1")
        if len(row) > 1:
            rows.append(row[:-1] + chr(256 + ord(row[-1])))
            counts.append(count)
    queue = Queue(min_count)
    store: BulkRows | StringRows = BulkRows(rows, counts, queue)
    names = list(BASE_TOKENS)
    merges: list[Merge] = []
    while len(merges) < wanted:
        pair = queue.pop()
        if pair is None:
            break
        first, second = map(ord, pair)
        merges.append((names[first], names[second]))
        names.append(names[first] + names[second])
        store.merge(pair, chr(len(names) - 1))
        if isinstance(store, BulkRows) and len(merges) >= bulk_merges:
            store = store.to_strings()
        if progress is not None and len(merges) % 256 == 0:
            progress(len(merges))
    if progress is not None:
        progress(len(merges))
    return tuple(merges)


@contextmanager
def _no_garbage_collection() -> Generator[None]:
    """Millions of small lists and no cycles: looking for cycles among them would take a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


Report = Callable[[str, int, int | None], None]


@contextmanager
def _progress(console: Console | None) -> Generator[Report]:
    if console is None:
        yield lambda stage, done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        tasks = {"captions": bar.add_task("captions", total=None), "merges": bar.add_task("merges", total=None)}

        def report(stage: str, done: int, total: int | None) -> None:
            bar.update(tasks[stage], completed=done, total=total)

        yield report


def _watched(texts: Iterable[str], report: Report) -> Iterator[str]:
    done = 0
    for done, text in enumerate(texts, 1):
        if done % 4096 == 0:
            report("captions", done, None)
        yield text
    report("captions", done, done)
