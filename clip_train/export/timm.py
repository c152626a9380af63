"""Export of the image tower to timm: a directory that `timm.create_model("local-dir:DIR")` loads.

ViTs of every pool are timm's VisionTransformer; CLIP's ResNets are its `resnet*_clip`, whose depths go by name. As in
timm's own CLIP weights the projection is the classifier: the model gives embeddings, and `num_classes=0` or
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
    ("attention_pool.probe", "attn_pool.latent"),
    ("attention_pool.query.*", "attn_pool.q.*"),
    ("attention_pool.key_value.*", "attn_pool.kv.*"),
    ("attention_pool.out.*", "attn_pool.proj.*"),
    ("attention_pool.mlp_norm.*", "attn_pool.norm.*"),
    ("attention_pool.mlp.up.*", "attn_pool.mlp.fc1.*"),
    ("attention_pool.mlp.down.*", "attn_pool.mlp.fc2.*"),
]
_RESNET = [
    ("conv#.weight", "stem.conv#.conv.weight"),
    ("bn#.*", "stem.conv#.bn.*"),
    *(
        (f"stages.#.#.{ours}", f"stages.#.#.{theirs}")
        for number, name in ((1, "conv1_1x1"), (2, "conv2_kxk"), (3, "conv3_1x1"))
        for ours, theirs in ((f"conv{number}.weight", f"{name}.conv.weight"), (f"bn{number}.*", f"{name}.bn.*"))
    ),
    ("stages.#.#.shortcut_conv.*", "stages.#.#.shortcut.conv.conv.*"),
    ("stages.#.#.shortcut_bn.*", "stages.#.#.shortcut.conv.bn.*"),
    ("attention_pool.positional_embedding", "head.pos_embed"),
    ("attention_pool.query.*", "head.q.*"),
    ("attention_pool.key.*", "head.k.*"),
    ("attention_pool.value.*", "head.v.*"),
]
_RESNETS = {
    (3, 4, 6, 3): "resnet50_clip",
    (3, 4, 23, 3): "resnet101_clip",
    (4, 6, 10, 6): "resnet50x4_clip",
    (6, 8, 18, 8): "resnet50x16_clip",
    (3, 15, 36, 10): "resnet50x64_clip",
}
"""timm's names by the depths of the stages."""
_VITS = {1e-5: "vit_base_patch32_clip_224", 1e-6: "vit_base_patch32_224"}
"""timm's names by the epsilon of their norms, which no argument sets."""
_HEAD_WIDTH = 64
"""Of the attention pooling in timm's ResNets, which cannot be set."""


def write_timm(loaded: LoadedModel, out: Path) -> None:
    """Write `config.json` and `model.safetensors` into an existing folder.

    Raises:
        ExportError: timm has no such image tower; the message says which targets can.
    """
    import timm

    name, arguments = architecture(loaded)
    embed_dim, look = loaded.recipe.joint.embed_dim, loaded.preprocess
    model: Any = timm.create_model(name, num_classes=embed_dim, **arguments)
    head: Any = model.get_classifier()
    if not isinstance(head, torch.nn.Linear):
        raise ExportError(
            f"timm's {name} has no linear classifier to hold the projection. Export it to open_clip or onnx"
        )
    classifier = next(key for key, module in model.named_modules() if module is head)
    weight, bias = image_projection(loaded)
    state = backbone_state(loaded.model.state_dict())
    state[f"{classifier}.weight"] = weight
    state[f"{classifier}.bias"] = torch.zeros(embed_dim) if bias is None else bias
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ExportError(
            f"timm's {name} is another model with a classifier than without. Export it to onnx"
        ) from error
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
            "classifier": classifier,
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
    if isinstance(image, VisionTransformer):
        shape: dict[str, Any] = {
            "img_size": image.image_size,
            "patch_size": image.patch_size,
            "embed_dim": image.width,
            "depth": image.layers,
            "num_heads": image.heads,
            "mlp_ratio": image.mlp_ratio,
        }
        if image.pool != "cls":
            shape |= {"class_token": False, "global_pool": {"mean": "avg", "map": "map"}[image.pool], "fc_norm": False}
        if image.activation != "gelu":
            shape["act_layer"] = image.activation
        if image.norm_eps not in _VITS:
            known = " or ".join(map(str, _VITS))
            raise ExportError(f"timm's ViTs have norm_eps {known}; this one has {image.norm_eps}. Export it to onnx")
        return _VITS[image.norm_eps], shape | {"pre_norm": image.pre_norm}
    name, pooled = _RESNETS.get(image.layers), 32 * image.width
    if name is None or image.heads * _HEAD_WIDTH != pooled:
        raise ExportError(
            f"timm's CLIP ResNets have layers {', '.join(map(str, map(list, _RESNETS)))} and width / 2 heads; this one "
            f"has {list(image.layers)} and {image.heads} heads at width {image.width}. Export it to open_clip or onnx"
        )
    return name, {"img_size": image.image_size, "width_factor": image.width / 64}


def backbone_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower of a `TwoTower` state dict under timm's names, without the projection."""
    image = {key.removeprefix("image."): tensor for key, tensor in state.items() if key.startswith("image.")}
    if any(key.startswith("backbone.") for key in image):
        return {key.removeprefix("backbone."): tensor for key, tensor in image.items()}
    if "patch_embedding.weight" not in image:
        return rename(image, _RESNET, "timm")
    renamed = rename(image, _VIT, "timm")
    if "cls_token" in renamed:
        renamed["cls_token"] = renamed["cls_token"][None, None]
    renamed["pos_embed"] = renamed["pos_embed"][None]
    if "norm_pre.weight" not in renamed:  # without that norm timm's patch convolution has a bias
        renamed["patch_embed.proj.bias"] = torch.zeros(len(renamed["patch_embed.proj.weight"]))
    return renamed


def image_projection(loaded: LoadedModel) -> tuple[Tensor, Tensor | None]:
    """Weight `(D, W)` and bias `(D,)` of the projection behind the image tower; the identity where there is none."""
    state = loaded.model.state_dict()
    if "image_projection.weight" not in state:
        return torch.eye(loaded.recipe.joint.embed_dim), None
    return state["image_projection.weight"], state.get("image_projection.bias")


def load_timm(out: Path) -> Peer:
    """The exported directory as timm's users load it."""
    import timm

    model: Any = timm.create_model(f"local-dir:{out.absolute()}", pretrained=True).eval()

    def encode_image(images: Tensor) -> Tensor:
        return F.normalize(model(images), dim=-1)

    return Peer(encode_image, None, None)
