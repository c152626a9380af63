"""How each network of the generator is trained. All is a function of the settings, the seed and the data.

Shapes: `N` pictures, `B` of a batch, `C` width of a latent, `A` attributes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.evaluation.text_to_image.classifier import Classifier
from clip_train.evaluation.text_to_image.codebook import Codebook, to_floats
from clip_train.evaluation.text_to_image.model import PictureModel, WordPrefix
from clip_train.evaluation.text_to_image.pictures import Pictures, shifted
from clip_train.evaluation.text_to_image.stages import Settings, Stages
from clip_train.training.schedule import cosine


def train_codebook(codebook: Codebook, images: Tensor, settings: Settings, stages: Stages) -> None:
    """An autoencoder for a quarter of the steps; k-means of its latents; then with codes, which follow the latents as
    running means (van den Oord et al. 2017, appendix A.1). Codes that nothing chooses move to where latents are.
    """
    draw = torch.Generator().manual_seed(settings.seed + 1)
    optimizer = torch.optim.AdamW(codebook.parameters(), lr=2e-3, weight_decay=1e-4)
    plain = max(1, settings.codebook_steps // 4)
    counts = torch.ones(len(codebook.codes))
    sums = codebook.codes.clone()
    for step in stages.steps(settings.codebook_steps):
        if step == plain:
            codebook.codes.copy_(_kmeans(_latents_of(codebook, images, draw), codebook.codes.shape[0], draw))
            sums = codebook.codes.clone()
        picked = torch.randint(len(images), (settings.codebook_batch,), generator=draw)
        pixels = to_floats(shifted(images[picked], 2, draw))
        latents = codebook.latents(pixels)
        used, pull = latents, latents.new_zeros(())
        if step >= plain:
            rows = latents.permute(0, 2, 3, 1)
            chosen = codebook.nearest(rows.detach())
            quantised = F.embedding(chosen, codebook.codes)
            pull = F.mse_loss(rows, quantised)
            used = (rows + (quantised - rows).detach()).permute(0, 3, 1, 2)
            flat, ids = rows.detach().flatten(0, 2), chosen.flatten()
            counts.mul_(0.98).add_(torch.bincount(ids, minlength=len(counts)), alpha=0.02)
            sums.mul_(0.98).index_add_(0, ids, flat, alpha=0.02)
            if step % 25 == 0 and step < 0.8 * settings.codebook_steps:
                for code in (counts < 0.02).nonzero()[:, 0].tolist():
                    sums[code] = flat[int(torch.randint(len(flat), (1,), generator=draw))]
                    counts[code] = 1.0
            codebook.codes.copy_(sums / counts.clamp(min=1e-3)[:, None])
        shown = codebook.pixels(used)
        loss = F.mse_loss(shown, pixels) + 0.25 * F.l1_loss(shown, pixels) + 0.25 * pull
        _update(optimizer, loss, step, settings.codebook_steps, 2e-3)


def _latents_of(codebook: Codebook, images: Tensor, draw: torch.Generator, most: int = 1024) -> Tensor:
    picked = torch.randperm(len(images), generator=draw)[:most]
    with torch.inference_mode():
        return codebook.latents(to_floats(images[picked])).permute(0, 2, 3, 1).flatten(0, 2).clone()


def _kmeans(rows: Tensor, count: int, draw: torch.Generator, rounds: int = 8) -> Tensor:
    """`(count, C)` centres; one that loses all its rows begins anew at one of them."""
    centres = rows[torch.randint(len(rows), (count,), generator=draw)].clone()
    for _ in range(rounds):
        nearest = (centres.square().sum(1) - 2 * rows @ centres.T).argmin(1)
        sizes = torch.bincount(nearest, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        anew = rows[torch.randint(len(rows), (count,), generator=draw)]
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], anew)
    return centres


def train_classifier(judge: Classifier, images: Tensor, targets: Tensor, settings: Settings, stages: Stages) -> None:
    """Logistic losses of all attributes, on moved pictures; then the calibration of `evidence`."""
    draw = torch.Generator().manual_seed(settings.seed + 2)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.05)
    for step in stages.steps(settings.classifier_steps):
        picked = torch.randint(len(images), (settings.classifier_batch,), generator=draw)
        logits = judge(shifted(images[picked], 2, draw))
        loss = F.binary_cross_entropy_with_logits(logits, targets[picked].float(), reduction="sum") / len(picked)
        _update(optimizer, loss, step, settings.classifier_steps, 3e-3)
    judge.eval().calibrate_(images[:2048])


def train_model(
    model: PictureModel, words: WordPrefix, codebook: Codebook, pictures: Pictures, settings: Settings, stages: Stages
) -> None:
    """Codes given a bag of words: of one of the picture's captions, some words left out, or of none."""
    draw = torch.Generator().manual_seed(settings.seed + 3)
    codebook.eval()
    views = torch.stack([codebook.encode(pictures.images)]
                        + [codebook.encode(shifted(pictures.images, 2, draw)) for _ in range(3)])  # fmt: skip
    bags = [words.bags(texts) for texts in pictures.captions]
    parameters = [*model.parameters(), *words.parameters()]
    decayed = [p for p in parameters if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay},
         {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}],
        lr=settings.lr, betas=(0.9, 0.98),
    )  # fmt: skip
    for step in stages.steps(settings.steps):
        picked = torch.randint(len(pictures), (settings.batch,), generator=draw).tolist()
        view = torch.randint(len(views), (settings.batch,), generator=draw)
        chance = torch.rand(settings.batch, 2, generator=draw).tolist()
        given: list[list[int]] = []
        for row, (caption, none) in zip(picked, chance, strict=True):
            bag = bags[row][int(caption * len(bags[row]))]
            kept = (torch.rand(len(bag), generator=draw) >= 0.1).tolist()
            given.append([] if none < settings.without_caption else [w for w, k in zip(bag, kept, strict=True) if k])
        loss = model.bits(views[view, picked], words(given)).mean()
        _update(optimizer, loss, step, settings.steps, settings.lr)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, step: int, steps: int, lr: float) -> None:
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 1.0)
        group["lr"] = cosine(step, lr=lr, steps=steps, warmup_steps=min(50, steps // 10))
    optimizer.step()
