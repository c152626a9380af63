"""Models from elsewhere: open_clip's directories, state dicts, OpenAI's archives, transformers' directories."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clip_train.errors import CheckpointError
from clip_train.export.foreign_files import is_torchscript, read_tensors
from clip_train.export.foreign_open_clip import read_open_clip, renamed
from clip_train.export.foreign_parts import Parts
from clip_train.export.foreign_transformers import read_transformers
from clip_train.export.shapes import image_section, text_section
from tokenizer import BPETokenizer
from tokenizer.vocabulary import OPENAI_CONTEXT

_OPENAI_IDS = 49408


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
    for name, read in (("open_clip_config.json", read_open_clip), ("config.json", read_transformers)):
        if (path / name).is_file():
            try:
                return _assemble(path, read(path), vocabulary)
            except KeyError as error:
                raise CheckpointError(f"{path}: {error} is neither in {name} nor among the tensors") from error
    if not path.is_file():
        raise CheckpointError(
            f"{path}: neither a file of weights nor a directory with open_clip_config.json or config.json"
        )
    quick_gelu = quick_gelu or is_torchscript(path)
    state = renamed(path, read_tensors(path))
    needed = ("text.token_embedding.weight", "text.positional_embedding", "image_projection.weight", "logit_scale")
    if missing := [name for name in needed if name not in state]:
        raise CheckpointError(f"{path}: not a CLIP: {', '.join(missing)} (in our names) missing")
    activation = "quick_gelu" if quick_gelu else "gelu"
    image, text = image_section(state, None, activation), text_section(state, None, activation)
    return _assemble(path, Parts(state, image, text, {}), vocabulary)


def _assemble(path: Path, parts: Parts, vocabulary: Path | None) -> Foreign:
    needed = ("text.token_embedding.weight", "logit_scale", "text_projection.weight")
    if missing := [name for name in needed if name not in parts.state]:
        raise CheckpointError(f"{path}: not a CLIP: {', '.join(missing)} (in our names) missing")
    state = {name: tensor.float() for name, tensor in parts.state.items()}
    positions = state.get("text.positional_embedding")
    cap = parts.context_length if positions is None else positions.shape[0]
    sections = {
        "image": parts.image,
        "text": parts.text,
        "model": {"embed_dim": state["text_projection.weight"].shape[0]},
        "preprocess": parts.preprocess,
    }
    tokenizer = _tokenizer(path, state["text.token_embedding.weight"].shape[0], cap, vocabulary)
    return Foreign(state, sections, tokenizer)


def _tokenizer(path: Path, ids: int, cap: int | None, vocabulary: Path | None) -> BPETokenizer:
    try:
        if vocabulary is not None:
            name = vocabulary.name
            openai = name.endswith((".txt", ".txt.gz"))
            found = (
                BPETokenizer.from_openai(vocabulary, cap or OPENAI_CONTEXT)
                if openai
                else BPETokenizer.load(vocabulary, cap)
            )
        elif path.is_dir() and (path / "tokenizer.json").is_file():
            found = BPETokenizer.from_transformers(path)
        elif ids == _OPENAI_IDS:
            found = BPETokenizer.from_openai(_openai_merges(), cap or OPENAI_CONTEXT)
        else:
            raise CheckpointError(f"{path}: {ids:,} ids and no tokenizer beside them: give --vocabulary FILE")
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: its vocabulary: {error}") from error
    cap = cap or found.context_length
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
