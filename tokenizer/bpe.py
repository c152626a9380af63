"""Byte-pair encoding of captions: text -> ids and back.

    tokenizer = BPETokenizer.default()
    ids, lengths = tokenizer.encode_batch(["a diagram", "two dogs"])   # concatenated int32, int32 (N,)
    tokenizer.decode(ids[: lengths[0]])                               # "a diagram"

How it is fast: no piece crosses white space, so a dictionary maps each white-space-delimited word to its ids (packed
as int32 bytes). A known caption is then one split, one C-level map of lookups and one join; the pattern and the
merges run only for words not seen lately.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import repeat
from operator import add
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokenizer import formats
from tokenizer.cleaning import END_LITERAL, PIECES, PIECES_AND_SPECIALS, START_LITERAL, clean_words
from tokenizer.vocabulary import BASE, BYTE_OF_CHAR, END_OF_WORD, ID_OF_BYTE, OPENAI_CONTEXT, Vocabulary

Ids = NDArray[np.int32]

DEFAULT_PATH = Path(__file__).parent / "vocabularies" / "default-49152.json.gz"
CACHED_WORDS = 1 << 17  # about 20 MB when full
LONGEST_CACHED = 64  # characters; longer words are encoded each time
LONG_PIECE = 400  # bytes from which merging by heap, O(n log n), beats merging by passes, O(n * distinct merges)
_NO_MERGE = chr(0x10FFFF)
_PACKED = np.dtype("<i4")  # of the cached words: what UTF-32-LE makes of a string of chr(id)


class BPETokenizer:
    """Encodes with a `Vocabulary`. Immutable but for its cache of words; pickles as its vocabulary.

    Attributes:
        vocabulary: merges, specials and cap.
        sot, eot, pad: ids. `pad` is 0 ("!") with OpenAI's files.
        mask: id, or None where the vocabulary has none (OpenAI's).
        vocab_size: number of ids, specials included.
        context_length: tokens in a caption at most, SOT and EOT included.
        fingerprint: sha256 of all that decides ids.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.sot = vocabulary.special_ids["sot"]
        self.eot = vocabulary.special_ids["eot"]
        self.pad = vocabulary.special_ids["pad"]
        self.mask = vocabulary.special_ids.get("mask")
        self.vocab_size = vocabulary.size
        self.context_length = vocabulary.context_length
        self._pattern = PIECES_AND_SPECIALS if vocabulary.literal_specials else PIECES
        # A token is one character, chr(id), so that a merge is str.replace, and the order of characters that of ranks.
        id_of = {token: i for i, token in enumerate(vocabulary.tokens)}
        pairs = [chr(id_of[a]) + chr(id_of[b]) for a, b in vocabulary.merges]
        self._merged = {pair: chr(BASE + rank) for rank, pair in enumerate(pairs)}
        self._pair_of = {token: pair for pair, token in self._merged.items()}
        self._words = _WordCache(self)

    # -- files ---------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | os.PathLike[str], context_length: int | None = None) -> BPETokenizer:
        """Reads this project's JSON (plain or `.gz`), with another cap on length if one is given.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not such a vocabulary, is damaged, or contradicts itself.
        """
        return cls(_capped(formats.read_json(Path(path)), context_length))

    @classmethod
    def from_openai(cls, merges_path: str | os.PathLike[str], context_length: int = OPENAI_CONTEXT) -> BPETokenizer:
        """Reads OpenAI's merges (`bpe_simple_vocab_16e6.txt.gz`, or as plain text): 49,408 ids, context 77, pad 0.

        Ids are those of open_clip's SimpleTokenizer, also where a text contains `<start_of_text>` or `<end_of_text>`
        literally: there these *are* the specials, as they are in open_clip. Nothing in this project looks for EOT
        inside a caption (lengths are explicit), so such a caption cannot end early.
        """
        return cls(formats.read_openai(Path(merges_path), context_length))

    @classmethod
    def default(cls, context_length: int | None = None) -> BPETokenizer:
        """The vocabulary of 49,152 ids that ships with the project (`tokenizer/vocabularies/README.md`)."""
        return cls.load(DEFAULT_PATH, context_length)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes this project's JSON; gzipped where the name ends in `.gz`. The same vocabulary, the same bytes."""
        formats.write_json(self.vocabulary, Path(path))

    def to_openai(self, path: str | os.PathLike[str]) -> None:
        """Writes a merges file with which open_clip's `SimpleTokenizer(bpe_path=path)` gives the same ids."""
        formats.write_openai(self.vocabulary, Path(path))

    @classmethod
    def from_transformers(cls, directory: str | os.PathLike[str], context_length: int | None = None) -> BPETokenizer:
        """Reads `tokenizer.json` and `tokenizer_config.json` of a CLIP tokenizer, with another cap if one is given.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: another kind of tokenizer.
        """
        return cls(_capped(formats.read_transformers(Path(directory)), context_length))

    def to_transformers(self, directory: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json` for transformers' `AutoTokenizer`."""
        formats.write_transformers(self.vocabulary, Path(directory))

    # -- encoding ------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no SOT, no EOT, no truncation."""
        packed = b"".join(map(self._words.__getitem__, clean_words(text)))
        return np.frombuffer(packed, dtype=_PACKED).tolist()

    def encode_batch(self, texts: Iterable[str]) -> tuple[Ids, NDArray[np.int32]]:
        """Ids of many captions, each SOT, text, EOT; a text beyond `context_length` loses its end but never EOT.

        Returns:
            ids: int32 `(sum of lengths,)`, the captions one behind another.
            lengths: int32 `(N,)`; an empty caption has length 2.

        Raises:
            ValueError: `texts` is one string, or one of them is not a string.
        """
        ids, lengths, _ = self.encode_counting_cuts(texts)
        return ids, lengths

    def encode_counting_cuts(self, texts: Iterable[str]) -> tuple[Ids, NDArray[np.int32], int]:
        """As `encode_batch`, and how many captions lost their end to the cap."""
        if isinstance(texts, str | bytes):
            raise ValueError("encode_batch takes a list of captions, not one string: pass [text]")
        word = self._words.__getitem__
        sot, eot = _pack([self.sot]), _pack([self.eot])
        longest = 4 * (self.context_length - 2)
        bodies = [
            # the fast path of clean_words, without the call
            b"".join(
                map(
                    word,
                    text.lower().split()
                    if type(text) is str and text.isascii() and text.isprintable() and "&" not in text
                    else clean_words(text),
                )
            )
            for text in texts
        ]
        sizes = np.fromiter(map(len, bodies), dtype=np.int32, count=len(bodies))
        cut = 0
        if sizes.max(initial=0) > longest:
            cut = int((sizes > longest).sum())
            bodies = [body[:longest] for body in bodies]
            sizes = np.minimum(sizes, np.int32(longest))
        packed = sot + (eot + sot).join(bodies) + eot if bodies else b""
        return np.frombuffer(packed, dtype=_PACKED).astype(np.int32), sizes // np.int32(4) + np.int32(2), cut

    def padded(self, ids: Ids, lengths: NDArray[np.int32], width: int | None = None) -> Ids:
        """Concatenated ids as rows: int32 `(N, width)`, filled up with `pad`; width: the longest caption's if None."""
        longest = int(lengths.max(initial=0))
        width = longest if width is None else width
        if width < longest:
            raise ValueError(f"width {width} is less than the longest caption's {longest} tokens")
        rows = np.full((len(lengths), width), self.pad, dtype=np.int32)
        rows[np.arange(width) < lengths[:, None]] = ids
        return rows

    def decode(self, ids: Iterable[int]) -> str:
        """The text of one caption's ids: up to the first EOT, without specials, pieces separated by one space.

        Bytes that are no UTF-8 (a truncated character) become U+FFFD.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        specials = {self.vocabulary.special_ids[role] for role in self.vocabulary.own_specials}
        text: list[str] = []
        for token_id in map(int, ids):
            if token_id == self.eot:
                break
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"id {token_id} is outside this vocabulary of {self.vocab_size}: use the tokenizer it comes from"
                )
            if token_id not in specials:
                text.append(self.vocabulary.tokens[token_id])
        words = "".join(text).split(END_OF_WORD)
        return " ".join(
            bytes(BYTE_OF_CHAR[char] for char in word).decode("utf-8", errors="replace") for word in words
        ).rstrip(" ")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The token of each id as it stands in the vocabulary file, specials included."""
        return [self.vocabulary.tokens[int(token_id)] for token_id in ids]

    def _encode_word(self, word: str) -> bytes:
        """Packed ids of one cleaned word, which holds no white space."""
        if not (word.isascii() and word.isalpha()):  # such a word is one piece
            pieces: list[str] = self._pattern.findall(word)
            if pieces != [word]:
                # A piece cut again gives itself, so pieces and words can share the cache.
                return b"".join(map(self._words.__getitem__, pieces))
            if self.vocabulary.literal_specials and word in (START_LITERAL, END_LITERAL):
                return _pack([self.sot if word == START_LITERAL else self.eot])
        tokens = word.encode("utf-8").translate(ID_OF_BYTE).decode("latin-1")
        tokens = tokens[:-1] + chr(256 + ord(tokens[-1]))
        merge = self._merge_by_heap if len(tokens) > LONG_PIECE else self._merge_by_passes
        return merge(tokens).encode("utf-32-le", errors="surrogatepass")

    def _merge_by_passes(self, tokens: str) -> str:
        """The rule itself: take the pair learned first, merge it everywhere from left to right, repeat."""
        while len(tokens) > 1:
            token = min(map(self._merged.get, map(add, tokens, tokens[1:]), repeat(_NO_MERGE)))
            if token == _NO_MERGE:
                break
            tokens = tokens.replace(self._pair_of[token], token)
        return tokens

    def _merge_by_heap(self, tokens: str) -> str:
        """The same for long pieces. Equal because a merge is always learned after its parts (`check_merges`), so a
        merge never creates a pair that ought to have come before it, and (rank, position) is the order of the passes.
        """
        symbols = [*tokens, ""]  # "" marks the end, and tokens that were merged into their left neighbour
        end = len(tokens)
        after = list(range(1, end + 1))
        before = list(range(-1, end))
        heap: list[tuple[str, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right < end:
                pair = symbols[left] + symbols[right]
                token = self._merged.get(pair)
                if token is not None:
                    heapq.heappush(heap, (token, left, pair))

        for left in range(end - 1):
            offer(left, left + 1)
        while heap:
            token, left, pair = heapq.heappop(heap)
            right = after[left] if symbols[left] else end
            if symbols[left] + symbols[right] != pair:
                continue  # one of the two was merged with another neighbour meanwhile
            symbols[left], symbols[right] = token, ""
            after[left] = after[right]
            before[after[left]] = left
            offer(before[left], left)
            offer(left, after[left])
        return "".join(symbols)

    # -- the rest ------------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        return self.vocabulary.fingerprint

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return (
            f"BPETokenizer(vocab_size={self.vocab_size}, context_length={self.context_length}, sot={self.sot},"
            f" eot={self.eot}, pad={self.pad}, mask={self.mask}, fingerprint={self.fingerprint[:12]})"
        )

    def __reduce__(self) -> tuple[type[BPETokenizer], tuple[Vocabulary]]:
        return BPETokenizer, (self.vocabulary,)


class _WordCache(dict[str, bytes]):
    """Word -> packed ids, filled on demand; emptied when full, which costs less than keeping an order."""

    def __init__(self, tokenizer: BPETokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> bytes:
        packed = self._tokenizer._encode_word(word)  # pyright: ignore[reportPrivateUsage]
        if len(word) <= LONGEST_CACHED:
            if len(self) >= CACHED_WORDS:
                self.clear()
            self[word] = packed
        return packed


def _pack(ids: Sequence[int]) -> bytes:
    return np.array(ids, dtype=_PACKED).tobytes()


def _capped(vocabulary: Vocabulary, context_length: int | None) -> Vocabulary:
    return vocabulary if context_length is None else replace(vocabulary, context_length=context_length)
