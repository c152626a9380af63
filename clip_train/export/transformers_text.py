"""The text tower in transformers: which of its models has the same arithmetic, and our weights under its names.

| tower | model |
|---|---|
| transformer, causal | CLIPTextModel |
| transformer, bidirectional, padding masked | MegatronBertModel, a BERT with its norms where CLIP has them |
| bert | BertModel |
| t5 | T5EncoderModel |
| modern | LlamaModel, bidirectional EuroBertModel |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clip_train.config.schema import BertText, ModernText, T5Text, TextTransformer
from clip_train.errors import ExportError
from clip_train.export.open_clip_keys import rename
from clip_train.export.transformers_keys import apart, to_transformers
from clip_train.loading import LoadedLanguageModel, LoadedModel
from clip_train.models.pooling import FREE_POOLS

Loaded = LoadedModel | LoadedLanguageModel

LINEAR_RANGE = 2.0**-13
"""BERT's pooler is `tanh(dense(x))`. With this times the identity as `dense`, tanh is the identity to the precision of
fp32 (relative error `(x / 8192)^2 / 3`). The projection behind it is divided by it: exactly, it is a power of two."""

_BERT_ATTENTION = [
    ("blocks.#.attention.query.*", "encoder.layer.#.attention.self.query.*"),
    ("blocks.#.attention.key.*", "encoder.layer.#.attention.self.key.*"),
    ("blocks.#.attention.value.*", "encoder.layer.#.attention.self.value.*"),
    ("blocks.#.attention.out.*", "encoder.layer.#.attention.output.dense.*"),
    ("blocks.#.mlp.up.*", "encoder.layer.#.intermediate.dense.*"),
    ("blocks.#.mlp.down.*", "encoder.layer.#.output.dense.*"),
    ("token_embedding.weight", "embeddings.word_embeddings.weight"),
    ("positional_embedding", "embeddings.position_embeddings.weight"),
]
BERT = [
    *_BERT_ATTENTION,
    ("embedding_norm.*", "embeddings.LayerNorm.*"),
    ("blocks.#.attention_norm.*", "encoder.layer.#.attention.output.LayerNorm.*"),
    ("blocks.#.mlp_norm.*", "encoder.layer.#.output.LayerNorm.*"),
]
MEGATRON = [
    *_BERT_ATTENTION,
    ("blocks.#.attention_norm.*", "encoder.layer.#.attention.ln.*"),
    ("blocks.#.mlp_norm.*", "encoder.layer.#.ln.*"),
    ("final_norm.*", "encoder.ln.*"),
]
T5 = [
    ("token_embedding.weight", "shared.weight"),
    ("relative_bias.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    ("blocks.#.attention_norm.weight", "encoder.block.#.layer.0.layer_norm.weight"),
    ("blocks.#.attention.query.weight", "encoder.block.#.layer.0.SelfAttention.q.weight"),
    ("blocks.#.attention.key.weight", "encoder.block.#.layer.0.SelfAttention.k.weight"),
    ("blocks.#.attention.value.weight", "encoder.block.#.layer.0.SelfAttention.v.weight"),
    ("blocks.#.attention.out.weight", "encoder.block.#.layer.0.SelfAttention.o.weight"),
    ("blocks.#.mlp_norm.weight", "encoder.block.#.layer.1.layer_norm.weight"),
    ("blocks.#.mlp.gate.weight", "encoder.block.#.layer.1.DenseReluDense.wi_0.weight"),
    ("blocks.#.mlp.down.weight", "encoder.block.#.layer.1.DenseReluDense.wo.weight"),
    ("final_norm.weight", "encoder.final_layer_norm.weight"),
]
LLAMA = [
    ("token_embedding.weight", "embed_tokens.weight"),
    ("blocks.#.attention_norm.weight", "layers.#.input_layernorm.weight"),
    ("blocks.#.attention.query.weight", "layers.#.self_attn.q_proj.weight"),
    ("blocks.#.attention.key.weight", "layers.#.self_attn.k_proj.weight"),
    ("blocks.#.attention.value.weight", "layers.#.self_attn.v_proj.weight"),
    ("blocks.#.attention.out.weight", "layers.#.self_attn.o_proj.weight"),
    ("blocks.#.mlp_norm.weight", "layers.#.post_attention_layernorm.weight"),
    ("blocks.#.mlp.gate.weight", "layers.#.mlp.gate_proj.weight"),
    ("blocks.#.mlp.up.weight", "layers.#.mlp.up_proj.weight"),
    ("blocks.#.mlp.down.weight", "layers.#.mlp.down_proj.weight"),
    ("final_norm.weight", "norm.weight"),
]


SIGLIP = (
    "transformers has SigLIP's towers only together: loss.kind 'sigmoid'; image.kind 'vit', pool 'map', pre_norm and "
    "projection false; text.padding 'attended', pool 'last', projection_bias true. Export it to open_clip or onnx"
)


@dataclass(frozen=True)
class TextEncoder:
    """A model of transformers and our weights for it."""

    model: Any
    state: dict[str, Tensor]
    """Every parameter of the model."""

    def filled(self) -> Any:
        """The model with the weights in it."""
        self.model.load_state_dict(self.state, strict=True)
        return self.model.eval()


def text_state(loaded: Loaded) -> dict[str, Tensor]:
    """The text tower's tensors without their prefix, query, key and value apart."""
    state = loaded.model.state_dict()
    return apart({name.removeprefix("text."): one for name, one in state.items() if name.startswith("text.")})


