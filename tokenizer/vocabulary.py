"""A vocabulary: its ids, their order, its fingerprint. Files are read and written in `formats.py`.

Id order (CLIP's): 256 bytes, the same 256 ending a word (`</w>`), one id for each merge in the order it was learned,
the specials. A byte is written as one printable character (GPT-2's map), so a token is a readable string:
`dog</w>` is "dog" at the end of a piece, `Ã©` the two UTF-8 bytes of "é".
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

END_OF_WORD = "</w>"
BASE = 512  # ids of the bytes, plain and ending a word

# OpenAI's files: 49,152 - 256 - 2 merges count, whatever the file holds beyond them; 49,408 ids, context 77.
OPENAI_MERGES = 49_152 - 256 - 2
OPENAI_CONTEXT = 77
# Ours: exactly 49,152 ids in all, 76 tokens with SOT and EOT, as the paper says (section 2.4).
OWN_VOCAB = 49_152
OWN_CONTEXT = 76
OWN_SPECIALS = 4

_printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_others = [b for b in range(256) if b not in _printable]
BYTE_ORDER: tuple[int, ...] = (*_printable, *_others)  # the byte that id i (< 256) stands for
BYTE_CHARS: tuple[str, ...] = (*map(chr, _printable), *(chr(256 + n) for n in range(len(_others))))
BYTE_OF_CHAR: dict[str, int] = dict(zip(BYTE_CHARS, BYTE_ORDER, strict=True))
BASE_TOKENS: tuple[str, ...] = (*BYTE_CHARS, *(char + END_OF_WORD for char in BYTE_CHARS))
# bytes.translate with this gives ids
ID_OF_BYTE: bytes = bytes(BYTE_ORDER.index(byte) for byte in range(256))

Merge = tuple[str, str]


@dataclass(frozen=True)
class Vocabulary:
    """Merges, specials and the cap on length; everything that decides which ids a text becomes.

    Attributes:
        merges: pairs of tokens in the order they were learned.
        specials: name of a role (`sot`, `eot`, `pad`, `mask`) -> its token as written in files.
        special_ids: the same roles -> ids. A `pad` that is also an ordinary token (OpenAI's 0, "!") is allowed.
        context_length: tokens in a caption at most, SOT and EOT included.
        literal_specials: whether `<start_of_text>` and `<end_of_text>` in a text mean the specials (open_clip with
            OpenAI's merges) or are text like any other (ours).
        provenance: where the merges come from; not part of the fingerprint.
    """

    merges: tuple[Merge, ...]
    specials: dict[str, str]
    special_ids: dict[str, int]
    context_length: int
    literal_specials: bool = False
    provenance: str = ""

    def __post_init__(self) -> None:
        check_merges(self.merges)
        if self.context_length < 3:
            raise ValueError(f"context_length {self.context_length}: SOT, one token and EOT need at least 3")
        for role in ("sot", "eot", "pad"):
            if role not in self.special_ids:
                raise ValueError(f"the vocabulary has no {role!r} special: it needs sot, eot and pad")
        for role, token_id in self.special_ids.items():
            if not 0 <= token_id < self.size:
                raise ValueError(f"special {role!r} has id {token_id}, outside the vocabulary of {self.size} ids")
        own = self.own_specials
        if len({self.special_ids[role] for role in own}) != len(own):
            raise ValueError(f"two specials share an id: {self.special_ids}")

    @property
    def own_specials(self) -> list[str]:
        """The roles that have an id of their own, behind the merges, in the order of their ids."""
        first = BASE + len(self.merges)
        return sorted((r for r, i in self.special_ids.items() if i >= first), key=self.special_ids.__getitem__)

    @property
    def size(self) -> int:
        """Number of ids, specials included."""
        first = BASE + len(self.merges)
        return first + sum(1 for token_id in self.special_ids.values() if token_id >= first)

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The token of each id as a string, specials included."""
        specials = (self.specials[role] for role in self.own_specials)
        return (*BASE_TOKENS, *(a + b for a, b in self.merges), *specials)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over all that decides ids: merges, special ids, context length, meaning of literals."""
        content = [[" ".join(merge) for merge in self.merges], self.special_ids, self.context_length]
        text = json.dumps([*content, self.literal_specials], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def own_vocabulary(merges: tuple[Merge, ...], context_length: int = OWN_CONTEXT, provenance: str = "") -> Vocabulary:
    """A vocabulary as this project trains them: specials behind the merges in the order pad, mask, SOT, EOT.

    EOT is the largest id on purpose: nothing here relies on it, but open_clip's and transformers' argmax pooling do.
    The tokens of the specials are in capitals, so no cleaned (lower-case) text can contain one in any library.
    """
    first = BASE + len(merges)
    ids = {"pad": first, "mask": first + 1, "sot": first + 2, "eot": first + 3}
    names = {"pad": "<|PAD|>", "mask": "<|MASK|>", "sot": "<|SOT|>", "eot": "<|EOT|>"}
    return Vocabulary(merges, names, ids, context_length, provenance=provenance)


def openai_vocabulary(
    merges: tuple[Merge, ...], context_length: int = OPENAI_CONTEXT, provenance: str = ""
) -> Vocabulary:
    """A vocabulary as OpenAI's CLIP and open_clip read a merges file: SOT and EOT behind the merges, pad 0."""
    first = BASE + len(merges)
    names = {"sot": "<|startoftext|>", "eot": "<|endoftext|>", "pad": BASE_TOKENS[0]}
    ids = {"sot": first, "eot": first + 1, "pad": 0}
    return Vocabulary(merges, names, ids, context_length, literal_specials=True, provenance=provenance)


def check_merges(merges: tuple[Merge, ...]) -> None:
    """Each part of a merge is a byte or the result of an earlier merge, and no two merges make the same token.

    Raises:
        ValueError: naming the first merge (1-based) that breaks this and why.
    """
    known = set(BASE_TOKENS)
    for number, (first, second) in enumerate(merges, 1):
        token = first + second
        if token in known:
            raise ValueError(
                f"merge {number} ({first!r} {second!r}) makes the token {token!r} a second time, which would shift all"
                " later ids: remove the duplicate, or train the vocabulary again"
            )
        for part in (first, second):
            if part not in known:
                raise ValueError(
                    f"merge {number} ({first!r} {second!r}) uses {part!r}, which is neither a byte nor made by an"
                    " earlier merge: the file is out of order or incomplete, get it again"
                )
        if first.endswith(END_OF_WORD):
            raise ValueError(f"merge {number} ({first!r} {second!r}) goes on behind the end of a word: it cannot occur")
        known.add(token)
