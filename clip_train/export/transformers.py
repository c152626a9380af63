"""Export to transformers: a directory for AutoModel, AutoTokenizer, AutoImageProcessor and pipelines.

A ViT with a class token beside a causal transformer becomes a CLIPModel, SigLIP's towers a SiglipModel; every other
image tower that timm can build, and every BERT that is read at its first token, goes into a VisionTextDualEncoderModel.
What pools text otherwise has no class there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_train.config.schema import Preprocess, Sigmoid
from clip_train.errors import ExportError
from clip_train.export.parity import Peer
from clip_train.export.siglip import is_siglip, siglip
from clip_train.export.transformers_image import clip_vision_config, is_clip_vision, vision_model, vision_state
from clip_train.export.transformers_text import SIGLIP, pooled_encoder
from clip_train.loading import LoadedModel


def write_transformers(loaded: LoadedModel, out: Path) -> None:
    """Write config, weights, tokenizer and image processor into an existing folder.

    Raises:
        ExportError: transformers cannot express a tower or the preprocessing; the message says which targets can.
    """
    processor = image_processor(loaded.recipe.preprocess, loaded.preprocess.size)
    model, state = two_towers(loaded)
    model.load_state_dict(state, strict=True)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    loaded.tokenizer.to_transformers(out)
    if is_siglip(loaded.recipe):  # no mask: padding is attended to
        file = out / "tokenizer_config.json"
        config = json.loads(file.read_text(encoding="utf-8")) | {"model_input_names": ["input_ids"]}
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def two_towers(loaded: LoadedModel) -> tuple[Any, dict[str, Tensor]]:
    """transformers' model of the same shape with fresh weights, and ours under its names.

    Raises:
        ExportError: it has none; the message says which targets can.
    """
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig
    from transformers import VisionTextDualEncoderConfig as DualConfig
    from transformers import VisionTextDualEncoderModel as DualModel

    if is_siglip(loaded.recipe):
        return siglip(loaded)
    if isinstance(loaded.recipe.loss, Sigmoid):
        raise ExportError(f"transformers' CLIP has no logit bias, which loss.kind = 'sigmoid' learns, and {SIGLIP}")
    text, scale = pooled_encoder(loaded)
    own, embed_dim = loaded.model.state_dict(), loaded.recipe.joint.embed_dim
    if own.get("text_projection.bias") is not None:
        raise ExportError(
            "transformers' CLIP has no bias behind the text tower (text.projection_bias). Export it to onnx"
        )
    state = {f"text_model.{name}": tensor for name, tensor in text.state.items()} | vision_state(loaded)
    state |= {"text_projection.weight": own["text_projection.weight"] / scale, "logit_scale": own["logit_scale"]}
    if is_clip_vision(loaded) and isinstance(text.model.config, CLIPTextConfig):
        text_config, vision_config = text.model.config.to_dict(), clip_vision_config(loaded).to_dict()
        both = CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=embed_dim)
        return CLIPModel(both), state
    vision: Any = vision_model(loaded)
    both = DualConfig.from_vision_text_configs(vision.config, text.model.config, projection_dim=embed_dim)
    return DualModel(both, vision, text.model), state


def image_processor(look: Preprocess, size: int) -> Any:
    """CLIPImageProcessor with the same view.

    Raises:
        ExportError: it cannot fit a picture into a square with bars (`preprocess.resize = "longest"`).
    """
    from PIL.Image import Resampling
    from transformers import CLIPImageProcessor

    if look.resize == "longest":
        raise ExportError(
            "transformers' CLIPImageProcessor cannot do preprocess.resize = 'longest'. Export to open_clip"
        )
    square = look.resize == "squash"
    return CLIPImageProcessor(
        do_resize=True,
        size={"height": size, "width": size} if square else {"shortest_edge": size},
        do_center_crop=not square,
        crop_size={"height": size, "width": size},
        resample=Resampling[look.interpolation.upper()],
        image_mean=list(look.mean),
        image_std=list(look.std),
    )


def load_transformers(out: Path) -> Peer:
    """The exported directory as transformers' users load it."""
    from transformers import AutoModel, AutoTokenizer

    from tokenizer.cleaning import clean

    model: Any = AutoModel.from_pretrained(out, local_files_only=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(out, local_files_only=True)
    model.eval()

    # `tokenizer.json` cannot say ftfy and html unescaping: cleaned text is what it promises the same ids for.
    def tokenize(captions: Sequence[str]) -> list[list[int]]:
        return tokenizer([clean(text) for text in captions], truncation=True)["input_ids"]

    def encode_image(images: Tensor) -> Tensor:
        return F.normalize(model.get_image_features(pixel_values=images).pooler_output, dim=-1)

    def encode_text(captions: Sequence[str]) -> Tensor:
        padding = "max_length" if model.config.model_type == "siglip" else True
        cleaned = [clean(text) for text in captions]
        inputs = tokenizer(cleaned, truncation=True, padding=padding, return_tensors="pt")
        with torch.no_grad():
            features = model.get_text_features(**inputs).pooler_output
        return F.normalize(features, dim=-1)

    return Peer(encode_image, encode_text, tokenize)