def token_encoder(loaded: Loaded) -> TextEncoder:
    """A model whose `last_hidden_state` is what the tower's pool reads.

    Raises:
        ExportError: there is none.
    """
    text = loaded.recipe.text
    match text:
        case TextTransformer():
            if text.attention == "causal":
                return _clip(loaded, text)
            if text.padding == "masked":
                return _bert(loaded, text)
        case BertText():
            return _bert(loaded, text)
        case T5Text():
            return _t5(loaded, text)
        case ModernText():
            return _llama(loaded, text)
        case _:
            raise ExportError(f"text.kind {text.kind!r} is not exported to transformers. Export it to onnx")
    raise ExportError(f"its text tower attends to padding: {SIGLIP}")


def pooled_encoder(loaded: LoadedModel) -> tuple[TextEncoder, float]:
    """A model whose `pooler_output`, divided by the number given, is the tower's pooled vector.

    Raises:
        ExportError: there is none.
    """
    text = loaded.recipe.text
    if isinstance(text, TextTransformer) and text.attention == "causal" and text.pool in ("eot", "last"):
        return _clip(loaded, text), 1.0
    if isinstance(text, TextTransformer) and text.padding == "attended":
        raise ExportError(f"its text tower attends to padding: {SIGLIP}")
    if isinstance(text, (BertText, TextTransformer)) and text.pool == "cls":
        return _bert(loaded, text), LINEAR_RANGE
    kind = f"{text.kind} {getattr(text, 'attention', '')}".strip()
    elsewhere = "sentence_transformers or onnx" if text.pool in FREE_POOLS else "onnx"
    raise ExportError(
        f"transformers' two-tower models pool a causal transformer at EOT and BERTs at their first token; this one is "
        f"{kind} with pool {text.pool!r}. Export it to {elsewhere}"
    )


def clip_text_config(loaded: Loaded) -> Any:
    """CLIPTextConfig of a causal transformer."""
    from transformers import CLIPTextConfig

    text, tokenizer = loaded.recipe.text, loaded.tokenizer
    assert isinstance(text, TextTransformer)
    dim = text.width if loaded.recipe.is_language else loaded.recipe.joint.embed_dim
    return CLIPTextConfig(**_sizes(loaded, text), projection_dim=dim, bos_token_id=tokenizer.sot)


def bert_config(loaded: Loaded, text: BertText | TextTransformer) -> Any:
    """BertConfig, or MegatronBertConfig of a bidirectional transformer; one segment."""
    from transformers import BertConfig, MegatronBertConfig

    kind: Any = BertConfig if isinstance(text, BertText) else MegatronBertConfig
    return kind(**_sizes(loaded, text), type_vocab_size=1)


