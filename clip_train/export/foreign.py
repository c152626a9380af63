"""Reading checkpoints from elsewhere: open_clip directories, state dicts, OpenAI's archives, transformers directories.

Nothing is unpickled that could run code: safetensors; pickles of tensors only (`weights_only`); TorchScript archives,
whose reader builds tensors and TorchScript objects, never Python ones.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clip_train.errors import CheckpointError
from clip_train.export.open_clip_keys import from_open_clip
from clip_train.export.shapes import image_section, text_section
from clip_train.export.transformers_keys import from_transformers
from tokenizer import BPETokenizer

_OPENAI_IDS = 49408
_FOREIGN_SCALARS = ("input_resolution", "context_length", "vocab_size")  # of OpenAI's archives, no parameters


@dataclass(frozen=True)
class Foreign:
    """A model from elsewhere, under our names."""

    state: dict[str, Tensor]
    """fp32."""
    sections: dict[str, Any]
    """Recipe sections `image`, `text`, `model`, `preprocess`."""
    tokenizer: BPETokenizer


def read_foreign(path: Path, *, quick_gelu: bool, vocabulary: Path | None) -> Foreign:
    """Read a model by what the path holds.

    Args:
        quick_gelu: a bare state dict's activation; directories and OpenAI's archives say it themselves.
        vocabulary: a vocabulary JSON or merges file; by default what lies in the directory, or OpenAI's for 49,408 ids.

    Raises:
        CheckpointError: there is nothing that can be read, it could run code, tensors are missing or of no use, or the
            vocabulary is of another size.
    """
    if (path / "open_clip_config.json").is_file():
        return _open_clip_directory(path, vocabulary)
    if (path / "config.json").is_file():
        return _transformers_directory(path, vocabulary)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: neither a file of weights nor a directory with open_clip_config.json or config.json"
        )
    archive = _is_torchscript(path)
    state = _read_tensors(path)
    return _assemble(path, _from_open_clip(path, state), {}, quick_gelu or archive, vocabulary, preprocess={})


def _open_clip_directory(path: Path, vocabulary: Path | None) -> Foreign:
    config = _json(path / "open_clip_config.json")
    model, look = config["model_cfg"], dict(config.get("preprocess_cfg", {}))
    files = [path / name for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")]
    found = [file for file in files if file.is_file()]
    if not found:
        raise CheckpointError(f"{path}: neither {files[0].name} nor {files[1].name} is there")
    vision, text = model["vision_cfg"], model["text_cfg"]
    if text.get("hf_model_name"):
        raise CheckpointError(
            f"{path}: its text tower is transformers' {text['hf_model_name']}, which has no place here"
        )
    heads: dict[str, Any] = {"text": text.get("heads")}
    image: dict[str, Any] = {}
    if vision.get("timm_model_name"):
        image = {"kind": "timm", "name": vision["timm_model_name"], "image_size": vision["image_size"]}
    elif isinstance(vision.get("layers"), int):
        heads["image"] = vision["width"] // vision.get("head_width", 64)
    else:
        heads["image"] = vision["width"] * 32 // vision.get("head_width", 64)
    preprocess = {ours: look[theirs] for ours, theirs in (("mean", "mean"), ("std", "std"), ("resize", "resize_mode"),
                  ("interpolation", "interpolation")) if theirs in look}  # fmt: skip
    state = _from_open_clip(found[0], _read_tensors(found[0]))
    quick = bool(model.get("quick_gelu", False))
    return _assemble(path, state, heads, quick, vocabulary, preprocess=preprocess, image=image)


def _transformers_directory(path: Path, vocabulary: Path | None) -> Foreign:
    config = _json(path / "config.json")
    if config.get("model_type") != "clip":
        raise CheckpointError(f"{path}: model_type is {config.get('model_type')!r}; only 'clip' can be imported")
    file = path / "model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{path}: there is no model.safetensors (pickles of transformers are not read)")
    text, vision = config["text_config"], config["vision_config"]
    activations = {text.get("hidden_act", "quick_gelu"), vision.get("hidden_act", "quick_gelu")}
    if not activations <= {"gelu", "quick_gelu"} or len(activations) > 1:
        raise CheckpointError(
            f"{path}: activations {sorted(activations)}: 'gelu' or 'quick_gelu' in both towers can be read"
        )
    state = {name: tensor for name, tensor in _read_tensors(file).items() if not name.endswith(".position_ids")}
    try:
        ours = from_transformers(state)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    heads = {"text": text.get("num_attention_heads", 8), "image": vision.get("num_attention_heads", 12)}
    return _assemble(path, ours, heads, activations == {"quick_gelu"}, vocabulary, preprocess=_hf_view(path))


def _hf_view(path: Path) -> dict[str, Any]:
    """`preprocess` of an image processor's file."""
    file = path / "preprocessor_config.json"
    if not file.is_file():
        return {}
    view = _json(file)
    resample = {2: "bilinear", 3: "bicubic"}.get(int(view.get("resample", 3)))
    if resample is None:
        raise CheckpointError(f"{file}: resample = {view['resample']}: 2 (bilinear) or 3 (bicubic) can be read")
    resize = "shortest" if view.get("do_center_crop", True) else "squash"
    return {"mean": view["image_mean"], "std": view["image_std"], "interpolation": resample, "resize": resize}


