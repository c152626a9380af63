"""Reading what open_clip writes and loads: state dicts, and directories with their configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from clip_train.errors import CheckpointError
from clip_train.export.foreign_files import read_json, read_tensors
from clip_train.export.foreign_parts import Parts
from clip_train.export.foreign_text import text_from_transformers
from clip_train.export.open_clip_keys import from_open_clip
from clip_train.export.shapes import image_section, text_section

_FOREIGN_SCALARS = ("input_resolution", "context_length", "vocab_size")  # of OpenAI's archives, no parameters
_HF_POOLS = {"cls_last_hidden_state_pooler": "cls", "mean_pooler": "mean"}
_POOLS = {"argmax": "eot", "eos": "eot", "last": "last", "first": "cls"}
# Settings of which there is one value here; others, and what only training or loading reads, may be anything.
_FIXED_IMAGE: dict[str, Any] = {
    "ls_init_value": None, "attentional_pool": False, "pos_embed_type": "learnable",
    "final_ln_after_pool": False, "pool_type": "tok", "block_type": None,
    "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False, "scale_attn_inner": False,
    "scale_attn": False, "scale_fc": False, "timm_proj": "linear", "timm_proj_bias": False,
}  # fmt: skip
_FIXED_TEXT: dict[str, Any] = {
    "ls_init_value": None, "embed_cls": False, "final_ln_after_pool": False, "proj_type": "linear", "block_type": None,
    "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False, "scale_attn_inner": False,
    "scale_attn": False, "scale_fc": False, "hf_proj_type": "linear",
}  # fmt: skip


def read_open_clip(path: Path) -> Parts:
    """Read what `local-dir:` loads.

    Raises:
        CheckpointError: no weights, a setting of which there is no twin here, or tensors that have no place.
    """
    config = read_json(path / "open_clip_config.json")
    model, look = config["model_cfg"], dict(config.get("preprocess_cfg", {}))
    files = [path / name for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")]
    found = [file for file in files if file.is_file()]
    if not found:
        raise CheckpointError(f"{path}: neither {files[0].name} nor {files[1].name} is there")
    vision, text = model["vision_cfg"], model["text_cfg"]
    if "multimodal_cfg" in model:
        raise CheckpointError(f"{path}: a CoCa (multimodal_cfg) has no place here")
    _check(path, "vision_cfg", vision, _FIXED_IMAGE)
    _check(path, "text_cfg", text, _FIXED_TEXT)
    activation = "quick_gelu" if model.get("quick_gelu", False) else "gelu"
    tensors = read_tensors(found[0])
    if text.get("hf_model_name"):
        words, section = _hf_text(path, text, tensors)
        state = renamed(found[0], {name: one for name, one in tensors.items() if not name.startswith("text.")})
        state |= {f"text.{name}": tensor for name, tensor in words.items()}
        state["text_projection.weight"] = tensors["text.proj.weight"]
    else:
        state = renamed(found[0], tensors)
        section = _native_text(path, text, state, activation)
    preprocess = {ours: look[theirs] for ours, theirs in (("mean", "mean"), ("std", "std"), ("resize", "resize_mode"),
                  ("interpolation", "interpolation")) if theirs in look}  # fmt: skip
    return Parts(state, _image(path, vision, state, activation), section, preprocess, text.get("context_length", 77))


def renamed(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of open_clip or OpenAI under our names.

    Raises:
        CheckpointError: tensors that have no place; each is named.
    """
    # Other programs' wrappers leave their names behind; `custom_text` models keep the text tower under `text.`.
    plain = {_without_wrappers(name): tensor for name, tensor in state.items()}
    plain = {name.removeprefix("text."): tensor for name, tensor in plain.items()}
    try:
        return from_open_clip(
            {name: value for name, value in plain.items() if name not in (*_FOREIGN_SCALARS, "attn_mask")}
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check(path: Path, table: str, given: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for key, value in fixed.items():
        if given.get(key, value) != value and not (not given[key] and not value):
            raise CheckpointError(f"{path}: {table}.{key} = {given[key]!r}; only {value!r} can be imported")


def _image(path: Path, vision: Mapping[str, Any], state: dict[str, Tensor], activation: str) -> dict[str, Any]:
    if vision.get("timm_model_name"):
        section = {"kind": "timm", "name": vision["timm_model_name"], "image_size": vision["image_size"]}
        return section | ({"arguments": {"global_pool": vision["timm_pool"]}} if vision.get("timm_pool") else {})
    width = vision.get("width", 768)
    across = width if isinstance(vision.get("layers", 12), int) else width * 32
    return image_section(state, across // vision.get("head_width", 64), activation) | _variant(path, vision, activation)


def _native_text(path: Path, text: Mapping[str, Any], state: dict[str, Tensor], activation: str) -> dict[str, Any]:
    section = text_section(state, text.get("heads"), activation)
    section |= _variant(path, text, activation)
    section |= {"projection_bias": True} if "text_projection.bias" in state else {}
    if (pool := text.get("pool_type", "argmax")) not in _POOLS:
        raise CheckpointError(f"{path}: text_cfg.pool_type = {pool!r}; one of {', '.join(_POOLS)} can be imported")
    section["pool"] = _POOLS[pool]
    return section | ({"attention": "bidirectional", "padding": "attended"} if text.get("no_causal_mask") else {})


def _variant(path: Path, given: Mapping[str, Any], activation: str) -> dict[str, Any]:
    """Keys of a section for the activation and the norms of a tower, where they are not CLIP's."""
    section: dict[str, Any] = {}
    if act := given.get("act_kwargs"):
        if act != {"approximate": "tanh"} or activation != "gelu":
            raise CheckpointError(f"{path}: act_kwargs = {act!r}; only the tanh approximation of GELU can be imported")
        section["activation"] = "gelu_tanh"
    if norm := given.get("norm_kwargs"):
        if norm.keys() != {"eps"}:
            raise CheckpointError(f"{path}: norm_kwargs = {norm!r}; only eps can be imported")
        section["norm_eps"] = norm["eps"]
    return section


def _hf_text(
    path: Path, text: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and section of a tower that is transformers' model, whose shape our export keeps in `text_config/`."""
    folders = [path / "text_config", Path(text["hf_model_name"])]
    file = next((folder / "config.json" for folder in folders if (folder / "config.json").is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{path}: the shape of its text tower is {text['hf_model_name']!r}: put that model's config.json into "
            f"{folders[0]}"
        )
    pool = _HF_POOLS.get(text.get("hf_pooler_type", "mean_pooler"))
    if pool is None or "text.proj.weight" not in tensors:
        raise CheckpointError(
            f"{path}: such a text tower can be imported with hf_pooler_type {' or '.join(_HF_POOLS)} and hf_proj_type "
            "'linear'"
        )
    config, prefix = read_json(file), "text.transformer."
    own = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
    if config.get("model_type") in ("t5", "mt5"):
        own = {f"encoder.{name}": tensor for name, tensor in own.items()}
    section, words = text_from_transformers(config, own, pool, str(file))
    return words, section


def _without_wrappers(name: str) -> str:
    name = name.removeprefix("module.")
    for wrapper in ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")
