"""Export to open_clip: a directory that `create_model_and_transforms("local-dir:DIR")` loads, with our tokenizer.

open_clip has no place for a bidirectional native text tower that masks padding, for text pools other than EOT, nor for
image pools other than the class token: such towers are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, assert_never

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from clip_train.config.schema import Recipe, ResNet, Sigmoid, Timm, VisionTransformer
from clip_train.errors import ExportError
from clip_train.export.clip_text import clips_text
from clip_train.export.open_clip_keys import to_open_clip
from clip_train.export.parity import Peer
from clip_train.loading import LoadedModel
from clip_train.models.adapters import TimmTower
from tokenizer import BPETokenizer


def write_open_clip(loaded: LoadedModel, out: Path) -> None:
    """Write `open_clip_config.json`, `open_clip_model.safetensors` and the tokenizer into an existing folder.

    Raises:
        ExportError: open_clip cannot express a tower; the message says which targets can.
    """
    look = loaded.recipe.preprocess
    config = {
        "model_cfg": model_config(loaded.recipe, loaded.tokenizer),
        "preprocess_cfg": {
            "mean": look.mean,
            "std": look.std,
            "interpolation": look.interpolation,
            "resize_mode": look.resize,
        },
    }
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: tensor.float().contiguous() for name, tensor in to_open_clip(loaded.model.state_dict()).items()}
    save_file(weights, out / "open_clip_model.safetensors", metadata={"format": "pt"})
    loaded.tokenizer.to_transformers(out)


def model_config(recipe: Recipe, tokenizer: BPETokenizer) -> dict[str, Any]:
    """open_clip's `model_cfg` of a recipe: what `open_clip.model.CLIP(**…)` takes.

    Raises:
        ExportError: open_clip cannot express a tower.
    """
    text, image = clips_text(recipe, "open_clip"), recipe.vision
    if getattr(image, "activation", text.activation) != text.activation:
        raise ExportError("open_clip has one activation for both towers, this model has two. Export it to onnx")
    return {
        "embed_dim": recipe.joint.embed_dim,
        "vision_cfg": _vision_config(image),
        "text_cfg": {
            "context_length": tokenizer.context_length,
            "vocab_size": tokenizer.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
            "mlp_ratio": text.mlp_ratio,
            # Any name makes open_clip take the tokenizer from the directory itself; `lower` is CLIP's own cleaning.
            "hf_tokenizer_name": "clip-train",
            "tokenizer_kwargs": {"clean": "lower"},
        },
        "quick_gelu": text.activation == "quick_gelu",
        **({"init_logit_bias": recipe.loss.init_logit_bias} if isinstance(recipe.loss, Sigmoid) else {}),
    }


def _vision_config(image: VisionTransformer | ResNet | Timm) -> dict[str, Any]:
    match image:
        case VisionTransformer():
            if image.pool != "cls":
                raise ExportError(
                    f"open_clip's ViT pools by a class token; this one has pool {image.pool!r}. Export it to onnx"
                )
            return {
                "image_size": image.image_size,
                "patch_size": image.patch_size,
                "width": image.width,
                "layers": image.layers,
                "head_width": image.width // image.heads,
                "mlp_ratio": image.mlp_ratio,
            }
        case ResNet():
            return {
                "image_size": image.image_size,
                "layers": list(image.layers),
                "width": image.width,
                "head_width": image.width * 32 // image.heads,
                "patch_size": None,
            }
        case Timm():
            if image.arguments:
                raise ExportError("open_clip cannot pass image.arguments to timm. Export it to timm or onnx")
            if not _takes_any_size(image.name) and image.image_size != _own_size(image.name):
                raise ExportError(
                    f"open_clip builds timm's {image.name} at its own {_own_size(image.name)} px only, and this one is "
                    f"at {image.image_size}. Export it to timm or onnx"
                )
            return {
                "image_size": image.image_size,
                "timm_model_name": image.name,
                "timm_model_pretrained": False,
                "timm_pool": "",
                "timm_proj": "linear",
            }
        case _:
            assert_never(image)


def _own_size(name: str) -> int:
    import timm

    config: Any = timm.get_pretrained_cfg(name)  # pyright: ignore[reportUnknownMemberType]
    return int(config.input_size[-1])


def _takes_any_size(name: str) -> bool:
    """Whether the backbone is one that knows no `img_size`: convolutions."""
    with torch.device("meta"):
        return "img_size" not in TimmTower(name, _own_size(name)).arguments


def load_open_clip(out: Path) -> Peer:
    """The exported directory as open_clip's users load it."""
    import open_clip

    name = f"local-dir:{out.absolute()}"
    model: Any = open_clip.create_model_and_transforms(name)[0]  # pyright: ignore[reportUnknownMemberType]
    tokenizer: Any = open_clip.get_tokenizer(name)  # pyright: ignore[reportUnknownMemberType]
    model.eval()
    eot = int(tokenizer.tokenizer.eos_token_id)

    def tokenize(captions: Sequence[str]) -> list[list[int]]:
        rows: list[list[int]] = tokenizer(list(captions)).tolist()
        return [row[: row.index(eot) + 1] for row in rows]

    def encode_image(images: Tensor) -> Tensor:
        return F.normalize(model.encode_image(images), dim=-1)

    def encode_text(captions: Sequence[str]) -> Tensor:
        with torch.no_grad():
            return F.normalize(model.encode_text(tokenizer(list(captions))), dim=-1)

    return Peer(encode_image, encode_text, tokenize)
