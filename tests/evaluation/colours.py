"""A tiny world to evaluate in: pictures of one colour, and a model that knows the colours of words.

The fake model embeds a picture as its mean colour and a text as the mean colour of the words it knows, so what it
gets right and wrong can be worked out by hand.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from clip_train.data.transforms import Preprocess

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "pink": (255, 0, 255),
}
WORDS = ["<pad>", "<sot>", "<eot>", "<other>", *COLOURS]
PREPROCESS = Preprocess(size=4, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class ColourTokenizer:
    pad = 0

    def encode_batch(self, texts: Iterable[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        rows = [[1, *(WORDS.index(w) if w in WORDS else 3 for w in text.lower().split()), 2] for text in texts]
        return (
            np.array([i for row in rows for i in row], dtype=np.int32),
            np.array([len(row) for row in rows], dtype=np.int32),
        )


class ColourModel(nn.Module):
    """Both encoders give unnormalised vectors; `widest` remembers the longest text batch it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(3.0))
        self.embed_dim = 3
        self.batches: list[tuple[int, int]] = []
        self.trained_while_evaluating = False

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        self.trained_while_evaluating |= self.training or torch.is_grad_enabled()
        return images.mean((2, 3)) * self.logit_scale.exp() / 2

    def encode_text(self, ids: Tensor, lengths: Tensor) -> Tensor:
        self.batches.append((ids.shape[0], ids.shape[1]))
        table = torch.zeros(len(WORDS), 3)
        for i, (r, g, b) in enumerate(COLOURS.values()):
            table[4 + i] = torch.tensor([r, g, b]) / 127.5 - 1
        table[3] = torch.tensor([0.1, 0.2, 0.0])  # a word it does not know pulls it aside
        valid = torch.arange(ids.shape[1])[None] < lengths[:, None]
        assert bool((ids[~valid] == 0).all()), "padding must be the pad id"
        return (table[ids] * valid[..., None]).sum(1)


@dataclass(frozen=True)
class Loaded:
    model: Any
    preprocess: Preprocess
    tokenizer: Any


def loaded() -> Loaded:
    return Loaded(ColourModel(), PREPROCESS, ColourTokenizer())


def picture(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(out, "PNG")
    return out.getvalue()


def write_shard(path: Path, samples: Sequence[tuple[str, dict[str, bytes]]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def classified(path: Path, samples: Sequence[tuple[str, str]]) -> Path:
    """Pictures of a colour with a label that may be another."""
    return write_shard(
        path,
        [
            (f"s{i:03d}", {"png": picture(COLOURS[colour]), "cls": label.encode()})
            for i, (colour, label) in enumerate(samples)
        ],
    )


def captioned(path: Path, samples: Sequence[tuple[str, list[str]]]) -> Path:
    return write_shard(
        path,
        [
            (f"c{i:03d}", {"png": picture(COLOURS[colour]), "json": json.dumps({"captions": texts}).encode()})
            for i, (colour, texts) in enumerate(samples)
        ],
    )
