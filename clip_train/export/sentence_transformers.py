"""Export to sentence-transformers: `encode` takes captions or pictures and gives unit vectors.

What transformers has a two-tower model for is that model. Else captions and pictures go by routes of their own: text
encoder, pool and projection; image encoder and projection.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.config.schema import TextTransformer
from clip_train.errors import ExportError
from clip_train.export.parity import Peer
from clip_train.export.transformers import image_processor, two_towers, write_transformers
from clip_train.export.transformers_image import vision_model, vision_state
from clip_train.export.transformers_text import token_encoder
from clip_train.loading import LoadedModel

_POOLS: dict[str, Any] = {"eot": "lasttoken", "last": "lasttoken", "cls": "cls", "mean": "mean", "max": "max"}


def write_sentence_transformers(loaded: LoadedModel, out: Path) -> None:
    """Write into an existing folder what `SentenceTransformer(DIR)` loads.

    Raises:
        ExportError: transformers has no such text encoder, image tower or preprocessing, or the text pool is `map`.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    text = loaded.recipe.text
    if isinstance(text, TextTransformer) and text.padding == "attended":
        raise ExportError(
            "sentence-transformers fills captions up to the longest of a batch, and this text tower attends to padding "
            "up to the cap. Export it to transformers, open_clip or onnx"
        )
    try:
        two_towers(loaded)
    except ExportError:
        _write_routes(loaded, out)
        return
    write_transformers(loaded, out)
    model: Any = SentenceTransformer(str(out), device="cpu")
    model.append(Normalize())
    model.save(str(out), create_model_card=False)


def _write_routes(loaded: LoadedModel, out: Path) -> None:
    """Router over modalities."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Router, Transformer

    pool = loaded.recipe.text.pool
    if pool not in _POOLS:
        raise ExportError(f"sentence-transformers cannot pool texts with pool {pool!r}. Export it to onnx")
    processor = image_processor(loaded.recipe.preprocess, loaded.preprocess.size)
    vision, seen = vision_model(loaded), vision_state(loaded)
    prefix = "vision_model."
    vision.load_state_dict({name.removeprefix(prefix): one for name, one in seen.items() if name.startswith(prefix)})
    own, embed_dim = loaded.model.state_dict(), loaded.recipe.joint.embed_dim

    def projection(weight: Tensor, bias: Tensor | None) -> Any:
        dense: Any = Dense(weight.shape[1], embed_dim, bias=bias is not None, activation_function=nn.Identity())
        dense.linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        return dense

    with tempfile.TemporaryDirectory() as folder:
        words, pictures = Path(folder) / "text", Path(folder) / "image"
        token_encoder(loaded).filled().save_pretrained(words)
        loaded.tokenizer.to_transformers(words)
        vision.save_pretrained(pictures)
        processor.save_pretrained(pictures)
        text: list[Any] = [
            Transformer(str(words)),
            Pooling(loaded.model.text.width, _POOLS[pool]),
            projection(own["text_projection.weight"], own.get("text_projection.bias")),
        ]
        image: list[Any] = [
            Transformer(
                str(pictures),
                modality_config={"image": {"method": "forward", "method_output_name": "pooler_output"}},
                module_output_name="sentence_embedding",
            ),
            projection(seen["visual_projection.weight"], None),
        ]
        router: Any = Router({"text": text, "image": image})
        SentenceTransformer(modules=[router, Normalize()], device="cpu").save(str(out), create_model_card=False)


def load_sentence_transformers(out: Path) -> Peer:
    """The exported directory as its users load it."""
    from sentence_transformers import SentenceTransformer

    from tokenizer.cleaning import clean

    model: Any = SentenceTransformer(str(out), device="cpu")
    routes = getattr(model[0], "sub_modules", None)
    tokenizer = model.tokenizer if routes is None else routes["text"][0].tokenizer

    def tokenize(captions: Sequence[str]) -> list[list[int]]:
        return tokenizer([clean(text) for text in captions], truncation=True)["input_ids"]

    # `encode` takes pictures, not tensors: its modules are asked, as `encode` does.
    def encode_image(images: Tensor) -> Tensor:
        if routes is None:
            return F.normalize(model[0].model.get_image_features(pixel_values=images).pooler_output, dim=-1)
        features = routes["image"][0].model(pixel_values=images).pooler_output
        return F.normalize(routes["image"][1].linear(features), dim=-1)

    def encode_text(captions: Sequence[str]) -> Tensor:
        return torch.from_numpy(model.encode([clean(text) for text in captions]))

    return Peer(encode_image, encode_text, tokenize)
