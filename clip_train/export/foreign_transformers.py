"""Reading transformers' directories: CLIPModel, SiglipModel, and VisionTextDualEncoderModel of CLIP's and timm's image
towers and CLIP's and BERT's text towers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_train.errors import CheckpointError
from clip_train.export.foreign_files import read_json, read_tensors
from clip_train.export.foreign_parts import Parts
from clip_train.export.foreign_text import activation, text_from_transformers
from clip_train.export.shapes import blocks, image_section, text_section
from clip_train.export.siglip import from_siglip
from clip_train.export.transformers_keys import from_transformers
from clip_train.export.transformers_text import LINEAR_RANGE

_MODELS = ("clip", "siglip", "vision-text-dual-encoder")
_CLIP_EPS = 1e-5


def read_transformers(path: Path) -> Parts:
    """Read the directory of a CLIPModel or a VisionTextDualEncoderModel.

    Raises:
        CheckpointError: another model, weights that are a pickle or damaged, or a choice of which there is no twin.
    """
    config = read_json(path / "config.json")
    kind = config.get("model_type")
    if kind not in _MODELS:
        raise CheckpointError(f"{path}: model_type is {kind!r}; {', '.join(_MODELS)} can be imported")
    file = path / "model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{path}: there is no model.safetensors (pickles of transformers are not read)")
    text, vision = config["text_config"], config["vision_config"]
    tensors = {name: tensor for name, tensor in read_tensors(file).items() if not name.endswith(".position_ids")}
    if kind == "siglip":
        return _siglip(path, tensors, text, vision)
    clip_text = kind == "clip" or text.get("model_type") in ("clip", "clip_text_model")
    words: dict[str, Tensor] = {}
    section: dict[str, Any] = {}
    if not clip_text:
        own = {name.removeprefix("text_model."): tensors.pop(name) for name in list(tensors) if "text_model." in name}
        tensors["text_projection.weight"] = _behind_pooler(path, own, tensors["text_projection.weight"])
        section, words = text_from_transformers(text, own, "cls", str(path))
    try:
        state = from_transformers(tensors) | {f"text.{name}": tensor for name, tensor in words.items()}
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if clip_text:
        heads, eps = text.get("num_attention_heads", 8), text.get("layer_norm_eps", _CLIP_EPS)
        section = text_section(state, heads, activation(text.get("hidden_act", "quick_gelu"), str(path)))
        section |= {"norm_eps": eps} if eps != _CLIP_EPS else {}
    view = _view(path)
    size = view.pop("size", None)
    return Parts(state, _image(path, kind, vision, state, size), section, view)


def _siglip(path: Path, tensors: dict[str, Tensor], text: Mapping[str, Any], vision: Mapping[str, Any]) -> Parts:
    """SiglipModel. Its configurations leave out what is the library's default."""
    try:
        state = from_siglip(tensors)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    patch = state["image.patch_embedding.weight"].shape[-1]

    def shape(tower: Mapping[str, Any], name: str) -> dict[str, Any]:
        hidden, width = state[f"{name}.blocks.0.mlp.up.weight"].shape
        return {
            "width": width,
            "layers": blocks(state, name),
            "heads": tower.get("num_attention_heads", 12),
            "mlp_ratio": hidden / width,
            "activation": activation(tower.get("hidden_act", "gelu_pytorch_tanh"), str(path)),
            "norm_eps": tower.get("layer_norm_eps", 1e-6),
        }

    side = math.isqrt(len(state["image.positional_embedding"]))
    image = {"kind": "vit", "image_size": side * patch, "patch_size": patch, "pool": "map"}
    image |= {"pre_norm": False, "projection": False} | shape(vision, "image")
    words = {"kind": "transformer", "attention": "bidirectional", "padding": "attended", "pool": "last"}
    words |= {"projection_bias": True} | shape(text, "text")
    view = _view(path)
    view.pop("size", None)
    return Parts(state, image, words, view)


def _behind_pooler(path: Path, own: dict[str, Tensor], projection: Tensor) -> Tensor:
    """The projection of a BERT's first token, where the pooler between is the identity that exports write."""
    weight, bias = own.pop("pooler.dense.weight", None), own.pop("pooler.dense.bias", None)
    if weight is None or bias is None or bias.any() or not weight.equal(LINEAR_RANGE * torch.eye(weight.shape[0])):
        raise CheckpointError(f"{path}: BERT's pooler, a layer with tanh, has no place here")
    return projection * LINEAR_RANGE


def _image(
    path: Path, kind: str, vision: Mapping[str, Any], state: dict[str, Tensor], size: int | None
) -> dict[str, Any]:
    own = vision.get("model_type")
    if own == "timm_wrapper":
        return _timm_section(path, vision, size)
    if kind != "clip" and own not in ("clip", "clip_vision_model"):
        raise CheckpointError(f"{path}: its image tower is {own!r}; clip_vision_model and timm_wrapper can be imported")
    heads, eps = vision.get("num_attention_heads", 12), vision.get("layer_norm_eps", _CLIP_EPS)
    section = image_section(state, heads, activation(vision.get("hidden_act", "quick_gelu"), str(path)))
    return section | ({} if eps == _CLIP_EPS else {"norm_eps": eps})


def _timm_section(path: Path, vision: Mapping[str, Any], size: int | None) -> dict[str, Any]:
    arguments = dict(vision.get("model_args") or {})
    size = arguments.pop("img_size", size)
    if not isinstance(size, int):
        raise CheckpointError(
            f"{path}: neither img_size of its timm tower nor a picture size in preprocessor_config.json"
        )
    section = {"kind": "timm", "name": vision["architecture"], "image_size": size}
    return section | ({"arguments": arguments} if arguments else {})


def _view(path: Path) -> dict[str, Any]:
    """`preprocess` of an image processor's file, and `size`."""
    file = path / "preprocessor_config.json"
    if not file.is_file():
        return {}
    view = read_json(file)
    resample = {2: "bilinear", 3: "bicubic"}.get(int(view.get("resample", 3)))
    if resample is None:
        raise CheckpointError(f"{file}: resample = {view['resample']}: 2 (bilinear) or 3 (bicubic) can be read")
    crop = view.get("do_center_crop", True)
    found = {"mean": view["image_mean"], "std": view["image_std"], "interpolation": resample,
             "resize": "shortest" if crop else "squash"}  # fmt: skip
    size = view.get("crop_size" if crop else "size")
    return found | ({"size": size["height"]} if isinstance(size, dict) and "height" in size else {})
