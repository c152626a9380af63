"""Export of the image tower to timm: a directory that `timm.create_model("local-dir:DIR")` loads.

As timm's own CLIP weights, the projection is the classifier: the model gives embeddings, and `num_classes=0` or
`features_only=True` the backbone, for detection and segmentation code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from clip_train.config.schema import Timm, VisionTransformer
from clip_train.errors import ExportError
from clip_train.export.open_clip_keys import rename
from clip_train.export.parity import Peer
from clip_train.loading import LoadedModel
from clip_train.models.adapters import TimmTower

_VIT = [
    ("class_embedding", "cls_token"),
    ("positional_embedding", "pos_embed"),
    ("patch_embedding.weight", "patch_embed.proj.weight"),
    ("pre_norm.*", "norm_pre.*"),
    ("blocks.#.attention_norm.*", "blocks.#.norm1.*"),
    ("blocks.#.attention.qkv.*", "blocks.#.attn.qkv.*"),
    ("blocks.#.attention.out.*", "blocks.#.attn.proj.*"),
    ("blocks.#.mlp_norm.*", "blocks.#.norm2.*"),
    ("blocks.#.mlp.up.*", "blocks.#.mlp.fc1.*"),
    ("blocks.#.mlp.down.*", "blocks.#.mlp.fc2.*"),
    ("post_norm.*", "norm.*"),
]


def write_timm(loaded: LoadedModel, out: Path) -> None:
    """Write `config.json` and `model.safetensors` into an existing folder.

    Raises:
        ExportError: timm has no such image tower; the message says which targets can.
    """
    import timm

    name, arguments = architecture(loaded)
    embed_dim, look = loaded.recipe.joint.embed_dim, loaded.preprocess
    model: Any = timm.create_model(name, num_classes=embed_dim, **arguments)
    state = {key.removeprefix("image."): tensor for key, tensor in loaded.model.state_dict().items()
             if key.startswith("image.")}  # fmt: skip
    missing = set(model.load_state_dict(backbone_state(state), strict=False).missing_keys)
    head: Any = model.get_classifier()
    own = {id(parameter) for parameter in head.parameters()}
    left = missing - {key for key, parameter in model.named_parameters() if id(parameter) in own}
    if left or not isinstance(head, torch.nn.Linear):
        raise ExportError(
            f"timm's {name} has no linear classifier to hold the projection. Export it to open_clip or onnx"
        )
    with torch.no_grad():
        head.weight.copy_(loaded.model.image_projection.weight)
        head.bias.zero_()  # a tower whose projection has one is no timm model
    config = {
        "architecture": name,
        "num_classes": embed_dim,
        "num_features": loaded.model.image.width,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, look.size, look.size],
            "mean": look.mean,
            "std": look.std,
            "interpolation": look.interpolation,
            "crop_pct": 1.0,
            "classifier": next(key for key, module in model.named_modules() if module is head),
            "crop_mode": {"shortest": "center", "longest": "border", "squash": "squash"}[look.resize],
            "num_classes": embed_dim,
        },
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, out / "model.safetensors")


def architecture(loaded: LoadedModel) -> tuple[str, dict[str, Any]]:
    """The name and arguments with which timm builds the image tower.

    Raises:
        ExportError: timm has none.
    """
    image = loaded.recipe.vision
    if isinstance(image, Timm):
        assert isinstance(loaded.model.image, TimmTower)
        return image.name, loaded.model.image.arguments
    if isinstance(image, VisionTransformer) and image.pool != "map":
        shape: dict[str, Any] = {
            "img_size": image.image_size,
            "patch_size": image.patch_size,
            "embed_dim": image.width,
            "depth": image.layers,
            "num_heads": image.heads,
            "mlp_ratio": image.mlp_ratio,
        }
        if image.pool == "mean":
            shape |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
        quick = "quickgelu_" if image.activation == "quick_gelu" else ""
        return f"vit_base_patch32_clip_{quick}224", shape
    pool = f" with pool {image.pool!r}" if isinstance(image, VisionTransformer) else ""
    raise ExportError(f"timm has no image tower like this {image.kind}{pool}. Export it to onnx")


def backbone_state(image: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower's tensors under timm's names."""
    if any(key.startswith("backbone.") for key in image):
        return {key.removeprefix("backbone."): tensor for key, tensor in image.items()}
    renamed = rename(image, _VIT, "timm")
    if "cls_token" in renamed:
        renamed["cls_token"] = renamed["cls_token"][None, None]
    renamed["pos_embed"] = renamed["pos_embed"][None]
    return renamed


def load_timm(out: Path) -> Peer:
    """The exported directory as timm's users load it."""
    import timm

    model: Any = timm.create_model(f"local-dir:{out.absolute()}", pretrained=True).eval()

    def encode_image(images: Tensor) -> Tensor:
        return F.normalize(model(images), dim=-1)

    return Peer(encode_image, None, None)
