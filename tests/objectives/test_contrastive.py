"""InfoNCE against hand-computed values, open_clip's loss and a naive loop."""

from __future__ import annotations

import math

import pytest
import torch
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn import functional as F

from clip_train.objectives.base import Features
from clip_train.objectives.contrastive import InfoNCE


def unit(rows: int, width: int, seed: int) -> Tensor:
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(values, dim=1).requires_grad_()


def share(image: Tensor, text: Tensor, first: int, rows: int, groups: Tensor | None = None) -> Features:
    """What one process of several sees."""
    own = slice(first, first + rows)
    whole = [(image[own], image), (text[own], text)] + ([] if groups is None else [(groups[own], groups)])

    def gather(part: Tensor) -> Tensor:
        return next(everything for mine, everything in whole if mine is part)

    return Features(whole[0][0], whole[1][0], whole[2][0] if groups is not None else None, first, gather)


def test_two_pairs_by_hand() -> None:
    # Logits [[4, 0], [0.8 x 4, 0.6 x 4]] = [[4, 0], [3.2, 2.4]].
    image = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = InfoNCE().loss(Features.local(image, text), torch.tensor(4.0))
    image_to_text = (math.log(1 + math.exp(-4)) + math.log(1 + math.exp(0.8))) / 2
    text_to_image = (math.log(1 + math.exp(-0.8)) + math.log(1 + math.exp(-2.4))) / 2
    assert float(loss.total) == pytest.approx((image_to_text + text_to_image) / 2, abs=1e-6)
    assert float(loss.terms["image_to_text"]) == pytest.approx(image_to_text, abs=1e-6)
    assert float(loss.terms["text_to_image"]) == pytest.approx(text_to_image, abs=1e-6)
    assert float(loss.stats["accuracy_image_to_text"]) == 0.5
    assert float(loss.stats["accuracy_text_to_image"]) == 1.0


