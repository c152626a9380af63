"""Export to sentence-transformers: the transformers directory, with a module that makes `encode` give unit vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_train.export.parity import Peer
from clip_train.export.transformers import write_transformers
from clip_train.loading import LoadedModel


def write_sentence_transformers(loaded: LoadedModel, out: Path) -> None:
    """Write into an existing folder what `SentenceTransformer(DIR)` loads.

    Raises:
        ExportError: as `write_transformers`: it is transformers' model that is loaded.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    write_transformers(loaded, out)
    model: Any = SentenceTransformer(str(out), device="cpu")
    model.append(Normalize())
    model.save(str(out), create_model_card=False)


def load_sentence_transformers(out: Path) -> Peer:
    """The exported directory as its users load it."""
    from sentence_transformers import SentenceTransformer

    from tokenizer.cleaning import clean

    model: Any = SentenceTransformer(str(out), device="cpu")

    def tokenize(captions: Sequence[str]) -> list[list[int]]:
        return model.tokenizer([clean(text) for text in captions], truncation=True)["input_ids"]

    def encode_image(images: Tensor) -> Tensor:
        # `encode` takes pictures, not tensors: its first module is asked, as `encode` does.
        return F.normalize(model[0].model.get_image_features(pixel_values=images).pooler_output, dim=-1)

    def encode_text(captions: Sequence[str]) -> Tensor:
        return torch.from_numpy(model.encode([clean(text) for text in captions]))

    return Peer(encode_image, encode_text, tokenize)
