"""Is what was asked for in red, red? Captions that join a colour and a thing, judged by counting pixels.

Most of these pairs are in no caption of the pictograms. The judge is arithmetic: nothing was trained, and nothing of an
encoder or the generator is in it.

Shapes: `B` pictures of `S` x `S`, `H` hues.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clip_train.evaluation.text_to_image.model import words_of

ASKED = ("red", "yellow", "green", "blue", "purple", "black")
THINGS = (
    "heart", "circle", "square", "book", "car", "apple", "hat", "shirt", "flower", "fish", "star", "balloon", "bird",
    "house", "ball", "shoe",
)  # fmt: skip
CAPTIONS = tuple(f"{colour} {thing}" for thing in THINGS for colour in ASKED)
"""Every colour of every thing."""
WANTED = torch.arange(len(CAPTIONS)) % len(ASKED)
"""Place in `ASKED` of each caption's colour."""

_HUES = (  # a name, and where its hues begin in degrees
    ("red", 0.0), ("orange", 18.0), ("yellow", 40.0), ("green", 70.0), ("blue", 165.0), ("purple", 260.0),
    ("red", 338.0),
)  # fmt: skip
_NAMES = (*ASKED, "orange", "brown", "grey")


def dominant_colour(images: Tensor) -> Tensor:
    """uint8 `(B, 3, S, S)` -> int64 `(B,)`, the colour that most of the pixels have that are not white.

    A place in `ASKED`; what is beyond is another colour (orange, brown, grey), and the last of all is an empty picture.
    The bounds between colours were set by looking at the pictograms whose names hold a colour.
    """
    red, green, blue = (images.float().flatten(2) / 255).unbind(1)
    high, low = torch.maximum(red, torch.maximum(green, blue)), torch.minimum(red, torch.minimum(green, blue))
    chroma = high - low
    safe = chroma.clamp(min=1e-6)
    after_red, after_green = ((green - blue) / safe) % 6, (blue - red) / safe + 2
    degrees = 60 * torch.where(
        high == red, after_red, torch.where(high == green, after_green, (red - green) / safe + 4)
    )
    starts = torch.tensor([start for _, start in _HUES])
    colour = torch.tensor([_NAMES.index(name) for name, _ in _HUES])[torch.bucketize(degrees, starts, right=True) - 1]
    faint = chroma < 0.15 + 0.1 * (1 - high)
    for name, where in (
        ("brown", (degrees >= 10) & (degrees < 40) & (high < 0.62)),
        ("grey", faint),
        ("black", (high < 0.35) & (chroma < 0.25)),
    ):
        colour = torch.where(where, _NAMES.index(name), colour)
    white = (low > 0.8) | (faint & (high > 0.8))
    counts = torch.stack([((colour == number) & ~white).sum(1) for number in range(len(_NAMES))], 1)
    return torch.where(counts.sum(1) > 0, counts.argmax(1), len(_NAMES))


def colour_scores(images: Tensor, of_each: int) -> Tensor:
    """`(len(CAPTIONS),)` share of each caption's `of_each` pictures, one after the other, in the colour asked for."""
    found = dominant_colour(images).view(len(CAPTIONS), of_each)
    return (found == WANTED[:, None]).float().mean(1)


def named_colour(name: str) -> int | None:
    """The place in `ASKED` of the one colour that a name holds; None where there is none or another one too."""
    words = set(words_of(name))
    found = [place for place, colour in enumerate(ASKED) if colour in words]
    return found[0] if len(found) == 1 and not words & {"white", "orange", "brown", "grey", "pink"} else None
