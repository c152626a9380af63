"""Cleaning against its long form, `ftfy.fix_text` and all, on text made to provoke it."""

from __future__ import annotations

import html
import random

import ftfy
import pytest

from tests.tokenizer.fuzz import fuzzed_texts
from tokenizer import clean
from tokenizer.cleaning import clean_words, fix_text


def long_way(text: str) -> str:
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return " ".join(text.split()).strip().lower()


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  A  Dog\n", "a dog"),
        ("a\tb\r\nc", "a b c"),
        ("a\x0bb \x1b[31mred\x1b[0m \x07bell", "ab red bell"),
        ("Caf&eacute; &amp;amp; bar", "café & bar"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("cafÃ©", "café"),
        ("“curly” ‘quotes’", "\"curly\" 'quotes'"),
        ("ﬂuﬀy", "fluffy"),
        ("ＬＯＵＤ", "loud"),
        ("ΟΔΟΣ", "οδος"),
        ("cafe\u0301", "café"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_worked_examples(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


def test_fast_paths_equal_the_long_way_on_every_character() -> None:
    for code in [*range(0x3000), *range(0xD800, 0xE000, 64), *range(0xF900, 0x10000), *range(0x1F000, 0x1FB00)]:
        for text in (chr(code), f"Ab{chr(code)} c"):
            assert clean(text) == long_way(text), hex(code)


def test_ascii_fast_path_equals_the_long_way() -> None:
    rng = random.Random(0)
    for _ in range(30_000):
        text = "".join(chr(rng.randrange(128)) for _ in range(rng.randint(0, 30)))
        if rng.random() < 0.5:
            text = "".join(c for c in text if c.isprintable())
        assert clean(text) == long_way(text), repr(text)


def test_fast_paths_equal_the_long_way_on_fuzzed_text() -> None:
    for text in fuzzed_texts(10_000, seed=7):
        assert fix_text(text) == ftfy.fix_text(text), repr(text)
        assert clean(text) == long_way(text), repr(text)


@pytest.mark.parametrize("wrong", [None, 3, b"bytes", ["list"]])
def test_refuses_what_is_no_string(wrong: object) -> None:
    with pytest.raises(ValueError, match="must be a string"):
        clean_words(wrong)  # type: ignore[arg-type]
