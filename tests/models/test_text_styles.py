"""BERT's, T5's and Llama's arithmetic, against transformers' models with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clip_train.models.bert import BertText
from clip_train.models.modern import ModernText
from clip_train.models.t5 import T5Text
from clip_train.models.text import TextTransformer
from clip_train.models.text_tower import TextTower

V, L, W, EOT = 60, 40, 48, 3
SIZES: dict[str, Any] = {"vocab_size": V, "hidden_size": W, "num_hidden_layers": 3, "num_attention_heads": 4}
LENGTHS = torch.tensor([5, 2, 40, 1, 17])


def captions(pad: int = 7) -> Tensor:
    ids = torch.randint(4, V, (len(LENGTHS), L), generator=torch.Generator().manual_seed(2))
    ids[torch.arange(L) >= LENGTHS[:, None]] = pad
    ids[torch.arange(len(LENGTHS)), LENGTHS - 1] = EOT
    return ids


def scramble(model: nn.Module) -> None:
    """No gain of one and no bias of zero: a mixed-up name would show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def assert_parity(ours: TextTower, theirs: Any, weights: dict[str, Tensor]) -> None:
    """Tokens within 1e-5 where they are valid, packed and in a grid."""
    ours.load_state_dict(weights)
    ids = captions()
    valid = torch.arange(L) < LENGTHS[:, None]
    expected = theirs.eval()(input_ids=ids, attention_mask=valid.long()).last_hidden_state
    for packed in (True, False):
        ours.packed = packed
        found = ours(ids, LENGTHS)
        assert torch.equal(found.valid, valid)
        assert (found.tokens - expected)[valid].abs().max() <= 1e-5, f"packed={packed}"
    assert expected[valid].abs().max() > 0.1


def cat(state: dict[str, Tensor], *names: str) -> Tensor:
    return torch.cat([state[name] for name in names])


def test_bert_is_transformers_bert() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(**SIZES, intermediate_size=4 * W, max_position_embeddings=L, hidden_act="gelu")
    theirs = BertModel(config, add_pooling_layer=False)
    scramble(theirs)
    s = theirs.state_dict()
    positions = s["embeddings.position_embeddings.weight"] + s["embeddings.token_type_embeddings.weight"][0]
    weights = {"token_embedding.weight": s["embeddings.word_embeddings.weight"], "positional_embedding": positions}
    for part in ("weight", "bias"):
        weights[f"embedding_norm.{part}"] = s[f"embeddings.LayerNorm.{part}"]
        for i in range(3):
            a, b = f"encoder.layer.{i}", f"blocks.{i}"
            qkv = [f"{a}.attention.self.{name}.{part}" for name in ("query", "key", "value")]
            weights[f"{b}.attention.qkv.{part}"] = cat(s, *qkv)
            weights[f"{b}.attention.out.{part}"] = s[f"{a}.attention.output.dense.{part}"]
            weights[f"{b}.attention_norm.{part}"] = s[f"{a}.attention.output.LayerNorm.{part}"]
            weights[f"{b}.mlp.up.{part}"] = s[f"{a}.intermediate.dense.{part}"]
            weights[f"{b}.mlp.down.{part}"] = s[f"{a}.output.dense.{part}"]
            weights[f"{b}.mlp_norm.{part}"] = s[f"{a}.output.LayerNorm.{part}"]
    assert_parity(BertText(V, L, W, 3, 4, eot_id=EOT), theirs, weights)


@pytest.mark.parametrize("mlp", ["gated_gelu", "relu"])
def test_t5_is_transformers_encoder(mlp: Any) -> None:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=V, d_model=W, d_kv=16, d_ff=80, num_layers=3, num_heads=4,
                      relative_attention_max_distance=30, relative_attention_num_buckets=16,
                      feed_forward_proj=mlp.replace("_", "-"))  # fmt: skip
    theirs = T5EncoderModel(config)
    scramble(theirs)
    s = theirs.state_dict()
    first = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    weights = {
        "token_embedding.weight": s["shared.weight"],
        "relative_bias.weight": s[first],
        "final_norm.weight": s["encoder.final_layer_norm.weight"],
    }
    ff = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if mlp == "gated_gelu" else {"up": "wi", "down": "wo"}
    for i in range(3):
        a, b = f"encoder.block.{i}.layer", f"blocks.{i}"
        weights[f"{b}.attention_norm.weight"] = s[f"{a}.0.layer_norm.weight"]
        weights[f"{b}.attention.qkv.weight"] = cat(s, *(f"{a}.0.SelfAttention.{name}.weight" for name in "qkv"))
        weights[f"{b}.attention.out.weight"] = s[f"{a}.0.SelfAttention.o.weight"]
        weights[f"{b}.mlp_norm.weight"] = s[f"{a}.1.layer_norm.weight"]
        for our, their in ff.items():
            weights[f"{b}.mlp.{our}.weight"] = s[f"{a}.1.DenseReluDense.{their}.weight"]
    ours = T5Text(V, L, W, 3, 4, head_dim=16, hidden=80, mlp=mlp, buckets=16, max_distance=30, eot_id=EOT)
    assert_parity(ours, theirs, weights)