def t5_config(loaded: Loaded, text: T5Text, kind: Any) -> Any:
    """T5Config or MT5Config."""
    tower: Any = loaded.model.text
    block = tower.blocks[0]
    return kind(
        vocab_size=loaded.tokenizer.vocab_size,
        d_model=text.width,
        d_kv=block.attention.out.in_features // text.heads,
        d_ff=block.mlp.down.in_features,
        num_layers=text.layers,
        num_decoder_layers=1,
        num_heads=text.heads,
        relative_attention_num_buckets=text.buckets,
        relative_attention_max_distance=text.max_distance,
        layer_norm_epsilon=text.norm_eps,
        feed_forward_proj={"gated_gelu": "gated-gelu", "relu": "relu"}[text.mlp],
        pad_token_id=loaded.tokenizer.pad,
        eos_token_id=loaded.tokenizer.eot,
    )


def t5_table(mlp: str) -> list[tuple[str, str]]:
    """Names of T5EncoderModel; `up` is the second of the gated MLP's two matrices."""
    up = "wi_1" if mlp == "gated_gelu" else "wi"
    return [*T5, ("blocks.#.mlp.up.weight", f"encoder.block.#.layer.1.DenseReluDense.{up}.weight")]


def bert_state(state: Mapping[str, Tensor], table: list[tuple[str, str]] = BERT) -> dict[str, Tensor]:
    """Weights of a BertModel without pooler; the vector of its one segment is zero."""
    renamed = rename(state, table, "transformers")
    segment = torch.zeros(1, state["token_embedding.weight"].shape[1])
    return renamed | {"embeddings.token_type_embeddings.weight": segment}


def hidden_act(activation: str) -> str:
    """transformers' name of an activation."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)


def _sizes(loaded: Loaded, text: BertText | TextTransformer) -> dict[str, Any]:
    tokenizer = loaded.tokenizer
    return {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": int(text.width * text.mlp_ratio),
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "max_position_embeddings": tokenizer.context_length,
        "hidden_act": hidden_act(text.activation),
        "layer_norm_eps": text.norm_eps,
        "pad_token_id": tokenizer.pad,
        "eos_token_id": tokenizer.eot,
    }


def _clip(loaded: Loaded, text: TextTransformer) -> TextEncoder:
    from transformers import CLIPTextModel

    state = {name: tensor for name, tensor in loaded.model.state_dict().items() if name.startswith("text.")}
    named = {name.removeprefix("text_model."): one for name, one in to_transformers(state).items()}
    return TextEncoder(CLIPTextModel(clip_text_config(loaded)), named)


def _bert(loaded: Loaded, text: BertText | TextTransformer) -> TextEncoder:
    from transformers import BertModel, MegatronBertModel

    bert = isinstance(text, BertText)
    model: Any = BertModel if bert else MegatronBertModel
    state = bert_state(text_state(loaded), BERT if bert else MEGATRON)
    state["pooler.dense.weight"] = LINEAR_RANGE * torch.eye(text.width)
    state["pooler.dense.bias"] = torch.zeros(text.width)
    return TextEncoder(model(bert_config(loaded, text)), state)


def _t5(loaded: Loaded, text: T5Text) -> TextEncoder:
    from transformers import T5Config, T5EncoderModel

    state = rename(text_state(loaded), t5_table(text.mlp), "transformers")
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    return TextEncoder(T5EncoderModel(t5_config(loaded, text, T5Config)), state)


def _llama(loaded: Loaded, text: ModernText) -> TextEncoder:
    from transformers import EuroBertConfig, EuroBertModel, LlamaConfig, LlamaModel

    tower: Any = loaded.model.text
    causal = text.attention == "causal"
    kind: Any = LlamaConfig if causal else EuroBertConfig
    config = kind(
        vocab_size=loaded.tokenizer.vocab_size,
        hidden_size=text.width,
        intermediate_size=tower.blocks[0].mlp.down.in_features,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        num_key_value_heads=text.heads,
        max_position_embeddings=loaded.tokenizer.context_length,
        rms_norm_eps=text.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_base},
        pad_token_id=loaded.tokenizer.pad,
        bos_token_id=loaded.tokenizer.sot,
        eos_token_id=loaded.tokenizer.eot,
        **({} if causal else {"mask_token_id": loaded.tokenizer.mask}),
    )
    model: Any = LlamaModel if causal else EuroBertModel
    return TextEncoder(model(config), rename(text_state(loaded), LLAMA, "transformers"))
