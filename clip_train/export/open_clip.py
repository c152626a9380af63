"""Export to open_clip: a directory that `create_model_and_transforms("local-dir:DIR")` loads, with our tokenizer.

Causal transformers and SigLIP's are open_clip's own; BERTs and T5s are transformers' models inside it, whose shape lies
in `text_config/`. open_clip finds that folder by an absolute path only: `relocate.py` writes it anew after a move.
A bidirectional transformer that masks padding, other text pools and other image pools have no place there and are
refused by name.
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

from clip_train.config.schema import (
    BertText,
    Recipe,
    ResNet,
    Sigmoid,
    T5Text,
    TextTransformer,
    Timm,
    VisionTransformer,
)
from clip_train.errors import ExportError
from clip_train.export.open_clip_keys import rename, to_open_clip
from clip_train.export.open_clip_relocate import relocate
from clip_train.export.parity import Peer
from clip_train.export.timm import image_projection
from clip_train.export.transformers_text import bert_config, bert_state, t5_config, t5_table, text_state
from clip_train.loading import LoadedModel
from clip_train.models.adapters import TimmTower
from tokenizer import BPETokenizer

RELOCATE = Path(__file__).with_name("open_clip_relocate.py")
_HF_POOLS = {"cls": "cls_last_hidden_state_pooler", "mean": "mean_pooler"}


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
    state = loaded.model.state_dict()
    state.setdefault("image_projection.weight", image_projection(loaded)[0])
    projection = state["text_projection.weight"]
    if not isinstance(loaded.recipe.text, TextTransformer):
        hf_config, words = _hf_text(loaded)
        hf_config.save_pretrained(out / "text_config")
        (out / "relocate.py").write_text(RELOCATE.read_text(encoding="utf-8"), encoding="utf-8")
        relocate(out, out)
        state = {name: tensor for name, tensor in state.items() if not name.startswith("text")}
        weights = to_open_clip(state) | {f"text.transformer.{name}": tensor for name, tensor in words.items()}
        weights["text.proj.weight"] = projection
    else:
        weights = to_open_clip(state)
    weights = {name: tensor.detach().float().contiguous() for name, tensor in weights.items()}
    save_file(weights, out / "open_clip_model.safetensors", metadata={"format": "pt"})
    loaded.tokenizer.to_transformers(out)


def settle_open_clip(written: Path, out: Path) -> None:
    """Before `written` is renamed to `out`: paths inside it are of `out`."""
    if (written / "text_config").is_dir():
        relocate(written, out)


def _hf_text(loaded: LoadedModel) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and weights of transformers' model inside open_clip's text tower."""
    from transformers import MT5Config

    text, own = loaded.recipe.text, text_state(loaded)
    if isinstance(text, BertText):
        return bert_config(loaded, text), bert_state(own)
    assert isinstance(text, T5Text)
    named = rename(own, t5_table(text.mlp), "transformers")
    named["encoder.embed_tokens.weight"] = named.pop("shared.weight")
    # Of the T5s it knows mT5, whose encoder has the arithmetic of any T5 v1.1, and of v1.0 by `feed_forward_proj`.
    return t5_config(loaded, text, MT5Config), {name.removeprefix("encoder."): one for name, one in named.items()}


def model_config(recipe: Recipe, tokenizer: BPETokenizer) -> dict[str, Any]:
    """open_clip's `model_cfg` of a recipe: what `open_clip.model.CLIP(**…)` takes, or CustomTextCLIP for BERT and T5.

    Raises:
        ExportError: open_clip cannot express a tower.
    """
    text, image = recipe.text, recipe.vision
    quick = "quick_gelu"
    activations = {getattr(text, "activation", None) if isinstance(text, TextTransformer) else None,
                   getattr(image, "activation", None)}  # fmt: skip
    if quick in activations and not activations <= {quick, None}:
        raise ExportError("open_clip has QuickGELU in both towers or in none. Export it to onnx")
    return {
        "embed_dim": recipe.joint.embed_dim,
        "vision_cfg": _vision_config(image),
        "text_cfg": {
            "context_length": tokenizer.context_length,
            "vocab_size": tokenizer.vocab_size,
            # Any name makes open_clip take the tokenizer from the directory itself; `lower` is CLIP's own cleaning.
            "hf_tokenizer_name": "clip-train",
            "tokenizer_kwargs": {"clean": "lower"},
            **_text_config(recipe, tokenizer),
        },
        "quick_gelu": quick in activations,
        **({"init_logit_bias": recipe.loss.init_logit_bias} if isinstance(recipe.loss, Sigmoid) else {}),
    }


def _text_config(recipe: Recipe, tokenizer: BPETokenizer) -> dict[str, Any]:
    text = recipe.text
    if isinstance(text, (BertText, T5Text)) and text.pool in _HF_POOLS:
        if tokenizer.pad < 512:
            raise ExportError(
                f"open_clip masks id {tokenizer.pad} as padding, and here it is a byte's too. Export it to onnx"
            )
        return {
            "hf_model_name": "text_config",
            "hf_model_pretrained": False,
            "hf_pooler_type": _HF_POOLS[text.pool],
            "hf_proj_type": "linear",
        }
    if isinstance(text, TextTransformer):
        own: dict[str, Any] = {
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
            "mlp_ratio": text.mlp_ratio,
        }
        if text.norm_eps != 1e-5:
            own["norm_kwargs"] = {"eps": text.norm_eps}
        if text.activation == "gelu_tanh":
            own["act_kwargs"] = {"approximate": "tanh"}
        if text.projection_bias:
            own["proj_bias"] = True
        if text.attention == "causal" and text.pool in ("eot", "last"):
            return own
        if text.padding == "attended" and text.pool in ("eot", "last", "cls"):
            pool = {"eot": "eos", "last": "last", "cls": "first"}[text.pool]
            own |= {"no_causal_mask": True, "pool_type": pool, "pad_id": tokenizer.pad, "eos_id": tokenizer.eot}
            return own
    kind = f"{text.kind} {getattr(text, 'attention', '')}".strip()
    elsewhere = "onnx" if text.pool == "map" else "sentence_transformers or onnx"
    raise ExportError(
        f"open_clip's text towers are causal transformers that pool at EOT, SigLIP's that see padding, BERTs and T5s "
        f"with pool 'cls' or 'mean'; this one is {kind} with pool {text.pool!r}. Export it to {elsewhere}"
    )


def _vision_config(image: VisionTransformer | ResNet | Timm) -> dict[str, Any]:
    match image:
        case VisionTransformer():
            if image.pool != "cls":
                raise ExportError(
                    f"open_clip's ViT pools by a class token; this one has pool {image.pool!r}. Export it to timm, "
                    "transformers or onnx"
                )
            return {
                "image_size": image.image_size,
                "patch_size": image.patch_size,
                "width": image.width,
                "layers": image.layers,
                "head_width": image.width // image.heads,
                "mlp_ratio": image.mlp_ratio,
                **({} if image.pre_norm else {"no_ln_pre": True}),
                **({} if image.norm_eps == 1e-5 else {"norm_kwargs": {"eps": image.norm_eps}}),
                **({"act_kwargs": {"approximate": "tanh"}} if image.activation == "gelu_tanh" else {}),
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
            if not image.arguments.keys() <= {"global_pool"}:
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
                "timm_pool": image.arguments.get("global_pool", ""),
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
