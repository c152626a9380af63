"""What a caption goes through before byte-pair encoding: repair, unescape, white space, case, pieces.

The order is that of CLIP (`openai/CLIP`, `clip/simple_tokenizer.py`) and of open_clip:

1. `ftfy.fix_text`: mojibake, curly quotes, ligatures, full-width forms, control characters, NFC
2. `html.unescape`, twice (captions of the web are often escaped twice)
3. every run of white space becomes one space, none at the ends
4. lower case (the context-aware one of `str.lower`: a final sigma is a final sigma)

Afterwards a pattern cuts the text into pieces: runs of letters, single digits, runs of anything else, and the
English clitics ('s, 't, 're, 've, 'm, 'll, 'd). No piece crosses white space, so all that follows may work on
white-space-delimited *words* one by one.
"""

from __future__ import annotations

import html

import ftfy
import regex

# In CLIP's vocabularies the two specials, written out in a text, *are* the specials: the pattern keeps them whole.
START_LITERAL, END_LITERAL = "<start_of_text>", "<end_of_text>"
_PIECES = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
PIECES = regex.compile(_PIECES, regex.IGNORECASE)
PIECES_AND_SPECIALS = regex.compile(f"{START_LITERAL}|{END_LITERAL}|{_PIECES}", regex.IGNORECASE)

# The line ends and tabs that ftfy leaves alone and white-space cleaning turns into spaces. The other control
# characters are not here: ftfy *deletes* \x0b and \x1c-\x1f, which str.split would take for spaces.
_LINE_ENDS = str.maketrans("\t\n\r", "   ")


def clean_words(text: str) -> list[str]:
    """The cleaned text as its white-space-delimited words; `[]` for an empty caption.

    Printable ASCII without `&` needs neither ftfy nor unescaping (each of their rules asks for a character outside
    that set), which is the fast path; a test proves the two paths equal on fuzzed text.

    Raises:
        ValueError: `text` is not a string.
    """
    if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"a caption must be a string, not {type(text).__name__} ({text!r:.60}): convert or drop it")
    if text.isascii() and "&" not in text:
        if text.isprintable():
            return text.lower().split()
        text = text.translate(_LINE_ENDS)
        if text.isprintable():
            return text.lower().split()
    return html.unescape(html.unescape(ftfy.fix_text(text))).lower().split()


def clean(text: str) -> str:
    """The cleaned text, as `open_clip` cleans it (its `clean="lower"`)."""
    return " ".join(clean_words(text))
