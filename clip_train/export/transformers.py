"""Export to transformers: a directory for AutoModel, AutoTokenizer, AutoImageProcessor and pipelines.

A ViT with a class token becomes a CLIPModel; a timm image tower becomes the vision model of a
VisionTextDualEncoderModel. ModifiedResNets, bidirectional text and other pools have no class there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_train.config.schema import Preprocess, Recipe, ResNet, Sigmoid, Timm, VisionTransformer
from clip_train.errors import ExportError
from clip_train.export.clip_text import clips_text
from clip_train.export.parity import Peer
from clip_train.export.transformers_keys import to_transformers
from clip_train.loading import LoadedModel
from clip_train.models.adapters import TimmTower


def write_transformers(loaded: LoadedModel, out: Path) -> None:
    """Write config, weights, tokenizer and image processor into an existing folder.

    Raises:
        ExportError: transformers cannot express a tower or the preprocessing; the message says which targets can.
    """
    processor = image_processor(loaded.recipe.preprocess, loaded.preprocess.size)
    model = build_transformers(loaded)
    model.load_state_dict(to_transformers(loaded.model.state_dict()), strict=True)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    loaded.tokenizer.to_transformers(out)


def build_transformers(loaded: LoadedModel) -> Any:
    """transformers' model of the same shape, with fresh weights."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPTextModel,
        TimmWrapperConfig,
        TimmWrapperModel,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
    )

    recipe, text = loaded.recipe, text_config(loaded)
    if isinstance(recipe.loss, Sigmoid):
        raise ExportError(
            "transformers' CLIP has no logit bias, which loss.kind = 'sigmoid' learns. Export to open_clip"
        )
    image, embed_dim = recipe.vision, recipe.joint.embed_dim
    if isinstance(image, VisionTransformer) and image.pool == "cls":
        vision = {
            "hidden_size": image.width,
            "intermediate_size": int(image.width * image.mlp_ratio),
            "projection_dim": embed_dim,
            "num_hidden_layers": image.layers,
            "num_attention_heads": image.heads,
            "image_size": image.image_size,
            "patch_size": image.patch_size,
            "hidden_act": image.activation,
        }
        return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=embed_dim))
    if isinstance(image, Timm):
        assert isinstance(loaded.model.image, TimmTower)
        config: Any = TimmWrapperConfig(architecture=image.name, model_args=loaded.model.image.arguments)
        config.num_labels = 0
        config.hidden_size = loaded.model.image.width  # the dual encoder asks for it, and the wrapper does not know
        both = VisionTextDualEncoderConfig.from_vision_text_configs(config, text, projection_dim=embed_dim)
        return VisionTextDualEncoderModel(both, TimmWrapperModel(config), CLIPTextModel(text))
    elsewhere = "open_clip or onnx" if isinstance(image, ResNet) else "onnx"
    raise ExportError(
        f"transformers has no image tower like this one ({_name(recipe)}): a ViT with pool 'cls' and timm towers can "
        f"be exported there. Export it to {elsewhere}"
    )


def text_config(loaded: LoadedModel) -> Any:
    """CLIPTextConfig of the text tower.

    Raises:
        ExportError: CLIP's text model there is causal and pools at EOT.
    """
    from transformers import CLIPTextConfig

    text, tokenizer = clips_text(loaded.recipe, "transformers"), loaded.tokenizer
    return CLIPTextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=text.width,
        intermediate_size=int(text.width * text.mlp_ratio),
        projection_dim=loaded.recipe.joint.embed_dim,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        max_position_embeddings=tokenizer.context_length,
        hidden_act=text.activation,
        bos_token_id=tokenizer.sot,
        eos_token_id=tokenizer.eot,
        pad_token_id=tokenizer.pad,
    )


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
        inputs = tokenizer([clean(text) for text in captions], truncation=True, padding=True, return_tensors="pt")
        with torch.no_grad():
            features = model.get_text_features(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
            ).pooler_output
        return F.normalize(features, dim=-1)

    return Peer(encode_image, encode_text, tokenize)


def _name(recipe: Recipe) -> str:
    pool = getattr(recipe.vision, "pool", None)
    return recipe.vision.kind + (f" with pool {pool!r}" if pool else "")
