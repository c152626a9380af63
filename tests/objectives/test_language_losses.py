"""Masking and next tokens: by their properties, by hand, and against plain cross-entropy over all logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clip_train.config.load import parse_recipe
from clip_train.errors import ConfigError
from clip_train.from_recipe.model import build_language_model, build_objective, build_tokenizer
from clip_train.models.language import BertHead, LanguageModel, TiedHead
from clip_train.models.text import TextTransformer
from clip_train.objectives.base import Inputs
from clip_train.objectives.causal_lm import CausalLM
from clip_train.objectives.masked import MaskedLM
from tokenizer import BPETokenizer

VOCABULARY, SOT, EOT, PAD, MASK = 40, 36, 37, 38, 39
SPECIALS = (SOT, EOT, PAD, MASK)


def texts(count: int, shortest: int = 3, longest: int = 20) -> Inputs:
    """SOT, ordinary tokens, EOT, padding."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    lengths[0] = longest
    ids = torch.randint(0, 36, (count, longest), generator=generator)
    places = torch.arange(longest)
    ids[:, 0] = SOT
    ids[places == lengths[:, None] - 1] = EOT
    ids[places >= lengths[:, None]] = PAD
    return Inputs(None, ids, lengths, torch.arange(count), torch.arange(count))


def masked(rate: float = 0.15) -> MaskedLM:
    return MaskedLM(VOCABULARY, MASK, SPECIALS, rate)


def of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    assert inputs.targets is not None
    return inputs.ids, inputs.targets


def test_masking_hides_what_it_says() -> None:
    plain = texts(4000, shortest=9)
    ids, targets = of(masked().prepare(plain, seed=1, step=2))
    chosen = targets >= 0
    assert torch.equal(ids[~chosen], plain.ids[~chosen])
    assert torch.equal(targets[chosen], plain.ids[chosen])
    assert not torch.isin(plain.ids[chosen], torch.tensor(SPECIALS)).any()
    assert bool((chosen.sum(1) >= 1).all())
    was, now = plain.ids[chosen], ids[chosen]
    ordinary = int((~torch.isin(plain.ids, torch.tensor(SPECIALS))).sum())
    assert len(was) / ordinary == pytest.approx(0.15, abs=0.005)
    assert float((now == MASK).float().mean()) == pytest.approx(0.8, abs=0.02)
    # One in 36 of the random tokens is the old one.
    assert float((now == was).float().mean()) == pytest.approx(0.1 + 0.1 / 36, abs=0.02)
    others = now[(now != MASK) & (now != was)]
    assert set(others.tolist()) == set(range(36)), "every ordinary token, and no special one"


def test_a_text_of_one_token_has_a_target_and_an_empty_one_has_none() -> None:
    ids = torch.tensor([[SOT, 5, EOT], [SOT, EOT, PAD]])
    plain = Inputs(None, ids, torch.tensor([3, 2]), torch.arange(2), torch.arange(2))
    _, targets = of(masked(0.01).prepare(plain, seed=0, step=0))
    assert targets.tolist() == [[-1, 5, -1], [-1, -1, -1]]
    nothing = Inputs(None, ids[1:], torch.tensor([2]), torch.arange(1), torch.arange(1))
    assert masked().count(masked().prepare(nothing, seed=0, step=0)) == 0


def test_masking_goes_by_step_seed_and_row_alone() -> None:
    plain = texts(64)
    whole = masked().prepare(plain, seed=1, step=2)
    parts = [masked().prepare(part, seed=1, step=2) for part in plain.split(5)]
    for one, other in zip(whole.split(5), parts, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(of(one), of(other), strict=True))
    moved = replace(plain, rows=torch.arange(64) + 64)
    for other in (masked().prepare(moved, seed=1, step=2), masked().prepare(plain, seed=1, step=3),
                  masked().prepare(plain, seed=2, step=2)):  # fmt: skip
        assert not torch.equal(of(other)[1], of(whole)[1])


def test_whole_words_are_hidden_whole(recipe_tree: dict[str, Any]) -> None:
    recipe = language(recipe_tree, "mlm", whole_words=True, rate=0.3)
    tokenizer = build_tokenizer(recipe)
    words = ["antidisestablishmentarianism", "pneumonoultramicroscopic", "a", "cat", "honorificabilitudinity", "dogs"]
    ids, lengths = tokenizer.encode_batch([" ".join(np.roll(words, i)) for i in range(200)])
    padded, counts = torch.from_numpy(tokenizer.padded(ids, lengths)).long(), torch.from_numpy(lengths).long()
    objective = build_objective(recipe, tokenizer)
    assert isinstance(objective, MaskedLM)
    inputs = Inputs(None, padded, counts, torch.arange(200), torch.arange(200))
    _, targets = of(objective.prepare(inputs, seed=0, step=0))
    sizes = {word: len(tokenizer.encode(word)) for word in words}
    assert max(sizes.values()) >= 4
    hidden_words = 0
    for number, row in enumerate(targets.tolist()):
        place = 1
        for word in np.roll(words, number).tolist():
            hidden = [target >= 0 for target in row[place : place + sizes[word]]]
            assert all(hidden) or not any(hidden), (word, hidden)
            hidden_words += all(hidden)
            place += sizes[word]
    assert 200 <= hidden_words < 200 * len(words) / 2
    single = replace(objective, word_ends=None).prepare(inputs, seed=0, step=0)
    assert not torch.equal(of(single)[1], targets)