def test_modern_is_transformers_llama() -> None:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    ours = ModernText(V, L, W, 3, 4, eot_id=EOT, rope_base=500.0)
    config = LlamaConfig(**SIZES, intermediate_size=128, hidden_act="silu", rms_norm_eps=1e-6,
                         max_position_embeddings=L,
                         rope_parameters={"rope_type": "default", "rope_theta": 500.0})  # fmt: skip
    theirs = LlamaModel(config)
    scramble(theirs)
    s = theirs.state_dict()
    weights = {"token_embedding.weight": s["embed_tokens.weight"], "final_norm.weight": s["norm.weight"]}
    for i in range(3):
        a, b = f"layers.{i}", f"blocks.{i}"
        weights[f"{b}.attention_norm.weight"] = s[f"{a}.input_layernorm.weight"]
        weights[f"{b}.attention.qkv.weight"] = cat(s, *(f"{a}.self_attn.{name}_proj.weight" for name in "qkv"))
        weights[f"{b}.attention.out.weight"] = s[f"{a}.self_attn.o_proj.weight"]
        weights[f"{b}.mlp_norm.weight"] = s[f"{a}.post_attention_layernorm.weight"]
        for name in ("gate", "up", "down"):
            weights[f"{b}.mlp.{name}.weight"] = s[f"{a}.mlp.{name}_proj.weight"]
    assert_parity(ours, theirs, weights)


def test_siglips_text_is_transformers() -> None:
    """Tokens, and the vector that SigLIP pools and projects, padding and all."""
    from transformers import SiglipTextConfig, SiglipTextModel

    torch.manual_seed(0)
    config = SiglipTextConfig(**SIZES, intermediate_size=4 * W, max_position_embeddings=L, projection_size=W)
    theirs = SiglipTextModel(config)
    scramble(theirs)
    s = {name.removeprefix("text_model."): tensor for name, tensor in theirs.state_dict().items()}
    weights = {
        "token_embedding.weight": s["embeddings.token_embedding.weight"],
        "positional_embedding": s["embeddings.position_embedding.weight"],
    }
    for part in ("weight", "bias"):
        weights[f"final_norm.{part}"] = s[f"final_layer_norm.{part}"]
        for i in range(3):
            a, b = f"encoder.layers.{i}", f"blocks.{i}"
            weights[f"{b}.attention_norm.{part}"] = s[f"{a}.layer_norm1.{part}"]
            weights[f"{b}.attention.qkv.{part}"] = cat(s, *(f"{a}.self_attn.{n}_proj.{part}" for n in "qkv"))
            weights[f"{b}.attention.out.{part}"] = s[f"{a}.self_attn.out_proj.{part}"]
            weights[f"{b}.mlp_norm.{part}"] = s[f"{a}.layer_norm2.{part}"]
            weights[f"{b}.mlp.up.{part}"] = s[f"{a}.mlp.fc1.{part}"]
            weights[f"{b}.mlp.down.{part}"] = s[f"{a}.mlp.fc2.{part}"]
    ours = TextTransformer(V, L, W, 3, 4, attention="bidirectional", pool="last", activation="gelu_tanh", norm_eps=1e-6,
                           padding="attended", pad_id=1, projection_bias=True, eot_id=EOT)  # fmt: skip
    ours.load_state_dict(weights)
    expected = theirs.eval()(input_ids=captions(pad=1))
    ids = captions(pad=9)  # what lies behind a text is filled with `pad_id`, whatever it was
    found = ours(ids, LENGTHS)
    assert found.valid.all()
    assert (found.tokens - expected.last_hidden_state).abs().max() <= 1e-5
    short = LENGTHS < 20
    found = ours(ids[short, :17], LENGTHS[short], pooled_only=True)
    pooled = nn.functional.linear(found.pooled, s["head.weight"], s["head.bias"])
    assert ours.projection_bias
    assert (pooled - expected.pooler_output[short]).abs().max() <= 1e-5