def _assemble(
    path: Path,
    state: dict[str, Tensor],
    heads: Mapping[str, int | None],
    quick_gelu: bool,
    vocabulary: Path | None,
    *,
    preprocess: dict[str, Any],
    image: dict[str, Any] | None = None,
) -> Foreign:
    needed = ("text.token_embedding.weight", "text.positional_embedding", "image_projection.weight", "logit_scale")
    if missing := [name for name in needed if name not in state]:
        raise CheckpointError(f"{path}: not a CLIP: {', '.join(missing)} (in our names) missing")
    state = {name: tensor.float() for name, tensor in state.items()}
    ids, cap = state["text.token_embedding.weight"].shape[0], state["text.positional_embedding"].shape[0]
    found = {
        "image": image or image_section(state, heads.get("image"), quick_gelu=quick_gelu),
        "text": text_section(state, heads.get("text"), quick_gelu=quick_gelu),
        "model": {"embed_dim": state["image_projection.weight"].shape[0]},
        "preprocess": preprocess,
    }
    return Foreign(state, found, _tokenizer(path, ids, cap, vocabulary))


def _tokenizer(path: Path, ids: int, cap: int, vocabulary: Path | None) -> BPETokenizer:
    try:
        if vocabulary is not None:
            name = vocabulary.name
            openai = name.endswith((".txt", ".txt.gz"))
            found = BPETokenizer.from_openai(vocabulary, cap) if openai else BPETokenizer.load(vocabulary, cap)
        elif path.is_dir() and (path / "tokenizer.json").is_file():
            found = BPETokenizer.from_transformers(path)
        elif ids == _OPENAI_IDS:
            found = BPETokenizer.from_openai(_openai_merges(), cap)
        else:
            raise CheckpointError(f"{path}: {ids:,} ids and no tokenizer beside them: give --vocabulary FILE")
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: its vocabulary: {error}") from error
    if found.vocab_size != ids or found.context_length != cap:
        raise CheckpointError(
            f"{path}: its embedding has {ids:,} ids and {cap} positions, the vocabulary {found.vocab_size:,} and "
            f"{found.context_length}: another vocabulary. Give --vocabulary FILE"
        )
    return found


def _openai_merges() -> str:
    try:
        from open_clip.tokenizer import default_bpe
    except ImportError:
        raise CheckpointError(
            "OpenAI's merges come with open_clip: pip install 'clip-train[export]', or give --vocabulary FILE"
        ) from None
    return str(default_bpe())


def _from_open_clip(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    # Other programs' wrappers leave their names behind; `custom_text` models keep the text tower under `text.`.
    plain = {_without_wrappers(name): tensor for name, tensor in state.items()}
    plain = {name.removeprefix("text."): tensor for name, tensor in plain.items()}
    try:
        return from_open_clip(
            {name: value for name, value in plain.items() if name not in (*_FOREIGN_SCALARS, "attn_mask")}
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _without_wrappers(name: str) -> str:
    for prefix in ("module.", "_orig_mod.", "module."):
        name = name.removeprefix(prefix)
    return name.replace("._orig_mod.", ".")


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """A flat dict of tensors, also from `{"state_dict": …}`.

    Raises:
        CheckpointError: damaged, or a pickle with more than tensors in it.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if _is_torchscript(path):
            module: Any = torch.jit.load(str(path), map_location="cpu")  # pyright: ignore
            return {**module.state_dict()}
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path}: not a whole file of weights ({str(error)[:200]})") from error
    except Exception as error:  # UnpicklingError and its kin: `weights_only` met something that is no tensor
        raise CheckpointError(
            f"{path}: holds more than tensors, which could run code when it is loaded: {str(error)[:200]}. Save its "
            "state dict as safetensors where you trust it"
        ) from error
    if isinstance(content, dict) and "state_dict" in content:
        content = cast("dict[str, Any]", content)["state_dict"]
    if not isinstance(content, dict) or not all(
        isinstance(one, Tensor) for one in cast("dict[str, Any]", content).values()
    ):
        raise CheckpointError(f"{path}: not a state dict (names and tensors, or those under 'state_dict')")
    return cast("dict[str, Tensor]", content)


def _json(path: Path) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({error})") from error
