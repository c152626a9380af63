"""Proof of an export: the target library, from the files just written, against the model they were written from.

Shapes: `N` probes, `D` size of the joint space, `S` picture's side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_train.errors import ExportError
from clip_train.loading import LoadedModel
from tokenizer import BPETokenizer

TOLERANCE = 1e-5
"""Largest difference of any coordinate of a unit vector, in fp32."""

# What tokenizers and cleaners disagree about: case, accents, entities, broken encodings, emoji, digits, contractions,
# white space, the words of special tokens, other scripts, and captions beyond the cap.
PROBES = (
    "a photo of a cat",
    "A PHOTO OF A CAT.",
    "two dogs, one cat & 3 birds!",
    "it's the dog's, they'll say; I'd've known",
    "crème brûlée naïve façade",
    "fish &amp; chips &lt;b&gt; &amp;quot;",
    "schÃ¶n mojibake, âœ” checked",
    "東京の夜景 и москва",
    "🦊 a fox 👩‍👩‍👧 family",
    "  tabs\tand\nnew   lines ",
    "4k 1080p 3.14159 1,000,000",
    "supercalifragilisticexpialidocious",
    "...---...!!!???",
    "x",
    "a picture " * 60,
)


@dataclass(frozen=True)
class Peer:
    """An exported model as its own library loads it."""

    encode_image: Callable[[Tensor], Tensor] | None
    """`(N, 3, S, S)` fp32, normalised -> `(N, D)` of unit length; None where only text was exported."""
    encode_text: Callable[[Sequence[str]], Tensor] | None
    """Captions -> `(N, D)` of unit length; None where only pictures were exported."""
    tokenize: Callable[[Sequence[str]], list[list[int]]] | None
    """Captions -> ids without padding; None where the library has no tokenizer."""


@dataclass(frozen=True)
class Parity:
    """What was compared, and the largest difference of a coordinate."""

    images: float | None
    texts: float | None
    captions: int

    def __str__(self) -> str:
        parts = [f"{name} within {gap:.1e}" for name, gap in (("images", self.images), ("texts", self.texts))
                 if gap is not None]  # fmt: skip
        return ", ".join([*parts, f"token ids equal on {self.captions} captions"] if self.captions else parts)


@torch.inference_mode()
def compare(loaded: LoadedModel, peer: Peer, captions: Sequence[str] = PROBES) -> Parity:
    """Token ids of every caption, then embeddings of captions and of random pictures.

    Raises:
        ExportError: ids differ, or a coordinate by more than `TOLERANCE`; the worst case is named.
    """
    if peer.tokenize is not None:
        check_ids(loaded.tokenizer, captions, peer.tokenize(captions))
    images = texts = None
    if peer.encode_text is not None:
        texts = check_gap("texts", loaded.encode_text(captions), peer.encode_text(captions))
    if peer.encode_image is not None:
        size = loaded.preprocess.size
        pixels = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
        images = check_gap("images", loaded.encode_image(pixels), peer.encode_image(pixels))
    return Parity(images, texts, len(captions) if peer.tokenize is not None else 0)


def check_ids(tokenizer: BPETokenizer, captions: Sequence[str], theirs: Sequence[list[int]]) -> None:
    """Raises ExportError where a caption's ids, without padding, are others there."""
    ids, lengths = tokenizer.encode_batch(list(captions))
    ours = [row.tolist() for row in torch.from_numpy(ids).split(lengths.tolist())]
    for caption, own, their in zip(captions, ours, theirs, strict=True):
        if own != their:
            raise ExportError(f"token ids differ for {caption!r:.80}: {own[:8]}… here, {their[:8]}… there")


def check_gap(what: str, ours: Tensor, theirs: Tensor) -> float:
    """The largest difference. Raises ExportError where it is above `TOLERANCE`."""
    if ours.shape != theirs.shape:
        raise ExportError(f"embeddings of {what} are {tuple(ours.shape)} here and {tuple(theirs.shape)} there")
    gap = float((ours - theirs).abs().max())
    if not gap <= TOLERANCE:  # also where it is not a number
        raise ExportError(f"embeddings of {what} differ by {gap:.1e}, more than {TOLERANCE:.0e}: nothing was exported")
    return gap
