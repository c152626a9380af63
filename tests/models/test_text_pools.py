"""Every kind of text tower with every pool: what it learns, what it sees, and that padding is nothing to it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clip_train.models.bert import BertText
from clip_train.models.flops import text_flops
from clip_train.models.modern import ModernText
from clip_train.models.pooling import POOLS
from clip_train.models.t5 import T5Text
from clip_train.models.text import TextTransformer
from clip_train.models.text_tower import TextTower
from clip_train.models.two_tower import TwoTower
from clip_train.models.vision import VisionTransformer
from clip_train.runtime.recompute import recompute_blocks
from clip_train.training.layer_decay import layers_of

V, L, W, EOT, PAD = 50, 14, 32, 3, 1
LENGTHS = torch.tensor([5, 2, 9, 1, 9])
SIZE = (V, L, W, 2, 4)
SIGLIP: dict[str, Any] = {"activation": "gelu_tanh", "norm_eps": 1e-6, "projection_bias": True, "pad_id": PAD}
KINDS: dict[str, Callable[..., TextTower]] = {
    "clip": lambda **kw: TextTransformer(*SIZE, **kw),
    "clip-both": lambda **kw: TextTransformer(*SIZE, attention="bidirectional", **kw),
    "siglip": lambda **kw: TextTransformer(*SIZE, attention="bidirectional", padding="attended", **SIGLIP, **kw),
    "bert": lambda **kw: BertText(*SIZE, **kw),
    "t5": lambda **kw: T5Text(*SIZE, buckets=8, max_distance=9, **kw),
    "t5-first": lambda **kw: T5Text(*SIZE, mlp="relu", head_dim=16, buckets=8, max_distance=9, **kw),
    "modern": lambda **kw: ModernText(*SIZE, **kw),
    "modern-both": lambda **kw: ModernText(*SIZE, attention="bidirectional", **kw),
}
CAUSAL = ("clip", "modern")
PAIRS = [(kind, pool) for kind, pool in product(KINDS, POOLS) if not (kind in CAUSAL and pool == "cls")]


def tower(kind: str, pool: str, **arguments: Any) -> TextTower:
    """With vectors large enough that a wrong one shows."""
    torch.manual_seed(0)
    model = KINDS[kind](pool=pool, eot_id=EOT, **arguments)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding" in name or "relative_bias" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


def texts(length: int = 9, pad: int = 0) -> Tensor:
    """The same texts in a grid of any length, with anything behind them; the third has three EOTs."""
    ids = torch.randint(4, V, (len(LENGTHS), L), generator=torch.Generator().manual_seed(2))
    ids[torch.arange(L) >= LENGTHS[:, None]] = pad
    ids[torch.arange(len(LENGTHS)), LENGTHS - 1] = EOT
    ids[2, 3] = ids[2, 5] = EOT
    return ids[:, :length]


def encoded(model: TextTower, ids: Tensor, *, pooled_only: bool = False) -> dict[str, Tensor]:
    """`pooled`, the gradients of a function of it and, where all are asked for, of the tokens."""
    model.zero_grad(set_to_none=True)
    output = model(ids, LENGTHS, pooled_only=pooled_only)
    weights = torch.randn(output.pooled.shape, generator=torch.Generator().manual_seed(3))
    (output.pooled * weights).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"pooled": output.pooled.detach(), **gradients}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Outputs to 1e-6; in fp32 gradients, whose sums over all tokens take another order, to twice that."""
    for name, value in expected.items():
        scale, wide = max(1.0, float(value.abs().max())), value.dtype == torch.float64
        tolerance = 1e-12 if wide else 1e-6 if name == "pooled" else 2e-6
        difference = float((actual[name] - value).abs().max())
        assert difference <= tolerance * scale, f"{name}: {difference} at magnitude {scale}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "pool"), PAIRS)
def test_padding_changes_nothing(kind: str, pool: str, dtype: torch.dtype) -> None:
    """A longer grid, garbage in it, packed or not, alone or together, the pooled token alone or among all.

    In fp64 as well, which leaves no room to take a trace of padding for rounding.
    """
    packed = tower(kind, pool).to(dtype)
    expected = encoded(packed, texts())
    assert expected["pooled"].dtype == dtype
    assert_equal(encoded(packed, texts(L, pad=EOT)), expected)
    assert_equal(encoded(packed, texts(L, pad=9), pooled_only=True), expected)
    grid = tower(kind, pool, packed=False).to(dtype)
    assert_equal(encoded(grid, texts(L, pad=8)), expected)
    assert_equal(encoded(grid, texts(), pooled_only=True), expected)
    ids = texts()
    for i, length in enumerate(LENGTHS.tolist()):
        alone = {"pooled": packed(ids[i : i + 1, :length], LENGTHS[i : i + 1]).pooled[0].detach()}
        assert_equal(alone, {"pooled": expected["pooled"][i]})


