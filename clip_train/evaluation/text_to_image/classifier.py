"""An independent judge of generated pictures: a small CNN that names what real pictures show, in words.

It is trained on the words of the captions of real training pictures, and never sees a text encoder or the generator.

Shapes: `B` pictures of `S` x `S`, `A` attributes (words).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clip_train.evaluation.text_to_image.codebook import to_floats
from clip_train.evaluation.text_to_image.model import words_of

_EMPTY = frozenset(
    ("a", "an", "and", "at", "by", "for", "from", "in", "into", "is", "it", "no", "non", "not", "of", "off", "on", "or",
     "st", "the", "to", "up", "with", "clip", "art", "simple", "symbol", "sign", "other", "set", "icon", "part")
)  # fmt: skip
"""Words of captions that no picture shows."""


def attributes_of(captions: Sequence[Sequence[str]], least: int = 30, most: int = 160) -> list[str]:
    """Words that at least `least` pictures' captions hold, the most frequent `most` of those that say something."""
    counts = Counter(word for texts in captions for word in {word for text in texts for word in words_of(text)})
    known = [(word, n) for word, n in counts.items() if word not in _EMPTY and not word.isdigit() and len(word) > 1]
    ranked = sorted((pair for pair in known if pair[1] >= least), key=lambda pair: (-pair[1], pair[0]))
    return [word for word, _ in ranked[:most]]


def targets_of(captions: Sequence[Sequence[str]], attributes: Sequence[str]) -> Tensor:
    """bool `(B, A)`: whether a picture's captions hold the word."""
    number = {word: place for place, word in enumerate(attributes)}
    found = torch.zeros(len(captions), len(attributes), dtype=torch.bool)
    for row, texts in enumerate(captions):
        for text in texts:
            for word in words_of(text):
                if word in number:
                    found[row, number[word]] = True
    return found


class Classifier(nn.Module):
    """Four 3 x 3 convolutions, three of them with stride 2, the mean over places, one linear layer."""

    mean: Tensor
    std: Tensor

    def __init__(self, attributes: int, width: int = 32) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 3 * width, 4 * width)
        layers: list[nn.Module] = []
        for number, (one, two) in enumerate(pairwise(widths)):
            stride = 1 if number == 0 else 2
            layers += [nn.Conv2d(one, two, 3, stride, 1, bias=False), nn.BatchNorm2d(two), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], attributes)
        self.register_buffer("mean", torch.zeros(attributes))
        self.register_buffer("std", torch.ones(attributes))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 `(B, 3, S, S)` -> logits `(B, A)`."""
        return self.head(self.body(to_floats(images)).mean((2, 3)))

    @torch.inference_mode()
    def evidence(self, images: Tensor, batch: int = 256) -> Tensor:
        """`(B, A)` logits against those of real pictures: minus their mean, over their deviation.

        So a frequent word is no better a guess than a rare one.
        """
        return (torch.cat([self(part) for part in images.split(batch)]) - self.mean) / self.std

    def calibrate_(self, images: Tensor) -> None:
        """Take mean and deviation of each logit over real pictures."""
        self.mean.zero_()
        self.std.fill_(1)
        evidence = self.evidence(images)
        self.mean.copy_(evidence.mean(0))
        self.std.copy_(evidence.std(0).clamp(min=1e-3))


def rank_scores(evidence: Tensor, targets: Tensor) -> NDArray[np.float32]:
    """`(B,)` for each picture the share of pairs (a word of the caption, another word) that are ranked right.

    0.5 is chance. Ties count half. Every row needs a word of each kind.
    """
    scores: list[float] = []
    for row, wanted in zip(evidence, targets, strict=True):
        inside, outside = row[wanted], row[~wanted]
        difference = inside[:, None] - outside[None]
        scores.append(float(((difference > 0).float() + 0.5 * (difference == 0).float()).mean()))
    return np.array(scores, np.float32)


def recall_at(evidence: Tensor, targets: Tensor, k: int = 10) -> NDArray[np.float32]:
    """`(B,)` the share of a caption's words that are among the `k` of the most evidence."""
    top = torch.zeros_like(targets).scatter_(1, evidence.topk(min(k, evidence.shape[1]), dim=1).indices, True)
    return ((top & targets).sum(1) / targets.sum(1)).numpy().astype(np.float32)
