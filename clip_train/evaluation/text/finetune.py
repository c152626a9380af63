"""Fine-tuning: the whole tower and a linear head on a task of experiment 1, for comparison with frozen probes.

As BERT's authors do it (Devlin et al. 2019) and Chen et al. 2023 after them: AdamW, linear warm-up over a tenth of the
steps and linear decay, a few epochs. Beyond them: several seeds, and pool and epoch from dev.

Shapes: `B` texts, `L` tokens, `W` width, `C` outputs: classes, or one rating.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.errors import UserError
from clip_train.evaluation.text.encoder import OWN, PooledEncoder, Sequences, acting_pools, batches, padded
from clip_train.evaluation.text.metrics import chance_of, measure
from clip_train.evaluation.text.results import TaskResult
from clip_train.evaluation.text.tasks import Split, TextTask
from clip_train.evaluation.text.understanding import check_learnable

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """How to fine-tune. Raises UserError for what cannot be."""

    epochs: int = 3
    lr: float = 2e-5
    """Of the tower; the head, which starts at zero, learns at `head_lr`."""
    head_lr: float = 1e-3
    batch_size: int = 32
    weight_decay: float = 0.01
    seeds: int = 3

    def __post_init__(self) -> None:
        for name in ("epochs", "seeds", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"fine-tuning with {name} = {getattr(self, name)}: give at least 1")
        if not 0 <= self.lr < math.inf:
            raise UserError(f"fine-tuning with lr = {self.lr}: give a number from 0")


def finetune_task(encoder: PooledEncoder, task: TextTask, settings: Settings) -> TaskResult:
    """`exp1/NAME/finetuned`: the mean over seeds; items are `(S, n)`. The encoder stays as it was.

    The first seed is fine-tuned with every pool that sees the text (in pairs: the second one); the one that is best on
    dev serves the other seeds, too.
    """
    check_learnable(task)
    started = time.perf_counter()
    tried = {
        pool: finetune_once(encoder, task, settings, pool, seed=0)
        for pool in acting_pools(encoder, pairs=task.pairs, once=True)
    }
    pool = max(tried, key=lambda name: tried[name][0])
    others = [finetune_once(encoder, task, settings, pool, seed) for seed in range(1, settings.seeds)]
    runs = [tried[pool], *others]
    test = task.splits["test"]
    values = [measure(task.metric, predicted, test.answers) for _, predicted in runs]
    if task.metric == "accuracy":
        right = np.stack([(predicted == test.answers).astype(np.float64) for _, predicted in runs])
        items = {"": right}
    else:
        items = {":score": np.stack([predicted for _, predicted in runs]), ":label": test.answers}
    return TaskResult(
        f"exp1/{task.name}/finetuned", task.metric, float(np.mean(values)), chance_of(task), pool, len(test),
        time.perf_counter() - started, items,
        {"by_seed": values, "dev": float(np.mean([dev for dev, _ in runs])),
         "dev_by_pool": {name: dev for name, (dev, _) in tried.items()}, "epochs": settings.epochs, "lr": settings.lr},
    )  # fmt: skip


def finetune_once(
    encoder: PooledEncoder, task: TextTask, settings: Settings, pool: str, seed: int
) -> tuple[float, Floats]:
    """The figure on dev of the epoch that was best there, and that epoch's predictions of test `(n,)`."""
    torch.manual_seed(seed)
    train, dev, test = (task.splits[name] for name in ("train", "dev", "test"))
    learner = _Learner(encoder, pool, len(task.classes) if task.kind == "labels" else 1)
    encoded = {name: encoder.tower.tokenise(split.first, split.second) for name, split in task.splits.items()}
    answers = torch.from_numpy(train.answers)
    mean, deviation = float(answers.mean()), float(answers.std()) if task.kind == "ratings" else 1.0
    optimizer = torch.optim.AdamW(
        [{"params": list(learner.module.parameters()), "lr": settings.lr},
         {"params": list(learner.head.parameters()), "lr": settings.head_lr}],
        weight_decay=settings.weight_decay,
    )  # fmt: skip
    steps = settings.epochs * -(-len(train) // settings.batch_size)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))
    )
    order = torch.Generator().manual_seed(seed)
    best: tuple[float, Floats] | None = None
    for _ in range(settings.epochs):
        learner.train()
        for rows in torch.randperm(len(train), generator=order).split(settings.batch_size):
            output = learner(encoded["train"], rows.tolist())
            target = answers[rows].to(output.device)
            if task.kind == "labels":
                loss = F.cross_entropy(output, target.long())
            else:
                loss = F.mse_loss(output[:, 0], (target.float() - mean) / deviation)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*learner.module.parameters(), *learner.head.parameters()], 1.0)
            optimizer.step()
            schedule.step()
        value = measure(task.metric, _predict(learner, encoded["dev"], dev, task), dev.answers)
        if best is None or value > best[0]:
            best = value, _predict(learner, encoded["test"], test, task)
    assert best is not None
    return best


class _Learner:
    """A copy of the tower with a head; the encoder's own weights are not touched."""

    def __init__(self, encoder: PooledEncoder, pool: str, outputs: int) -> None:
        self.tower, self._encoder, self._pool = copy.deepcopy(encoder.tower), encoder, pool
        self.module = self.tower.module
        self.module.requires_grad_(True)
        self.head = nn.Linear(encoder.width, outputs, device=encoder.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)

    def __call__(self, sequences: Sequences, rows: Sequence[int]) -> Tensor:
        """`(B, C)`."""
        ids, lengths, types = padded(sequences, rows, self.tower.pad)
        ids = ids.to(self._encoder.device)
        output = self.tower.run(ids, lengths, None if types is None else types.to(self._encoder.device))
        pooled = output.pooled if self._pool == OWN else self._encoder.pool(output, ids, self._pool)
        # Features of towers differ in scale by orders of magnitude; the head's learning rate is one.
        return self.head(F.layer_norm(pooled.float(), pooled.shape[-1:]))


@torch.no_grad()
def _predict(learner: _Learner, sequences: Sequences, split: Split, task: TextTask) -> Floats:
    learner.train(False)
    found = np.empty(len(split))
    for rows in batches([len(ids) for ids in sequences.ids], 4096):
        output = learner(sequences, rows).float().cpu()
        found[rows] = (output.argmax(dim=1) if task.kind == "labels" else output[:, 0]).numpy()
    return found