def test_the_next_token_is_the_target() -> None:
    ids = torch.tensor([[SOT, 5, 6, EOT], [SOT, 7, EOT, PAD]])
    inputs = CausalLM().prepare(
        Inputs(None, ids, torch.tensor([4, 3]), torch.arange(2), torch.arange(2)), seed=0, step=0
    )
    assert of(inputs)[1].tolist() == [[5, 6, EOT, -1], [7, EOT, -1, -1]]
    assert torch.equal(inputs.ids, ids)


@pytest.mark.parametrize("head", ["tied", "bert"])
def test_the_loss_is_cross_entropy_over_all_logits(head: str) -> None:
    torch.manual_seed(0)
    tower = TextTransformer(VOCABULARY, 20, 16, 2, 2, attention="bidirectional", pool="mean")
    model = LanguageModel(tower, TiedHead(VOCABULARY, 0.5) if head == "tied" else BertHead(VOCABULARY, 16)).double()
    inputs = masked().prepare(texts(9), seed=0, step=0)
    ids, targets = of(inputs)
    loss = masked().loss(model, inputs, torch.tensor(7.0))  # whatever the mean of the processes' counts is
    tokens = tower(ids, inputs.lengths).tokens
    if isinstance(model.head, BertHead):
        transformed = model.head.norm(F.gelu(tokens @ model.head.dense.weight.T + model.head.dense.bias))
    else:
        transformed = 0.5 * tokens
    logits = transformed @ tower.token_embedding.weight.T + model.head.bias
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum") / 7
    torch.testing.assert_close(loss.total, expected)
    right = int((logits.argmax(-1) == targets).sum())
    assert float(loss.stats["accuracy"]) == pytest.approx(right / 7)
    row = F.cross_entropy(logits[3], targets[3], ignore_index=-1)
    assert loss.rows is not None
    assert float(loss.rows[3]) == pytest.approx(float(row.detach()))


def language(tree: dict[str, Any], kind: str, text: dict[str, Any] | None = None, **loss: Any) -> Any:
    """The recipe of a language model, from the tree of a CLIP."""
    attention = "causal" if kind == "clm" else "bidirectional"
    kept = {key: value for key, value in tree.items() if key not in ("image", "model", "evaluation")}
    own = {"attention": attention} if "kind" not in (text or {}) else {}
    return parse_recipe(kept | {"text": {**own, **tree["text"], **(text or {})}, "loss": {"kind": kind, **loss}})


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("mlm", {"pool": "cls"}),
        ("mlm", {"pool": "mean"}),
        ("mlm", {"kind": "bert"}),
        ("mlm", {"kind": "t5"}),
        ("mlm", {"kind": "modern", "attention": "bidirectional", "pool": "max"}),
        ("clm", {"pool": "eot"}),
        ("clm", {"kind": "modern", "attention": "causal", "pool": "last"}),
    ],
)
def test_every_parameter_gets_a_gradient(recipe_tree: dict[str, Any], kind: str, text: dict[str, Any]) -> None:
    recipe = language(recipe_tree, kind, text)
    tokenizer = build_tokenizer(recipe)
    model, objective = build_language_model(recipe, tokenizer), build_objective(recipe, tokenizer)
    assert isinstance(objective, MaskedLM | CausalLM)
    ids, lengths = tokenizer.encode_batch(["a red square", "two blue dots and a stripe"])
    padded, counts = torch.from_numpy(tokenizer.padded(ids, lengths)).long(), torch.from_numpy(lengths).long()
    inputs = Inputs(None, padded, counts, torch.arange(2), torch.arange(2))
    inputs = objective.prepare(inputs, seed=0, step=0)
    objective.loss(model, inputs, torch.tensor(1.0)).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mlm", {"text.attention": "causal"}, "from both sides"),
        ("clm", {"text.attention": "bidirectional"}, "just look up"),
        ("mlm", {"text.pool": "map"}, "never trains"),
        ("mlm", {"text.padding": "attended"}, "is for contrastive losses"),
        ("mlm", {"image": {"kind": "timm", "name": "resnet18", "image_size": 32}}, "--set image=none"),
        ("mlm", {"model": {"embed_dim": 8}}, "--set model=none"),
        ("mlm", {"training.lock": {"text": "all"}}, "for two towers"),
        ("mlm", {"evaluation": {"tasks": {"x": {"kind": "retrieval", "shards": "x.tar"}}}}, "needs pictures"),
        ("infonce", {"image": None}, "needs pictures"),
    ],
)
def test_contradictions_are_refused(
    recipe_tree: dict[str, Any], kind: str, changes: dict[str, Any], message: str
) -> None:
    tree = {key: value for key, value in recipe_tree.items() if key not in ("image", "model", "evaluation")}
    tree["loss"] = {"kind": kind}
    tree["text"] = {**tree["text"], "attention": "causal" if kind == "clm" else "bidirectional", "pool": "mean"}
    for key, value in changes.items():
        table, _, leaf = key.partition(".")
        tree[table] = {**tree[table], leaf: value} if leaf else value
    with pytest.raises(ConfigError, match=message):
        parse_recipe({key: value for key, value in tree.items() if value is not None})


def test_masking_needs_a_mask_token(recipe_tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = language(recipe_tree, "mlm")
    tokenizer: BPETokenizer = build_tokenizer(recipe)
    monkeypatch.setattr(tokenizer, "mask", None)
    with pytest.raises(ConfigError, match="mask token"):
        build_objective(recipe, tokenizer)