def test_equal_to_open_clip_with_gradients() -> None:
    image, text, scale = unit(9, 16, 0), unit(9, 16, 1), torch.tensor(20.0, requires_grad=True)
    ours = InfoNCE().loss(Features.local(image, text), scale).total
    theirs = ClipLoss()(image, text, scale)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, (image, text, scale)),
        torch.autograd.grad(theirs, (image, text, scale)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


def test_equal_captions_against_a_loop() -> None:
    image, text = unit(7, 8, 2), unit(7, 8, 3)
    groups, scale = torch.tensor([5, 1, 5, 2, 5, 1, 9]), 10.0
    actual = InfoNCE(equal_captions_positive=True).loss(Features.local(image, text, groups), torch.tensor(scale))

    total, right = 0.0, 0
    for queries, keys in ((image.double(), text.double()), (text.double(), image.double())):
        for i in range(7):
            logits = [scale * (queries[i] @ keys[j]).item() for j in range(7)]
            log_sum = math.log(sum(math.exp(logit) for logit in logits))
            positives = [j for j in range(7) if groups[j] == groups[i]]
            total -= sum(logits[j] - log_sum for j in positives) / len(positives)
            right += max(range(7), key=logits.__getitem__) in positives
    assert float(actual.total) == pytest.approx(total / 14, rel=1e-5)
    accuracy = actual.stats["accuracy_image_to_text"] + actual.stats["accuracy_text_to_image"]
    assert float(accuracy) / 2 == pytest.approx(right / 14)


def test_groups_of_one_are_plain_infonce() -> None:
    image, text, scale = unit(6, 8, 4), unit(6, 8, 5), torch.tensor(14.0)
    features = Features.local(image, text, torch.arange(6) * 3)
    grouped, plain = (
        InfoNCE(equal_captions_positive=True).loss(features, scale),
        InfoNCE().loss(features, scale),
    )
    torch.testing.assert_close(grouped.total, plain.total)


@pytest.mark.parametrize("equal", [False, True])
def test_the_mean_over_processes_is_the_loss_of_the_whole(equal: bool) -> None:
    objective, scale = InfoNCE(equal_captions_positive=equal), torch.tensor(30.0, requires_grad=True)
    image, text = unit(12, 8, 6), unit(12, 8, 7)
    groups = torch.tensor([0, 1, 0, 2, 3, 1, 4, 5, 0, 6, 7, 2])
    whole = objective.loss(Features.local(image, text, groups), scale)
    parts = [objective.loss(share(image, text, first, 4, groups), scale) for first in (0, 4, 8)]
    mean = torch.stack([part.total for part in parts]).mean()
    torch.testing.assert_close(mean, whole.total)
    for name, value in whole.stats.items():
        torch.testing.assert_close(torch.stack([part.stats[name] for part in parts]).mean(), value)
    for split, expected in zip(
        torch.autograd.grad(mean, (image, text, scale)),
        torch.autograd.grad(whole.total, (image, text, scale)),
        strict=True,
    ):
        torch.testing.assert_close(split, expected, atol=1e-6, rtol=1e-5)


def test_the_order_of_pairs_does_not_matter() -> None:
    image, text, order = unit(8, 8, 8), unit(8, 8, 9), torch.randperm(8)
    scale = torch.tensor(14.0)
    torch.testing.assert_close(
        InfoNCE().loss(Features.local(image[order], text[order]), scale).total,
        InfoNCE().loss(Features.local(image, text), scale).total,
    )


def test_logits_are_fp32_under_autocast() -> None:
    image, text, scale = unit(64, 32, 10), unit(64, 32, 11), torch.tensor(100.0)
    exact = InfoNCE().loss(Features.local(image, text), scale).total
    with torch.autocast("cpu", torch.bfloat16):
        inside = InfoNCE().loss(Features.local(image, text), scale).total
        rounded = F.cross_entropy(scale * image @ text.T, torch.arange(64))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, exact)
    assert abs(float(rounded) - float(F.cross_entropy(scale * image @ text.T, torch.arange(64)))) > 1e-4


def test_missing_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of equal captions"):
        InfoNCE(equal_captions_positive=True).loss(Features.local(unit(2, 4, 0), unit(2, 4, 1)), torch.tensor(1.0))


def test_a_perfect_batch_has_no_loss_left() -> None:
    features = torch.eye(5)
    loss = InfoNCE().loss(Features.local(features, features), torch.tensor(100.0))
    assert float(loss.total) == pytest.approx(0.0, abs=1e-6)
    assert float(loss.stats["accuracy_image_to_text"]) == 1.0


@pytest.mark.parametrize("equal", [False, True])
def test_rows_are_the_losses_of_single_pairs(equal: bool) -> None:
    """By a loop in float64; on two processes, each has its own rows."""
    image, text, scale = unit(6, 8, 6).detach(), unit(6, 8, 7).detach(), 8.0
    groups = torch.tensor([3, 1, 3, 2, 1, 3]) if equal else torch.arange(6)
    expected: list[float] = []
    for i in range(6):
        positives = [j for j in range(6) if groups[j] == groups[i]]
        both = 0.0
        for queries, keys in ((image.double(), text.double()), (text.double(), image.double())):
            logits = [scale * (queries[i] @ keys[j]).item() for j in range(6)]
            log_sum = math.log(sum(map(math.exp, logits)))
            both += sum(log_sum - logits[j] for j in positives) / len(positives)
        expected.append(both / 2)
    objective, found = InfoNCE(equal_captions_positive=equal), list[float]()
    for first in (0, 3):
        loss = objective.loss(share(image, text, first, 3, groups), torch.tensor(scale))
        assert loss.rows is not None and not loss.rows.requires_grad
        assert float(loss.rows.mean()) == pytest.approx(float(loss.total), abs=1e-6)
        found += loss.rows.tolist()
    assert found == pytest.approx(expected, abs=1e-5)
