"""The text tower: trimming, masks, pooling."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from clip_train.models.base import TowerOutput
from clip_train.models.pooling import pool_tokens
from clip_train.models.text import TextTransformer

VOCABULARY, CONTEXT, WIDTH, EOT = 50, 14, 32, 3
CHOICES = [
    (attention, pool)
    for attention, pool in product(("causal", "bidirectional"), ("eot", "last", "cls", "mean", "max", "map"))
    if (attention, pool) != ("causal", "cls")
]
LENGTHS = torch.tensor([5, 2, 9, 1, 9])


def tower(attention: str, pool: str, **arguments: object) -> TextTransformer:
    torch.manual_seed(0)
    model = TextTransformer(VOCABULARY, CONTEXT, WIDTH, 3, 4, attention=attention, pool=pool, eot_id=EOT, **arguments)
    with torch.no_grad():  # positions of init 0.01 would let a wrong one pass unseen
        model.positional_embedding.normal_(generator=torch.Generator().manual_seed(1))
    return model


def captions(lengths: Tensor = LENGTHS, length: int | None = None, pad: int = 0) -> Tensor:
    """The same captions in a grid of any length, with any padding."""
    ids = torch.randint(4, VOCABULARY, (len(lengths), CONTEXT), generator=torch.Generator().manual_seed(2))
    ids[torch.arange(CONTEXT) >= lengths[:, None]] = pad
    ids[torch.arange(len(lengths)), lengths - 1] = EOT
    return ids[:, : length or int(lengths.max())]


def outputs_and_gradients(model: TextTransformer, ids: Tensor, lengths: Tensor | None) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    output: TowerOutput = model(ids, lengths)
    weights = torch.randn(output.pooled.shape, generator=torch.Generator().manual_seed(3))
    tokens = output.tokens[:, : int(LENGTHS.max())] * output.valid[:, : int(LENGTHS.max()), None]
    ((output.pooled * weights).sum() + (tokens * weights[:, None]).sum()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return {"pooled": output.pooled.detach(), "tokens": tokens.detach(), **gradients}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 4e-6) -> None:
    for name, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        difference = float((actual[name] - value).abs().max())
        assert difference <= tolerance * scale, f"{name}: {difference} at magnitude {scale}"


@pytest.mark.parametrize(("attention", "pool"), CHOICES)
def test_trimmed_equals_padded(attention: str, pool: str) -> None:
    """Outputs and gradients of packed tokens are those of a grid as long as the context."""
    packed, padded = tower(attention, pool), tower(attention, pool, packed=False)
    padded.load_state_dict(packed.state_dict())
    expected = outputs_and_gradients(padded, captions(length=CONTEXT), LENGTHS)
    assert_equal(outputs_and_gradients(packed, captions(), LENGTHS), expected)
    assert_equal(outputs_and_gradients(packed, captions(length=CONTEXT), LENGTHS), expected)
    assert_equal(outputs_and_gradients(padded, captions(), LENGTHS), expected)


@pytest.mark.parametrize(("attention", "pool"), CHOICES)
@pytest.mark.parametrize("packed", [True, False])
def test_padding_is_never_read(attention: str, pool: str, packed: bool) -> None:
    model = tower(attention, pool, packed=packed)
    zeros = outputs_and_gradients(model, captions(pad=0), LENGTHS)
    others = outputs_and_gradients(model, captions(pad=7), LENGTHS)
    assert torch.equal(zeros["pooled"], others["pooled"])
    for name in zeros.keys() - {"token_embedding.weight"}:
        torch.testing.assert_close(zeros[name], others[name], rtol=0, atol=0)
    torch.testing.assert_close(zeros["token_embedding.weight"], others["token_embedding.weight"])


@pytest.mark.parametrize(("attention", "pool"), CHOICES)
def test_one_caption_alone_is_encoded_as_in_a_batch(attention: str, pool: str) -> None:
    model, ids = tower(attention, pool), captions()
    together = model(ids, LENGTHS).pooled
    for i, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(model(ids[i : i + 1, :length]).pooled[0], together[i], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("attention", "pool"), CHOICES)
def test_permuted_captions_give_permuted_outputs(attention: str, pool: str) -> None:
    model, ids = tower(attention, pool), captions()
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(
        model(ids[order], LENGTHS[order]).pooled, model(ids, LENGTHS).pooled[order], atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize(("attention", "pool"), CHOICES)
def test_every_parameter_receives_a_gradient(attention: str, pool: str) -> None:
    model = tower(attention, pool)
    pooled = model(captions(), LENGTHS).pooled
    (pooled * torch.randn(pooled.shape)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_causal_tokens_do_not_see_later_ones() -> None:
    model, ids = tower("causal", "eot"), captions()
    changed = ids.clone()
    changed[:, 4:] = 8
    before, after = model(ids, LENGTHS).tokens, model(changed, LENGTHS).tokens
    torch.testing.assert_close(before[:, :4], after[:, :4], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(before[0, 4], after[0, 4], atol=1e-3)


def test_bidirectional_tokens_see_later_ones() -> None:
    model, ids = tower("bidirectional", "cls"), captions()
    changed = ids.clone()
    changed[0, 3] = 8 if int(ids[0, 3]) != 8 else 9
    difference = (model(ids, LENGTHS).pooled - model(changed, LENGTHS).pooled).abs().amax(dim=1)
    assert difference[0] > 1e-3
    assert difference[1:].max() < 1e-6


@pytest.mark.parametrize(("pool", "expected"), [("cls", 0), ("eot", -1), ("last", -1)])
def test_pooled_is_the_token_it_says(pool: str, expected: int) -> None:
    output = tower("bidirectional", pool)(captions(), LENGTHS)
    for i, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(output.pooled[i], output.tokens[i, :length][expected])
        assert output.valid[i].tolist() == [position < length for position in range(int(LENGTHS.max()))]


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("packed", [True, False])
def test_eot_is_the_first_of_several_and_last_the_last(attention: str, packed: bool) -> None:
    """As in a pair of sentences. Read alone or among all tokens; padding may be EOT too."""
    ids, lengths = captions(pad=EOT), LENGTHS
    ids[0, 2] = ids[2, 3] = ids[2, 5] = EOT
    for pool, places in {"eot": [2, 1, 3, 0, 8], "last": [4, 1, 8, 0, 8]}.items():
        model = tower(attention, pool, packed=packed)
        found: list[dict[str, Tensor]] = []
        for only in (False, True):
            model.zero_grad()
            output = model(ids, lengths, pooled_only=only)
            if not only:
                torch.testing.assert_close(output.pooled, output.tokens[torch.arange(5), torch.tensor(places)])
            output.pooled.square().sum().backward()
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            found.append({"pooled": output.pooled.detach(), **gradients})
        assert_equal(found[1], found[0], 4e-6)


def test_a_text_without_eot_is_read_at_its_end() -> None:
    ids = captions()
    ids[4, -1] = 8
    output = tower("causal", "eot")(ids, LENGTHS)
    torch.testing.assert_close(output.pooled[4], output.tokens[4, 8])


def test_mean_and_max_are_over_valid_tokens() -> None:
    for pool in ("mean", "max"):
        output = tower("causal", pool)(captions(length=CONTEXT), LENGTHS)
        for i, length in enumerate(LENGTHS.tolist()):
            tokens = output.tokens[i, :length]
            expected = tokens.mean(dim=0) if pool == "mean" else tokens.max(dim=0).values
            torch.testing.assert_close(output.pooled[i], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pool", ["eot", "last", "cls", "mean", "max"])
def test_a_pool_without_parameters_can_be_chosen_afterwards(pool: str) -> None:
    ids = captions()
    output = tower("bidirectional", "mean")(ids, LENGTHS)
    expected = tower("bidirectional", pool)(ids, LENGTHS)
    torch.testing.assert_close(pool_tokens(output.tokens, output.valid, ids, EOT, pool), expected.pooled)
    with pytest.raises(ValueError, match="pool='map' is unknown without parameters"):
        pool_tokens(output.tokens, output.valid, ids, EOT, "map")


def test_lengths_default_to_the_first_eot() -> None:
    model, ids = tower("causal", "eot"), captions(pad=EOT)
    torch.testing.assert_close(model(ids).pooled, model(ids, LENGTHS).pooled)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "causal", "pool": "cls"}, "attention='causal' contradicts pool='cls'"),
        ({"attention": "sideways", "pool": "eot"}, "attention='sideways' is unknown"),
        ({"attention": "causal", "pool": "median"}, "pool='median' is unknown"),
        ({"attention": "causal", "pool": "eot", "activation": "tanh"}, "activation='tanh' is unknown"),
    ],
)
def test_contradictions_are_refused(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextTransformer(VOCABULARY, CONTEXT, WIDTH, 1, 4, **arguments)
    with pytest.raises(ValueError, match="width=32 is not divisible by heads=5"):
        TextTransformer(VOCABULARY, CONTEXT, WIDTH, 1, 5)


def test_bad_captions_are_refused() -> None:
    model = tower("causal", "eot")
    with pytest.raises(ValueError, match="15 tokens, this tower takes 14"):
        model(torch.full((1, CONTEXT + 1), 5), torch.tensor([3]))
    with pytest.raises(ValueError, match=r"lengths are \(2,\) for a batch of 5"):
        model(captions(), LENGTHS[:2])
    for bad in (0, 10):
        with pytest.raises(ValueError, match=r"length.* of caption 1 .*"):
            model(captions(), torch.tensor([5, bad, 9, 1, 9]))
    with pytest.raises(ValueError, match="caption 0 has no EOT"):
        model(torch.full((1, 6), 5))
    with pytest.raises(ValueError, match="give lengths"):
        TextTransformer(VOCABULARY, CONTEXT, WIDTH, 1, 4)(captions())


def test_bf16_stays_close_to_fp32() -> None:
    for attention, pool in CHOICES:
        model = tower(attention, pool)
        exact = model(captions(), LENGTHS).pooled
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(captions(), LENGTHS).pooled
        assert rounded.dtype == torch.bfloat16
        cosine = torch.nn.functional.cosine_similarity(exact, rounded.float())
        assert cosine.min() > 0.999, (attention, pool, cosine)
