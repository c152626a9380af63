"""Texts made to find differences: all scripts, emoji, entities, mojibake, control bytes, long words, specials."""

# ruff: noqa: SIM905
from __future__ import annotations

import random
from collections.abc import Callable, Iterator

_WORDS = (
    "a the dog cat photo of diagram isn't we're I'll they've he'd I'm it's 'S rock'n'roll 'tis o'clock don''t"
    " background, 3.14 2024-05-06 4k iPhone12 U.S.A. e-mail@example.com http://x.org/?a=1&b=2 C++ #tag @you"
    " naïve Straße ŒUVRE İstanbul ΟΔΟΣ Σίσυφος ǅungla ﬁne ﬅreet 'ſ ＷＩＤＥ ｶﾀｶﾅ"
    " кошка собака ქართული नमस्ते हिन्दी ภาษาไทย ไทย 日本語 中文字符 한국어 العربية עִבְרִית አማርኛ ᚠᚢᚦ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 १२३ ⅷ ² ¾"
).split()
_EMOJI = "🐶 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 ❤️ 🇫🇷 ☕ ✔ 1️⃣ 🏴󠁧󠁢󠁥󠁮󠁧󠁿".split(" ")
_ENTITIES = (
    "&amp; &lt;b&gt; &amp;amp; &#39; &#x1F436; &eacute; &NTILDE; &nbsp; &#0; &#xD800; &notanentity; & &amp &; <".split(
        " "
    )
)
_SPECIALS = (
    "<start_of_text> <end_of_text> <START_OF_TEXT> <ſtart_of_text> a<end_of_text>b <|startoftext|> <|endoftext|>"
    " <|EOT|> <|PAD|> </w> a</w> <start_of_text><end_of_text> <start_of_text".split(" ")
)
_CONTROLS = (
    "\x00 \x07 \x0b \x0c \x1b[31m \x1c \x1f \x7f \x85 \x93 \xa0 \xad \u200b \u200d \u2028 \u202e \u3000 \ufeff \ufffd"
    " \ufffc \ud83d \ud83d\udc36".split(" ")
)
_SPACES = (" ", " ", " ", " ", "", "  ", "\n", "\r\n", "\t", "\u2009")


def _mojibake(rng: random.Random) -> str:
    text = rng.choice([*_WORDS, "“quotes”", "déjà vu – naïve…", "€100", "smörgåsbord", "Ã ", "Â "])
    for _ in range(rng.randint(1, 2)):
        text = text.encode("utf-8", "replace").decode(
            rng.choice(["latin-1", "cp1252", "cp1251", "macroman"]), "replace"
        )
    return text


def _any_character(rng: random.Random) -> str:
    top = rng.choice([0x80, 0x100, 0x250, 0x3000, 0x10000, 0x20000, 0x110000])
    return chr(rng.randrange(top))


_MAKERS: tuple[tuple[int, Callable[[random.Random], str]], ...] = (
    (40, lambda rng: rng.choice(_WORDS)),
    (8, lambda rng: rng.choice(_WORDS).upper()),
    (5, lambda rng: rng.choice(_EMOJI)),
    (5, lambda rng: rng.choice(_ENTITIES)),
    (5, lambda rng: rng.choice(_SPECIALS)),
    (3, lambda rng: rng.choice(_CONTROLS)),
    (4, _mojibake),
    (10, lambda rng: "".join(chr(rng.randrange(33, 127)) for _ in range(rng.randint(1, 8)))),
    (10, lambda rng: "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(1, 14)))),
    (6, lambda rng: "".join(_any_character(rng) for _ in range(rng.randint(1, 5)))),
    (3, lambda rng: "“" + rng.choice(_WORDS) + rng.choice("”’…–")),
)


def fuzzed_texts(count: int, seed: int) -> Iterator[str]:
    """`count` texts, the same for the same seed; one in a thousand with a word of thousands of letters."""
    rng = random.Random(seed)
    weights, makers = zip(*_MAKERS, strict=True)
    for number in range(count):
        parts = rng.choices(makers, weights, k=rng.randint(0, 9))
        text = "".join(make(rng) + rng.choice(_SPACES) for make in parts)
        if number % 1000 == 0:
            text += "".join(rng.choice("aabcdeé") for _ in range(rng.randint(300, 1500)))
        yield text
