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
from unicodedata import is_normalized

import ftfy
import regex
from ftfy.badness import is_bad

# In CLIP's vocabularies the two specials, written out in a text, *are* the specials: the pattern keeps them whole.
START_LITERAL, END_LITERAL = "<start_of_text>", "<end_of_text>"
_PIECES = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
PIECES = regex.compile(_PIECES, regex.IGNORECASE)
PIECES_AND_SPECIALS = regex.compile(f"{START_LITERAL}|{END_LITERAL}|{_PIECES}", regex.IGNORECASE)

# The line ends and tabs that ftfy leaves alone and white-space cleaning turns into spaces. The other control
# characters are not here: ftfy *deletes* \x0b and \x1c-\x1f, which str.split would take for spaces.
_LINE_ENDS = str.maketrans("\t\n\r", "   ")
_QUOTES = str.maketrans("\u02bc\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "'" * 5 + '"' * 4)
# All that ftfy's rules for single characters touch, quotes apart: controls, ligatures, line and paragraph separators,
# surrogates, the wide and half-wide forms, byte-order marks and their like.
_TOUCHED = regex.compile(
    "[\x00-\x1f\x7f-\x9f\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\u2028\u2029\u206a-\u206f\u3000"
    "\ud800-\udfff\ufb00-\ufb06\ufeff\uff01-\uffff]"
)
_FTFY_SEGMENT = 1_000_000  # ftfy looks at longer lines in parts


def clean_words(text: str) -> list[str]:
    """The cleaned text as its white-space-delimited words; `[]` for an empty caption.

    Printable ASCII without `&` needs neither ftfy nor unescaping (each of their rules asks for a character outside
    that set), which is the fast path; a test proves it equal to the long way on fuzzed text.

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
    return html.unescape(html.unescape(fix_text(text))).lower().split()


def clean(text: str) -> str:
    """The cleaned text, as `open_clip` cleans it (its `clean="lower"`)."""
    return " ".join(clean_words(text))


def fix_text(text: str) -> str:
    """`ftfy.fix_text(text)`, three times faster where all there is to do is to straighten quotes.

    ftfy repeats its rules until none applies. Where the text has nothing for the rules of single characters, no `&`,
    no sign of mojibake (`is_bad`, the expensive question) and is in NFC, what remains is quotes; and then the same has
    to hold of the text with straight quotes.
    """
    if "&" in text or len(text) > _FTFY_SEGMENT or _TOUCHED.search(text) or is_bad(text):
        return ftfy.fix_text(text)
    straight = text.translate(_QUOTES)
    if not is_normalized("NFC", straight) or (straight != text and not straight.isascii() and is_bad(straight)):
        return ftfy.fix_text(text)
    return straight
