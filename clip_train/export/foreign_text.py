"""Text towers that are transformers' models: the recipe section and our names, of BERT, Megatron-BERT, T5 and mT5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clip_train.errors import CheckpointError
from clip_train.export.open_clip_keys import rename
from clip_train.export.transformers_keys import together
from clip_train.export.transformers_text import BERT, MEGATRON, t5_table

KINDS = ("bert", "megatron-bert", "t5", "mt5")
ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
"""transformers' names and ours."""


def text_from_transformers(
    config: Mapping[str, Any], state: Mapping[str, Tensor], pool: str, where: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`[text]` and the tower's tensors under our names, of a model's configuration and tensors (without a pooler).

    Raises:
        CheckpointError: another kind of model, a choice of which there is no twin, or tensors that have no place.
    """
    kind = config.get("model_type")
    if kind not in KINDS:
        raise CheckpointError(f"{where}: its text tower is {kind!r}; {', '.join(KINDS)} can be imported")
    try:
        if kind in ("t5", "mt5"):
            return _t5(config, state, pool, where)
        return _bert(config, state, pool, where)
    except KeyError as error:
        raise CheckpointError(f"{where}: {error} of its text tower is missing") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def activation(name: str, where: str) -> str:
    """Our name of an activation. Raises CheckpointError where there is none."""
    if name not in ACTIVATIONS:
        raise CheckpointError(f"{where}: activation {name!r}: one of {', '.join(ACTIVATIONS)} can be read")
    return ACTIVATIONS[name]


def _bert(
    config: Mapping[str, Any], state: Mapping[str, Tensor], pool: str, where: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    bert = config["model_type"] == "bert"
    if config.get("is_decoder"):
        raise CheckpointError(f"{where}: a BERT that is a decoder has no place here")
    section = {
        "kind": "bert" if bert else "transformer",
        **({} if bert else {"attention": "bidirectional"}),
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        "activation": activation(config["hidden_act"], where),
        "norm_eps": config["layer_norm_eps"],
        "pool": pool,
    }
    left = {name: tensor for name, tensor in state.items() if not name.endswith(("position_ids", "token_type_ids"))}
    segments = left.pop("embeddings.token_type_embeddings.weight")
    ours = together(rename(left, _inverse(BERT if bert else MEGATRON), "clip-train"))
    if segments[0].any():  # texts of one segment: its vector is part of each position
        ours["positional_embedding"] = ours["positional_embedding"] + segments[0]
    return section, ours


def _t5(
    config: Mapping[str, Any], state: Mapping[str, Tensor], pool: str, where: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    mlp = {"gated-gelu": "gated_gelu", "relu": "relu"}.get(config["feed_forward_proj"])
    if mlp is None:
        raise CheckpointError(
            f"{where}: feed_forward_proj {config['feed_forward_proj']!r}: 'gated-gelu' and 'relu' can be"
        )
    section = {
        "kind": "t5",
        "width": config["d_model"],
        "layers": config["num_layers"],
        "heads": config["num_heads"],
        "head_dim": config["d_kv"],
        "hidden": config["d_ff"],
        "mlp": mlp,
        "buckets": config["relative_attention_num_buckets"],
        "max_distance": config["relative_attention_max_distance"],
        "norm_eps": config["layer_norm_epsilon"],
        "pool": pool,
    }
    left = dict(state)
    tied = left.pop("encoder.embed_tokens.weight", None)
    if tied is not None:
        if "shared.weight" in left and not torch.equal(tied, left["shared.weight"]):
            raise CheckpointError(f"{where}: shared.weight and encoder.embed_tokens.weight differ")
        left["shared.weight"] = tied
    return section, together(rename(left, _inverse(t5_table(mlp)), "clip-train"))


def _inverse(table: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(theirs, ours) for ours, theirs in table]
