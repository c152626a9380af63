"""One step: gradient caching, loss scaling's inverse, failures. The oracle is one plain backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from clip_train.models.resnet import ModifiedResNet
from clip_train.models.text import TextTransformer
from clip_train.models.two_tower import TwoTower
from clip_train.models.vision import VisionTransformer
from clip_train.objectives.base import Inputs
from clip_train.objectives.contrastive import InfoNCE
from clip_train.runtime.process import Process, launched
from clip_train.training.optimizer import adamw, decay_groups, load_named_state, named_state
from clip_train.training.update import backward, seed_everything, train_step

VOCABULARY, CAP = 50, 12


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    with launched("fp32") as one:
        yield one


def build(image: str = "vit", dropout: float = 0.0) -> TwoTower:
    torch.manual_seed(0)
    tower: nn.Module
    if image == "vit":
        tower = VisionTransformer(image_size=16, patch_size=8, width=16, layers=2, heads=2)
    else:
        tower = ModifiedResNet(image_size=32, layers=(1, 1, 1, 1), width=8, heads=4)
    text = TextTransformer(vocab_size=VOCABULARY, context_length=CAP, width=16, layers=2, heads=2)
    model = TwoTower(tower, text, embed_dim=8)
    if dropout:
        model.text_projection = nn.Sequential(nn.Dropout(dropout), model.text_projection)  # type: ignore[assignment]
    return model.double()


def inputs(count: int, size: int) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, CAP + 1, (count,), generator=generator)
    return Inputs(
        images=torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64),
        ids=torch.randint(0, VOCABULARY, (count, int(lengths.max())), generator=generator),
        lengths=lengths,
        groups=torch.arange(count),
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("micro", [1, 4, 5, 12])
def test_gradient_caching_gives_the_gradients_of_the_whole_batch(process: Process, micro: int) -> None:
    batch, model = inputs(12, 16), build()
    image, text, scale = model(batch.images, batch.ids, batch.lengths)
    logits = scale * image @ text.T
    truth = torch.arange(12)
    oracle = (nn.functional.cross_entropy(logits, truth) + nn.functional.cross_entropy(logits.T, truth)) / 2
    oracle.backward()
    expected = gradients(model)
    model.zero_grad()

    loss = backward(model, InfoNCE(), batch, process, step=3, seed=0, micro_batch=micro)
    assert float(loss.total) == pytest.approx(float(oracle), rel=1e-6)
    assert float(loss.stats["logit_scale"]) == pytest.approx(1 / 0.07)
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        # The loss itself is fp32, so agreement is that of fp32.
        difference = (actual[name] - gradient).abs().max()
        assert difference <= 1e-5 * gradient.abs().max() + 1e-7, name
    # What gets multiplied by the number of micro-batches elsewhere.
    torch.testing.assert_close(actual["logit_scale"], expected["logit_scale"], rtol=1e-5, atol=0.0)


def test_random_numbers_are_replayed(process: Process) -> None:
    """With dropout the second pass must draw the masks of the first, or the cached gradients are of other features."""
    batch, model = inputs(8, 16), build(dropout=0.5)
    backward(model, InfoNCE(), batch, process, step=0, seed=0, micro_batch=4)
    actual = gradients(model)
    model.zero_grad()
    parts = []
    for index, part in enumerate(batch.split(4)):
        seed_everything(0, 0, 0, index)
        parts.append(model(part.images, part.ids, part.lengths))
    image, text = (torch.cat([part[i] for part in parts]) for i in range(2))
    logits = parts[-1][2] * image @ text.T
    truth = torch.arange(8)
    ((nn.functional.cross_entropy(logits, truth) + nn.functional.cross_entropy(logits.T, truth)) / 2).backward()
    for name, gradient in gradients(model).items():
        assert (actual[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-7, name


def test_batch_norm_counts_a_batch_once(process: Process) -> None:
    batch, model, plain = inputs(8, 32), build("resnet"), build("resnet")
    backward(model, InfoNCE(), batch, process, step=0, seed=0, micro_batch=4)
    for part in batch.split(4):
        plain(part.images, part.ids, part.lengths)
    counted = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counted
    for (name, ours), (_, once) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(ours, once, msg=lambda text, name=name: f"{name}: {text}")


def test_a_micro_batch_is_trimmed_to_its_own_longest_caption() -> None:
    batch = Inputs(
        torch.zeros(4, 3, 8, 8), torch.zeros(4, 9, dtype=torch.int64), torch.tensor([9, 2, 3, 4]), torch.arange(4)
    )
    assert [part.ids.shape[1] for part in batch.split(2)] == [9, 4]


def test_a_step_moves_every_parameter_and_reports_the_norm(process: Process) -> None:
    model = build().float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = adamw(
        model.named_parameters(), no_decay=set(), lr=1e-3, beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.1
    )
    batch = inputs(8, 16)
    batch = Inputs(batch.images.float(), batch.ids, batch.lengths, batch.groups)
    result = train_step(
        model, InfoNCE(), optimizer, batch, process, step=0, seed=0, lr=1e-2, micro_batch=None, gradient_clip=1e-3
    )
    norm = math.sqrt(sum(float((p.grad / 1e-3 * result.grad_norm).square().sum()) for p in model.parameters()))  # type: ignore[operator]
    assert result.grad_norm == pytest.approx(norm, rel=1e-3), "gradients were shortened to the clip's length"
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_gradient_that_is_not_finite_changes_nothing(process: Process) -> None:
    model = build("resnet").float()
    batch = inputs(4, 32)
    batch = Inputs(batch.images.float().fill_(math.nan), batch.ids, batch.lengths, batch.groups)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = adamw(
        model.named_parameters(), no_decay=set(), lr=1e-3, beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.1
    )
    result = train_step(
        model, InfoNCE(), optimizer, batch, process, step=7, seed=0, lr=1e-2, micro_batch=None, gradient_clip=None
    )
    assert not result.applied
    assert not optimizer.state
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "BatchNorm's too"


def test_decay_groups_follow_the_paper() -> None:
    model = build("resnet")
    decayed, kept = decay_groups(model.named_parameters(), 0.2, model.no_weight_decay())
    names = {parameter: name for name, parameter in model.named_parameters()}
    kept_names = {names[p] for p in kept["params"]}
    assert decayed["weight_decay"] == 0.2
    assert kept["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    assert "logit_scale" in kept_names
    assert all(name in kept_names for name in names.values() if name.endswith(".bias") or "norm" in name)
    assert "text.token_embedding.weight" not in kept_names


def test_adamw_follows_its_paper() -> None:
    """Two updates of one weight, by hand (Loshchilov & Hutter 2019, algorithm 2)."""
    weight = nn.Parameter(torch.tensor([[1.0]]))
    optimizer = adamw([("w", weight)], no_decay=set(), lr=0.1, beta1=0.9, beta2=0.5, eps=1e-8, weight_decay=0.5)
    w, m, v = 1.0, 0.0, 0.0
    for step, gradient in enumerate((0.5, -2.0), start=1):
        weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.5 * v + 0.5 * gradient**2
        w = w * (1 - 0.1 * 0.5) - 0.1 * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.5**step)) + 1e-8)
        assert float(weight) == pytest.approx(w, rel=1e-6)


def test_optimizer_state_travels_by_name() -> None:
    def trained() -> tuple[TwoTower, torch.optim.Optimizer]:
        model = build().float()
        optimizer = adamw(
            model.named_parameters(), no_decay=set(), lr=1e-3, beta1=0.9, beta2=0.98, eps=1e-6, weight_decay=0.1
        )
        return model, optimizer

    model, optimizer = trained()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    other, fresh = trained()
    load_named_state(fresh, other, named_state(optimizer, model))
    again = named_state(fresh, other)
    for name, value in named_state(optimizer, model).items():
        assert torch.equal(again[name], value), name
