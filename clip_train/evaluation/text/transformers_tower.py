"""Text towers of transformers directories: anything `AutoModel` reads, the text towers of its CLIPs, T5's encoders.

Nothing is downloaded. A directory needs its weights and its tokenizer.

Shapes: `B` texts, `L` tokens of the longest, `W` width, `D` of the joint space.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from clip_train.errors import CheckpointError
from clip_train.evaluation.text.encoder import Sequences
from clip_train.loading import Weights
from clip_train.models.base import TowerOutput
from clip_train.models.pooling import FreePool, pool_tokens

LONGEST = 128
"""Tokens of a text at most, as in Chen et al. 2023; less where the model's positions end before."""
_TOKENIZER_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer.model",
)  # fmt: skip
_CLIPS = ("clip", "clip_text_model")
_T5S = ("t5", "mt5", "umt5")


class TransformersTower:
    """A transformers encoder with its tokenizer and its own encoding of pairs.

    Args:
        own: the pool it was trained with, or the usual one of its kind.
        projection: CLIP's, behind the own pool.
        clean: what a text goes through before the tokenizer.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        own: FreePool,
        longest: int,
        projection: nn.Module | None = None,
        clean: Callable[[str], str] | None = None,
    ) -> None:
        self.module, self.tokenizer, self.longest, self.projection = model, tokenizer, longest, projection
        self.own: FreePool = own
        self.weights: Weights | None = None
        self.step: int | None = None  # no file of theirs says
        self._clean = clean
        config: Any = model.config
        self.width = int(getattr(config, "hidden_size", None) or config.d_model)
        self.pad = int(tokenizer.pad_token_id or 0)
        found = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        self.eot_id = None if found is None else int(found)
        eot = () if self.eot_id is None else ("eot",)
        self.free_pools = (*eot, "last", "cls", "mean", "max")
        self._takes_types = bool(getattr(config, "type_vocab_size", 0) or 0) and _takes(model, "token_type_ids")

    def tokenise(self, first: Sequence[str], second: Sequence[str] | None) -> Sequences:
        """The tokenizer's own encoding, of pairs too; of two the longer one is cut first."""
        texts = [list(part) for part in (first, second) if part is not None]
        if self._clean is not None:
            texts = [list(map(self._clean, part)) for part in texts]
        with_types = self._takes_types
        found = self.tokenizer(
            *texts, truncation="longest_first" if second is not None else True, max_length=self.longest,
            return_token_type_ids=with_types, return_attention_mask=False,
        )  # fmt: skip
        ids: list[list[int]] = [list(map(int, row)) or [self.pad] for row in found["input_ids"]]
        whole = self.tokenizer(*texts, return_attention_mask=False, verbose=False)["input_ids"]
        cut = sum(len(long) > len(short) for long, short in zip(whole, ids, strict=True))
        types = [list(map(int, row)) for row in found["token_type_ids"]] if with_types else None
        return Sequences(ids, types, cut)

    def run(self, ids: Tensor, lengths: Tensor, types: Tensor | None) -> TowerOutput:
        valid = torch.arange(ids.shape[1], device=ids.device) < lengths.to(ids.device)[:, None]
        more = {} if types is None else {"token_type_ids": types}
        tokens: Tensor = self.module(input_ids=ids, attention_mask=valid.long(), **more).last_hidden_state
        return TowerOutput(tokens, valid, pool_tokens(tokens, valid, ids, self.eot_id, self.own))

    def project(self, pooled: Tensor) -> Tensor | None:
        return None if self.projection is None else self.projection(pooled)


def open_tower(path: Path) -> TransformersTower:
    """The encoder of a directory.

    Raises:
        CheckpointError: transformers is not installed; no tokenizer, no weights, or not all of them; the tokenizer has
            ids that the model's table lacks.
    """
    try:
        import transformers as library
    except ImportError:
        raise CheckpointError(f"{path}: needs transformers: pip install 'clip-train[probe]'") from None
    transformers: Any = library
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{path}: there is no tokenizer (none of {', '.join(_TOKENIZER_FILES)}): save it there with "
            "tokenizer.save_pretrained"
        )
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # poolers that it lacks are not used here
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        tokenizer.padding_side = "right"
        model, projection = _load(transformers, path, config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"{path}: transformers cannot read it: {error}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    rows = int(cast("Any", model).get_input_embeddings().num_embeddings)
    if len(tokenizer) > rows:
        raise CheckpointError(f"{path}: its tokenizer has {len(tokenizer):,} ids, its model {rows:,}: not a pair")
    positions = int(getattr(cast("Any", model).config, "max_position_embeddings", 0) or LONGEST)
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= 2  # the first two are padding's
    longest = min(LONGEST, positions, int(tokenizer.model_max_length))
    return TransformersTower(model, tokenizer, _own_pool(path, config, tokenizer, projection), longest, projection)


def _load(transformers: Any, path: Path, config: Any) -> tuple[nn.Module, nn.Module | None]:
    """The encoder, and CLIP's projection where it has one."""
    clip = config.model_type in _CLIPS
    if clip:
        kind = transformers.CLIPTextModelWithProjection
    else:  # AutoModel would make T5's decoder, too, which a directory of its encoder alone lacks
        kind = transformers.AutoModelForTextEncoding if config.model_type in _T5S else transformers.AutoModel
    # What is probed, and fine-tuned, computes in one type, whatever the directory was saved in.
    model, said = kind.from_pretrained(path, local_files_only=True, dtype=torch.float32, output_loading_info=True)
    missing = {name for name in said["missing_keys"] if "pooler" not in name}
    # A CLIPTextModel, as in pipelines of diffusers, was saved without the projection.
    bare = config.model_type == "clip_text_model" and "CLIPTextModelWithProjection" not in (config.architectures or ())
    without = bare and "text_projection.weight" in missing
    if without:
        missing.remove("text_projection.weight")
    if missing:
        raise CheckpointError(f"{path}: weights are missing: {', '.join(sorted(missing)[:5])}")
    if clip:
        return model.text_model, None if without else model.text_projection
    if getattr(config, "is_encoder_decoder", False) and config.model_type not in _T5S:
        return model.get_encoder(), None
    if not hasattr(model, "get_input_embeddings") or hasattr(model, "vision_model"):
        raise CheckpointError(f"{path}: model_type {config.model_type!r} is no text encoder that can be read")
    return model, None


def _own_pool(
    path: Path, config: Any, tokenizer: Any, projection: nn.Module | None
) -> Literal["eot", "last", "cls", "mean", "max"]:
    """Of a CLIP the first EOT; of sentence-transformers what it says; of T5's kind the mean; of decoders the last
    token; of all others the first, without BERT's pooler, which was trained for another task (RoBERTa's never was)."""
    if projection is not None:
        return "eot"
    said = path / "1_Pooling" / "config.json"
    if said.is_file():
        modes = json.loads(said.read_text(encoding="utf-8"))
        for key, pool in (("mean", "mean"), ("cls", "cls"), ("max", "max"), ("last", "last")):
            if modes.get("pooling_mode") == pool or any(
                value is True and name.startswith(f"pooling_mode_{key}") for name, value in modes.items()
            ):
                return pool  # pyright: ignore[reportReturnType]
    if config.model_type in _CLIPS:
        return "eot"
    if getattr(config, "is_encoder_decoder", False) or config.model_type in _T5S:
        return "mean"
    return "last" if tokenizer.cls_token_id is None else "cls"


def _takes(model: nn.Module, name: str) -> bool:
    import inspect

    return name in inspect.signature(model.forward).parameters
