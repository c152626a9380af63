"""The trainer by hand and against an independent, straightforward implementation of subword-nmt's rule."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from itertools import pairwise

import pytest
import regex

from tokenizer import BPETokenizer, SmallVocabularyWarning, clean, train_bpe
from tokenizer.training import count_pieces, learn_merges


def naive_merges(pieces: dict[str, int], wanted: int, min_count: int) -> list[tuple[str, str]]:
    """subword-nmt's `learn_bpe` without its shortcuts: count everything anew for every merge."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    rows = []
    for piece, count in pieces.items():
        row = [chr(b) if b in printable else chr(256 + others.index(b)) for b in piece.encode()]
        row[-1] += "</w>"
        rows.append((row, count))
    merges: list[tuple[str, str]] = []
    while len(merges) < wanted:
        statistics: Counter[tuple[str, str]] = Counter()
        for row, count in rows:
            for pair in pairwise(row):
                statistics[pair] += count
        if not statistics:
            break
        best = max(statistics, key=lambda pair: (statistics[pair], pair))
        if statistics[best] < min_count:
            break
        merges.append(best)
        for row, _ in rows:
            at = 0
            while at < len(row) - 1:
                if (row[at], row[at + 1]) == best:
                    row[at : at + 2] = [row[at] + row[at + 1]]
                at += 1
    return merges


def test_worked_example() -> None:
    """Counts: (s, t</w>) and (e, s) 9 each, "s" > "e"; (e, st</w>) 9; (o, w) only 0, split by the end of "low"."""
    pieces = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
    assert learn_merges(pieces, 4) == (("s", "t</w>"), ("e", "st</w>"), ("l", "o"), ("w", "est</w>"))


@pytest.mark.parametrize("bulk_merges", [1, 7, 10_000])
def test_merges_equal_the_naive_implementation(bulk_merges: int) -> None:
    rng = random.Random(5)
    for _ in range(150):
        alphabet = rng.choice(["ab", "abc", "abcdeé", "aàb漢", "aaab"])
        words = {"".join(rng.choice(alphabet) for _ in range(rng.randint(1, 9))): rng.randint(1, 5) for _ in range(40)}
        pieces = dict(list(words.items())[: rng.randint(1, 40)])
        wanted, min_count = rng.randint(1, 80), rng.choice([1, 2, 3])
        expected = naive_merges(pieces, wanted, min_count)
        assert list(learn_merges(pieces, wanted, min_count, bulk_merges=bulk_merges)) == expected, pieces


def test_whole_way_equals_the_naive_implementation() -> None:
    rng = random.Random(6)
    words = ["dog", "dogs", "cat's", "Caf&eacute;", "running", "runner", "2024", "it's", "x-ray", "naïve", "DOGS!"]
    texts = [" ".join(rng.choices(words, k=6)) for _ in range(200)]
    cut = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    pieces = Counter(piece for text in texts for piece in cut.findall(clean(text)))
    assert count_pieces(texts) == pieces
    tokenizer = train_bpe(texts, vocab_size=516 + 20)
    assert list(tokenizer.vocabulary.merges) == naive_merges(pieces, 20, 2)


def test_exact_size_and_order_of_ids() -> None:
    tokenizer = train_bpe(["the dog and the cat and the bird"] * 3, vocab_size=525)
    assert tokenizer.vocab_size == 525
    assert len(tokenizer.vocabulary.merges) == 525 - 512 - 4
    assert [tokenizer.pad, tokenizer.mask, tokenizer.sot, tokenizer.eot] == [521, 522, 523, 524]
    assert tokenizer.context_length == 76


def test_says_so_when_the_corpus_is_too_small() -> None:
    with pytest.warns(SmallVocabularyWarning, match=r"has 518 ids and not 49,152.*Give more captions"):
        tokenizer = train_bpe(["dog dog"])
    assert tokenizer.vocab_size == 518
    assert tokenizer.encode("dog") == [513]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train_bpe(["dog dog"], vocab_size=518).vocab_size == 518


def test_min_count() -> None:
    texts = ["aa aa bb"]
    assert learn_merges(count_pieces(texts), 10, min_count=1) == (("a", "a</w>"), ("b", "b</w>"))
    assert learn_merges(count_pieces(texts), 10, min_count=2) == (("a", "a</w>"),)
    assert learn_merges(count_pieces(texts), 10, min_count=3) == ()


def test_order_of_the_captions_has_no_influence() -> None:
    texts = [
        f"{a} {b} of {c}" for a in ("photo", "drawing") for b in ("big", "small") for c in ("dogs", "cats", "cafés")
    ]
    shuffled = random.Random(7).sample(texts, len(texts))
    with pytest.warns(SmallVocabularyWarning):
        assert train_bpe(texts).fingerprint == train_bpe(shuffled).fingerprint


@pytest.mark.parametrize(
    ("texts", "arguments", "message"),
    [
        ([], {}, "no words to learn from"),
        (["", "  \n"], {}, "no words to learn from"),
        ("one string", {}, "not one string"),
        (["a", None], {}, "must be a string"),
        (["a dog"], {"vocab_size": 515}, "516 ids"),
        (["a dog"], {"min_count": 0}, "min_count 0"),
    ],
)
def test_refuses(texts: list[str], arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_bpe(texts, **arguments)


def test_trained_tokenizer_encodes_its_own_words_as_one_token() -> None:
    words = [f"{a}{b}" for a in ("sun", "moon", "star") for b in ("light", "flower", "fish")]
    with pytest.warns(SmallVocabularyWarning):
        tokenizer = train_bpe([" ".join(words)] * 5)
    assert isinstance(tokenizer, BPETokenizer)
    assert all(len(tokenizer.encode(word)) == 1 for word in words)
