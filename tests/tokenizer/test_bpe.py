"""The encoder against open_clip's, by hand, and by its properties."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer, default_bpe

from tests.tokenizer.fuzz import fuzzed_texts
from tokenizer import BPETokenizer, clean
from tokenizer.bpe import LONG_PIECE
from tokenizer.vocabulary import own_vocabulary


@pytest.fixture(scope="module")
def openai() -> BPETokenizer:
    return BPETokenizer.from_openai(default_bpe())


@pytest.fixture(scope="module")
def default() -> BPETokenizer:
    return BPETokenizer.default()


def test_worked_example() -> None:
    """Merges: l o, lo w, e r</w>. In GPT-2's order "!" is 0, so a letter is ord - 33, and 256 more at a word's end."""
    tokenizer = BPETokenizer(own_vocabulary((("l", "o"), ("lo", "w"), ("e", "r</w>"))))
    ell, o, w, e, lo, low, er_ = ord("l") - 33, ord("o") - 33, ord("w") - 33, ord("e") - 33, 512, 513, 514
    assert tokenizer.encode("lower") == [low, er_]
    assert tokenizer.encode("Low  LO") == [lo, w + 256, ell, o + 256]
    assert tokenizer.encode("loe!") == [lo, e + 256, 0 + 256]
    assert (tokenizer.pad, tokenizer.mask, tokenizer.sot, tokenizer.eot) == (515, 516, 517, 518)
    assert tokenizer.vocab_size == len(tokenizer) == 519
    assert tokenizer.pieces([low, er_, 518]) == ["low", "er</w>", "<|EOT|>"]


@pytest.mark.parametrize(
    ("text", "ids"),
    [("a diagram", [320, 22697]), ("hello world", [3306, 1002]), ("dog", [1929]), ("cat", [2368]), ("photo", [1125])],
)
def test_known_ids_of_openai(openai: BPETokenizer, text: str, ids: list[int]) -> None:
    assert openai.encode(text) == ids
    whole, lengths = openai.encode_batch([text])
    assert whole.tolist() == [49406, *ids, 49407]
    assert lengths.tolist() == [len(ids) + 2]


def test_openai_vocabulary_is_what_it_is(openai: BPETokenizer) -> None:
    assert (openai.vocab_size, openai.context_length) == (49_408, 77)
    assert (openai.sot, openai.eot, openai.pad, openai.mask) == (49_406, 49_407, 0, None)


def test_default_vocabulary_has_exactly_49152_ids(default: BPETokenizer) -> None:
    assert (default.vocab_size, default.context_length) == (49_152, 76)
    assert len(set(default.vocabulary.tokens)) == 49_152
    assert sorted([default.pad, default.mask, default.sot, default.eot]) == list(range(49_148, 49_152))
    assert default.eot == 49_151
    assert len(default.encode("a photo of a golden retriever wearing sunglasses")) == 8


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_ids_equal_open_clip_on_fuzzed_text(openai: BPETokenizer, seed: int) -> None:
    """120,000 texts in four parts; the batch form with truncation is compared on all, `encode` on some."""
    peer = SimpleTokenizer()
    texts = list(fuzzed_texts(30_000, seed))
    ids, lengths = openai.encode_batch(texts)
    for text, ours in zip(texts, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
        theirs = [peer.sot_token_id, *peer.encode(text), peer.eot_token_id]
        if len(theirs) > 77:
            theirs = [*theirs[:76], peer.eot_token_id]
        assert ours.tolist() == theirs, repr(text)
    for text in texts[::500]:
        assert openai.encode(text) == peer.encode(text), repr(text)


def test_rows_equal_open_clip_tensor(openai: BPETokenizer) -> None:
    texts = ["a diagram", "", "wow! " * 100, "two dogs & a cat"]
    rows = openai.padded(*openai.encode_batch(texts), width=77)
    assert (rows == SimpleTokenizer()(texts).numpy()).all()


def test_specials_written_in_a_text(openai: BPETokenizer, default: BPETokenizer) -> None:
    text = "a <start_of_text> b <END_OF_TEXT> c <|EOT|> <|endoftext|>"
    peer = SimpleTokenizer()
    assert openai.encode(text) == peer.encode(text)
    assert {openai.sot, openai.eot} <= set(openai.encode(text))  # as in open_clip
    assert max(default.encode(text)) < default.pad  # ours: text like any other


@pytest.mark.parametrize("cap", [76, 77, 3, 16])
def test_truncation_keeps_eot(cap: int) -> None:
    tokenizer = BPETokenizer.default(context_length=cap)
    for words in (1, cap - 3, cap - 2, cap - 1, 10 * cap):
        ids, lengths = tokenizer.encode_batch(["dog " * words])
        assert lengths.tolist() == [min(words + 2, cap)] == [len(ids)]
        assert (ids[0], ids[-1]) == (tokenizer.sot, tokenizer.eot)
        assert set(ids[1:-1].tolist()) <= set(tokenizer.encode("dog"))


def test_batch_is_concatenated_int32(default: BPETokenizer) -> None:
    ids, lengths = default.encode_batch(["a dog", "", "two cats on a mat"])
    assert ids.dtype == lengths.dtype == np.int32
    assert ids.flags.writeable
    assert lengths.tolist() == [4, 2, 7]
    assert ids[4:6].tolist() == [default.sot, default.eot]
    rows = default.padded(ids, lengths)
    assert rows.shape == (3, 7)
    assert (rows[1] == [default.sot, default.eot, *[default.pad] * 5]).all()
    assert [default.decode(row) for row in rows] == ["a dog", "", "two cats on a mat"]
    with pytest.raises(ValueError, match="width 6"):
        default.padded(ids, lengths, width=6)


def test_empty_batch(default: BPETokenizer) -> None:
    ids, lengths = default.encode_batch([])
    assert ids.shape == lengths.shape == (0,)
    assert default.padded(ids, lengths).shape == (0, 0)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_round_trip(text: str) -> None:
    tokenizer = _cached_default()
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.pad for i in ids)
    assert "".join(tokenizer.decode(ids).split()) == "".join(clean(text).split())


def test_decode(openai: BPETokenizer, default: BPETokenizer) -> None:
    assert default.decode([default.sot, *default.encode("It's 42!"), default.eot, default.pad, 5]) == "it 's 4 2 !"
    assert default.decode([default.mask, *default.encode("dog")]) == "dog"  # type: ignore[list-item]
    assert openai.decode([*openai.encode("wow!"), openai.eot, 0, 0, 0]) == "wow !"  # pad 0 is "!" too
    assert default.decode(default.encode("é")[:1] if len(default.encode("é")) > 1 else [0xE9 - 33]) != "é"
    for wrong in (-1, default.vocab_size):
        with pytest.raises(ValueError, match="outside this vocabulary"):
            default.decode([wrong])


def test_long_pieces_merge_alike_by_heap_and_by_passes(openai: BPETokenizer) -> None:
    rng = random.Random(3)
    for _ in range(300):
        alphabet = rng.choice(["ab", "aeiounst", "abcdefghijklmnopqrstuvwxyz"])
        tokens = "".join(chr(ord(rng.choice(alphabet)) - 33) for _ in range(rng.randint(2, 600)))
        assert openai._merge_by_heap(tokens) == openai._merge_by_passes(tokens)


def test_a_word_of_two_hundred_thousand_letters_does_not_hang(default: BPETokenizer) -> None:
    rng = random.Random(4)
    word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(200_000))
    assert len(word) > LONG_PIECE
    _, lengths = default.encode_batch([word])
    assert lengths.tolist() == [76]


def test_cache_is_bounded(default: BPETokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenizer.bpe.CACHED_WORDS", 50)
    tokenizer = pickle.loads(pickle.dumps(default))
    for number in range(500):
        text = f"w{number}x{number * 7}y, word{number}"
        assert tokenizer.encode(text) == default.encode(text)
        assert len(tokenizer._words) <= 50


def test_pickle_is_the_same_tokenizer(openai: BPETokenizer, default: BPETokenizer) -> None:
    for tokenizer in (openai, default):
        tokenizer.encode_batch(f"word{n}" for n in range(1000))
        data = pickle.dumps(tokenizer)
        assert len(data) < 4_000_000
        again = pickle.loads(data)
        assert (again.fingerprint, again.pad, again.mask) == (tokenizer.fingerprint, tokenizer.pad, tokenizer.mask)
        assert again.encode("A café <end_of_text>") == tokenizer.encode("A café <end_of_text>")


def test_fingerprint_follows_what_decides_ids(openai: BPETokenizer, default: BPETokenizer) -> None:
    other = own_vocabulary((("l", "o"), ("lo", "w")))
    swapped = own_vocabulary((("l", "o"), ("o", "w")))
    prints = {openai.fingerprint, default.fingerprint, other.fingerprint, swapped.fingerprint,
              BPETokenizer.default(context_length=77).fingerprint}  # fmt: skip
    assert len(prints) == 5
    assert own_vocabulary((("l", "o"), ("lo", "w")), provenance="a note").fingerprint == other.fingerprint


@pytest.mark.parametrize("wrong", ["a caption", b"a caption"])
def test_one_string_is_no_batch(default: BPETokenizer, wrong: object) -> None:
    with pytest.raises(ValueError, match="a list of captions"):
        default.encode_batch(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [None, 3.5, b"dog"])
def test_a_caption_that_is_no_string_is_refused(default: BPETokenizer, wrong: object) -> None:
    with pytest.raises(ValueError, match="must be a string"):
        default.encode_batch(["a dog", wrong])  # type: ignore[list-item]


_default: list[BPETokenizer] = []


def _cached_default() -> BPETokenizer:
    if not _default:
        _default.append(BPETokenizer.default())
    return _default[0]
