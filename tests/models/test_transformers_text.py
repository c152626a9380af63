"""Text encoders of transformers as towers: by name, from a directory, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clip_train.cli import main
from clip_train.config.load import parse_recipe
from clip_train.errors import ConfigError
from clip_train.from_recipe.model import build_model, build_text_tower, build_tokenizer
from clip_train.loading import load
from clip_train.models.adapters import TransformersText
from clip_train.models.flops import text_flops
from clip_train.models.language import LanguageModel
from clip_train.models.pooling import POOLS
from clip_train.models.two_tower import TwoTower
from clip_train.models.vision import VisionTransformer
from clip_train.training.layer_decay import layers_of
from tokenizer import BPETokenizer

V, L, W, EOT = 50, 14, 32, 3
LENGTHS = torch.tensor([5, 2, 9, 1, 9])
NODROP = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL: dict[str, Any] = {"hidden_size": W, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
T5 = {"d_model": W, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
NAMES: dict[str, dict[str, Any]] = {
    "bert": SMALL | NODROP,
    "roberta": SMALL | NODROP,
    "t5": T5,
    "modernbert": SMALL,
    "gpt2": {"n_embd": W, "n_layer": 2, "n_head": 4, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
}


def tower(name: str, pool: str = "mean", **more: Any) -> TransformersText:
    torch.manual_seed(0)
    return TransformersText(V, L, name=name, arguments=NAMES[name] | more, pool=pool, eot_id=EOT)


def texts(length: int = 9, pad: int = 7) -> Tensor:
    ids = torch.randint(0, V, (len(LENGTHS), L), generator=torch.Generator().manual_seed(2))
    ids[torch.arange(L) >= LENGTHS[:, None]] = pad
    ids[torch.arange(len(LENGTHS)), LENGTHS - 1] = EOT
    return ids[:, :length]


@pytest.mark.parametrize(
    ("name", "pool"),
    [*product(("bert",), POOLS), ("roberta", "cls"), ("t5", "mean"), ("modernbert", "max"), ("gpt2", "eot")],
)
def test_padding_is_nothing_and_everything_moves(name: str, pool: str) -> None:
    model = tower(name, pool)
    pooled = model(texts(), LENGTHS).pooled
    assert pooled.shape == (5, W) == (5, model.width)
    assert (model(texts(L, pad=1), LENGTHS).pooled - pooled).abs().max() <= 1e-6
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        (model(texts(), LENGTHS).pooled * torch.linspace(-1, 1, W)).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    assert all(not torch.equal(parameter, before[key]) for key, parameter in model.named_parameters())
    read = texts()[torch.arange(9) < LENGTHS[:, None]].unique()
    assert model.token_embedding.weight.grad[read].abs().sum(dim=1).min() > 0  # also of the ids transformers pads with


def test_it_is_a_tower() -> None:
    model = tower("bert")
    assert (model.vocab_size, model.context_length, model.pool, model.eot_id) == (V, L, "mean", EOT)
    assert len(model.blocks) == 2
    layers, last = layers_of(model)
    assert last == 3 and layers["backbone.embeddings.word_embeddings.weight"] == 0
    assert layers["backbone.encoder.layer.1.output.dense.weight"] == 2
    # Products of a BERT layer, as of a block of ours: 4 W^2 and two of W * hidden a token, attention 4 L W.
    assert text_flops(model, 8) == 2 * (2 * 8 * (4 * W * W + 2 * W * 64) + 4 * 8 * 8 * W)
    assert text_flops(model, 8) < text_flops(model, 8.5) < text_flops(model, 9)
    with torch.device("meta"):
        tower("bert")
    both = TwoTower(VisionTransformer(16, 8, 16, 1, 2), model, 8)
    assert "text.backbone.encoder.layer.0.output.dense.bias" in both.no_weight_decay()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "brt"}, "no model_type 'brt'; nearest: .*bert"),
        ({"name": "bert", "arguments": {"hiden_size": 8}}, "no argument 'hiden_size'; nearest: hidden_size"),
        ({"name": "bert", "arguments": SMALL | {"vocab_size": 9}}, "vocab_size = 9, but the recipe's tokenizer has 50"),
        ({"name": "bert", "arguments": SMALL | {"max_position_embeddings": 8}}, "no text of 14 tokens can be encoded"),
        ({"name": "vit"}, "is no encoder of masked texts"),
        ({"name": "gpt2", "arguments": NAMES["gpt2"], "pool": "cls"}, "contradicts pool='cls'"),
        ({"name": "bert", "path": "/nowhere"}, "give either name .* or path"),
        ({}, "give either name"),
        ({"path": "/nowhere"}, "/nowhere is no directory of a transformers model"),
        ({"path": "/nowhere", "arguments": SMALL}, "arguments are of an architecture by name"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformersText(V, L, **arguments)


def test_a_directory_brings_weights_and_must_have_the_vocabulary(recipe_tree: dict[str, Any], tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    ours = BPETokenizer.default(context_length=12)
    folder = tmp_path / "encoder"
    model = BertModel(BertConfig(vocab_size=ours.vocab_size, max_position_embeddings=16, **SMALL))
    model.save_pretrained(folder)
    recipe_tree["text"] = {"kind": "transformers", "path": str(folder)}
    recipe_tree["tokenizer"] = {"context_length": 12}

    def build() -> TransformersText:
        recipe = parse_recipe(recipe_tree)
        built = build_text_tower(recipe, build_tokenizer(recipe))
        assert isinstance(built, TransformersText)
        return built

    with pytest.raises(ConfigError, match=r"has no tokenizer.json"):
        build()
    ours.to_transformers(folder)
    weight = build().backbone.encoder.layer[1].output.dense.weight
    assert torch.equal(weight, model.encoder.layer[1].output.dense.weight)
    recipe_tree["tokenizer"]["path"] = str(folder)  # the directory's own
    ids, lengths = build_tokenizer(parse_recipe(recipe_tree)).encode_batch(["a red square"])
    assert [*ids] == [*ours.encode_batch(["a red square"])[0]] and lengths == len(ids)
    build()
    other = ours.vocabulary.merges[:100]
    save_other_vocabulary(other, tmp_path / "other.json")
    recipe_tree["tokenizer"]["path"] = str(tmp_path / "other.json")
    with pytest.raises(ConfigError, match="was trained with another vocabulary"):
        build()
    (folder / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
    with pytest.raises(ConfigError, match="WordPiece"):
        build()


def save_other_vocabulary(merges: tuple[tuple[str, str], ...], path: Path) -> None:
    from tokenizer.vocabulary import Vocabulary

    size = 512 + len(merges)
    specials = {"pad": "<|PAD|>", "mask": "<|MASK|>", "sot": "<|SOT|>", "eot": "<|EOT|>"}
    ids = {role: size + place for place, role in enumerate(specials)}
    BPETokenizer(Vocabulary(merges, specials, ids, 12)).save(path)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip_train.models.adapters.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'clip-train\[probe\]'"):
        tower("bert")


@pytest.mark.parametrize("name", ["bert", "modernbert", "t5", "gpt2"])
def test_a_checkpoint_opens_again(
    name: str, recipe_tree: dict[str, Any], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """With what transformers keeps out of checkpoints: positions, frequencies."""
    recipe_tree["text"] = {"kind": "transformers", "name": name, "arguments": NAMES[name]}
    recipe_tree["training"]["steps"] = 2
    recipe_tree["tokenizer"] = {"context_length": 12}
    run_dir = tmp_path / "run"
    assert main(["train", str(write_recipe(recipe_tree)), "--run-dir", str(run_dir)]) == 0
    clip = load(run_dir)
    torch.manual_seed(0)
    recipe = parse_recipe(recipe_tree)
    built = build_text_tower(recipe, build_tokenizer(recipe)).eval()
    built.load_state_dict(clip.model.text.state_dict())
    ids, lengths = clip.tokenizer.encode_batch(["a red square", "ring"])
    grid = torch.from_numpy(clip.tokenizer.padded(ids, lengths)).long()
    counts = torch.from_numpy(lengths).long()
    expected = torch.nn.functional.normalize(clip.model.text_projection(built(grid, counts).pooled), dim=-1)
    torch.testing.assert_close(clip.encode_text(["a red square", "ring"]), expected)


@pytest.mark.parametrize(
    ("name", "more", "loss", "message"),
    [
        ("gpt2", {}, "clm", None),
        ("bert", {}, "mlm", None),
        ("gpt2", {}, "mlm", "it is causal, .* take loss.kind = 'clm'"),
        ("bert", {}, "clm", "it is bidirectional, .* take loss.kind = 'mlm'"),
        ("electra", {"embedding_size": 16}, "mlm", "embeddings are of 16 numbers, its tokens of 32"),
    ],
)
def test_language_models_of_transformers(
    name: str, more: dict[str, Any], loss: str, message: str | None, recipe_tree: dict[str, Any]
) -> None:
    tree = {key: value for key, value in recipe_tree.items() if key not in ("image", "evaluation", "model")}
    tree |= {"text": {"kind": "transformers", "name": name, "arguments": NAMES.get(name, SMALL) | more}}
    tree |= {"loss": {"kind": loss}, "tokenizer": {"context_length": 12}}
    recipe = parse_recipe(tree)
    if message is not None:
        with pytest.raises(ConfigError, match=message):
            build_model(recipe, build_tokenizer(recipe))
        return
    model = build_model(recipe, build_tokenizer(recipe))
    assert isinstance(model, LanguageModel)
    logits = model(torch.tensor([[1, 2, 3]]), torch.tensor([3]), torch.tensor([1]))
    assert logits.shape == (1, model.embeddings.shape[0])


def test_logits_over_t5s_unit_embeddings_begin_small(recipe_tree: dict[str, Any]) -> None:
    tree = {key: value for key, value in recipe_tree.items() if key not in ("image", "evaluation", "model")}
    tree |= {"text": {"kind": "transformers", "name": "t5", "arguments": T5}, "loss": {"kind": "mlm"}}
    recipe = parse_recipe(tree | {"tokenizer": {"context_length": 12}})
    torch.manual_seed(0)
    model = build_model(recipe, build_tokenizer(recipe))
    logits = model(torch.arange(10)[None], torch.tensor([10]), torch.arange(10))
    assert 0.5 < logits.std() < 2
