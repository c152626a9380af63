"""A language model in transformers: a directory for BertForMaskedLM, or for the encoder alone.

| tower | head | what is written |
|---|---|---|
| bert | mlm | BertForMaskedLM, logits and all |
| any other that transformers has (`transformers_text.py`) | | its encoder alone: our heads' bias has no place there |

It is proved as other exports are: read again by the library, and compared before the folder is there.

Shapes: `N` captions, `L` longest of them, `W` width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clip_train.config.schema import BertText
from clip_train.errors import ExportError
from clip_train.export.open_clip_keys import rename
from clip_train.export.parity import PROBES, Parity, check_gap, check_ids
from clip_train.export.transformers_text import BERT, bert_config, bert_state, text_state, token_encoder
from clip_train.loading import LoadedLanguageModel
from clip_train.models.language import BertHead
from clip_train.models.packing import take_rows

HEAD = [
    ("head.dense.*", "cls.predictions.transform.dense.*"),
    ("head.norm.*", "cls.predictions.transform.LayerNorm.*"),
    ("head.bias", "cls.predictions.bias"),
]


def write_language(loaded: LoadedLanguageModel, out: Path) -> None:
    """Write config, weights and tokenizer into an existing folder.

    Raises:
        ExportError: transformers has no model of the same arithmetic.
    """
    text = loaded.recipe.text
    if isinstance(text, BertText) and is_masked_lm(loaded):
        from transformers import BertForMaskedLM

        model: Any = BertForMaskedLM(bert_config(loaded, text))
        model.load_state_dict(_masked_lm_state(loaded), strict=True)
    else:
        model = token_encoder(loaded).filled()
    model.save_pretrained(out)
    loaded.tokenizer.to_transformers(out)


def is_masked_lm(loaded: LoadedLanguageModel) -> bool:
    """Whether transformers' BERT has the same head: its activation and norm are those of the tower there."""
    text = loaded.recipe.text
    same = isinstance(text, BertText) and text.activation == "gelu" and text.norm_eps == 1e-12
    return same and isinstance(loaded.model.head, BertHead)


def class_of(loaded: LoadedLanguageModel) -> Any:
    """transformers' class of what is written. (Its AutoModel makes a whole encoder-decoder of T5's encoder.)"""
    from transformers import BertForMaskedLM

    return BertForMaskedLM if is_masked_lm(loaded) else type(token_encoder(loaded).model)


def _masked_lm_state(loaded: LoadedLanguageModel) -> dict[str, Tensor]:
    state = {f"bert.{name}": one for name, one in bert_state(text_state(loaded), BERT).items()}
    head = {name: one for name, one in loaded.model.state_dict().items() if name.startswith("head.")}
    state |= rename(head, HEAD, "transformers")
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"]
    state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"]
    return state


@torch.inference_mode()
def prove_language(loaded: LoadedLanguageModel, out: Path, captions: Sequence[str] = PROBES) -> Parity:
    """Token ids, and every token's vector (of a masked language model its logits), scaled to unit length.

    Raises:
        ExportError: ids differ, or a coordinate by more than `parity.TOLERANCE`.
    """
    from transformers import AutoTokenizer

    from tokenizer.cleaning import clean

    tokenizer: Any = AutoTokenizer.from_pretrained(out, local_files_only=True)
    cleaned = [clean(caption) for caption in captions]
    check_ids(loaded.tokenizer, captions, tokenizer(cleaned, truncation=True)["input_ids"])
    masked = is_masked_lm(loaded)
    model: Any = class_of(loaded).from_pretrained(out, local_files_only=True).eval()
    inputs: Mapping[str, Tensor] = tokenizer(cleaned, truncation=True, padding=True, return_tensors="pt")
    output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    theirs: Tensor = output.logits if masked else output.last_hidden_state  # (N, L, ...)

    ids, lengths = loaded.tokenizer.encode_batch(list(captions))
    grid = torch.from_numpy(loaded.tokenizer.padded(ids, lengths)).long()
    counts = torch.from_numpy(lengths).long()
    at = (torch.arange(grid.shape[1]) < counts[:, None]).flatten().nonzero()[:, 0]
    ours = loaded.model(grid, counts, at) if masked else take_rows(loaded.model.text(grid, counts).tokens, at)
    there = theirs[:, : grid.shape[1]].flatten(0, 1)[at]
    gap = check_gap("tokens", F.normalize(ours.float(), dim=-1), F.normalize(there, dim=-1))
    return Parity(None, gap, len(captions))


def refuse_target(target: str) -> None:
    """Raises ExportError for a library that takes pairs of towers only."""
    if target != "transformers":
        raise ExportError(f"a language model is exported to transformers, not to {target}: it takes no pictures")