@pytest.mark.parametrize(("kind", "pool"), PAIRS)
def test_every_parameter_receives_a_gradient_and_moves(kind: str, pool: str) -> None:
    model = tower(kind, pool)
    target = torch.randn(len(LENGTHS), W, generator=torch.Generator().manual_seed(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses: list[float] = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (model(texts(), LENGTHS, pooled_only=True).pooled - target).square().mean()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter.detach(), before[name]), name


@pytest.mark.parametrize("kind", list(KINDS))
def test_who_sees_whom(kind: str) -> None:
    """A causal tower's tokens do not change with what comes later, others' do; nobody sees another text."""
    model, ids = tower(kind, "mean"), texts()
    changed = ids.clone()
    changed[0, 3] = 8 if int(ids[0, 3]) != 8 else 9
    difference = (model(ids, LENGTHS).tokens - model(changed, LENGTHS).tokens).abs().amax(dim=2)
    before = difference[0, :3].max()
    assert before <= 1e-6 if kind in CAUSAL else before > 1e-3
    assert difference[0, 3:5].min() > 1e-3
    assert difference[1:].max() <= 1e-6


@pytest.mark.parametrize("kind", list(KINDS))
def test_order_counts(kind: str) -> None:
    """Two inner tokens change places: a tower that knows no positions would give the same mean."""
    ids = texts()
    swapped = ids.clone()
    swapped[0, 1], swapped[0, 2] = ids[0, 2], ids[0, 1]
    model = tower(kind, "mean")
    assert (model(ids, LENGTHS).pooled - model(swapped, LENGTHS).pooled)[0].abs().max() > 1e-3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "clip-both"])
@pytest.mark.parametrize("pool", ["last", "mean", "map"])
def test_bf16_stays_close_to_fp32(kind: str, pool: str) -> None:
    model = tower(kind, pool)
    exact = model(texts(), LENGTHS, pooled_only=True).pooled
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(texts(), LENGTHS, pooled_only=True).pooled
    assert rounded.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(exact, rounded.float()).min() > 0.998


@pytest.mark.parametrize("kind", list(KINDS))
def test_attributes(kind: str) -> None:
    model = tower(kind, "last")
    assert (model.width, model.vocab_size, model.context_length, model.pool, model.eot_id) == (W, V, L, "last", EOT)
    assert model.token_embedding.weight.shape == (V, W)
    assert len(list(model.blocks)) == 2
    names = model.no_weight_decay()
    assert all((parameter.ndim < 2) == (name in names) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("pool", ["last", "map"])
@pytest.mark.parametrize("pooled_only", [True, False])
def test_flops_are_those_of_torchs_counter(kind: str, pool: str, pooled_only: bool) -> None:
    model = tower(kind, pool)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(texts()[[2, 4]], LENGTHS[[2, 4]], pooled_only=pooled_only)
    expected = counter.get_total_flops() / 2
    if pool == "map":
        expected -= W * W  # the probe's own product, which the batch shares
    assert text_flops(model, 9, pooled_only) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", list(KINDS))
def test_recomputed_blocks_give_the_same_gradients(kind: str) -> None:
    """Activation checkpointing: what attention adds for positions reaches the second pass, and T5's its gradient."""
    model = tower(kind, "mean")
    expected = encoded(model, texts())
    recompute_blocks(TwoTower(VisionTransformer(16, 8, 16, 1, 2), model, 8))
    assert_equal(encoded(model, texts()), expected)


@pytest.mark.parametrize("kind", list(KINDS))
def test_layers_in_order(kind: str) -> None:
    """Learning rates by layer: embeddings and positions lie before the blocks, norms and pools behind."""
    layers, last = layers_of(tower(kind, "map"))
    assert last == 3
    for name, layer in layers.items():
        before = name.startswith(("token_", "positional_", "embedding_", "relative_"))
        behind = name.startswith(("final_", "attention_pool"))
        assert layer == (0 if before else 3 if behind else 1 + int(name.split(".")[1])), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModernText(*SIZE, pool="cls"), "attention='causal' contradicts pool='cls'"),
        (lambda: ModernText(*SIZE, attention="sideways"), "attention='sideways' is unknown"),
        (lambda: ModernText(V, L, 12, 1, 4), "heads=4 is odd"),
        (lambda: ModernText(V, L, 30, 1, 4), "width=30 is not divisible by heads=4"),
        (lambda: BertText(*SIZE, pool="median"), "pool='median' is unknown"),
        (lambda: T5Text(*SIZE, mlp="silu"), "mlp='silu' is unknown"),
        (lambda: T5Text(*SIZE, buckets=6), "buckets=6 must be a multiple of 4"),
        (lambda: T5Text(*SIZE, max_distance=8), "max_distance=8 above a quarter"),
        (lambda: TextTransformer(*SIZE, padding="seen"), "padding='seen' is unknown"),
        (lambda: TextTransformer(*SIZE, padding="attended", pad_id=0), "contradicts attention='causal'"),
        (lambda: TextTransformer(*SIZE, attention="bidirectional", padding="attended"), "give pad_id"),
    ],
)
def test_contradictions_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
