"""The two sides of a comparison with open_clip: our training step, and open_clip's own loop on its own model.

Both start from the same weights and take the same batches, decoded beforehand. open_clip's loop is
`open_clip_train.train.train_one_epoch`, called as its `main` calls it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from clip_train.config.load import set_values
from clip_train.config.schema import AdamW, InfoNCE, Recipe, Sigmoid, VisionTransformer
from clip_train.data.batch import Batch
from clip_train.data.transforms import normalize
from clip_train.export.open_clip import model_config
from clip_train.export.open_clip_keys import to_open_clip
from clip_train.from_recipe.model import build_contrastive
from clip_train.from_recipe.update import build_optimizer, build_parallel
from clip_train.models.two_tower import TwoTower
from clip_train.objectives.base import Features, Inputs
from clip_train.runtime.process import Process, arithmetic
from clip_train.training.update import train_step
from tokenizer import BPETokenizer

EMBEDDED = [
    "data.sources={pictograms={shards='embedded:pictograms/train-*.tar', image='webp', caption='json.captions'}}",
    "data.sources.pictograms.caption_choice=random",
    "data.workers=0",
]
"""Overrides: the embedded pictures and captions instead of a recipe's data."""


def with_adamw(recipe: Recipe) -> Recipe:
    """The recipe with AdamW, the only optimizer open_clip has, and all else of its own optimizer that AdamW knows."""
    if isinstance(recipe.optimizer, AdamW):
        return recipe
    own = recipe.optimizer.model_dump(exclude={"kind", "layer_decay"})
    known = [f"optimizer.{key}={own[key]}" for key in AdamW.model_fields if key in own]
    return set_values(recipe, ["optimizer.kind=adamw", *known])


def in_arithmetic_of_this_machine(recipe: Recipe) -> Recipe:
    """The recipe in the precision that our side would train it in here, so that both sides compute in the same."""
    return set_values(recipe, [f"training.precision={arithmetic(recipe.training.precision)}"])


def open_clip_model(recipe: Recipe, tokenizer: BPETokenizer, model: TwoTower) -> Any:
    """open_clip's model of the same recipe, with our weights."""
    from open_clip.model import CLIP

    config = model_config(recipe, tokenizer)
    if isinstance(recipe.vision, VisionTransformer):  # which acts in training alone: no export has it
        config["vision_cfg"]["patch_dropout"] = recipe.vision.patch_dropout
    peer = CLIP(**config, output_dict=True)
    peer.load_state_dict(to_open_clip(model.state_dict()), strict=True)
    return peer


def peer_inputs(recipe: Recipe, batch: Batch, tokenizer: BPETokenizer) -> tuple[Tensor, Tensor]:
    """What open_clip's loader would give: normalised fp32 pictures, ids padded with 0 to the cap."""
    look = recipe.preprocess
    ids = torch.zeros(len(batch), tokenizer.context_length, dtype=torch.int64)
    padded = batch.padded_ids(0)
    ids[:, : padded.shape[1]] = padded
    # open_clip finds EOT as the largest id.
    assert bool((ids.argmax(dim=1) + 1 == batch.lengths).all()), "EOT is not the largest id of a caption"
    return normalize(batch.pictures, look.mean, look.std), ids


@dataclass
class OurSide:
    """`train_step`, with everything the trainer does to a batch on the device."""

    recipe: Recipe
    model: TwoTower
    tokenizer: BPETokenizer
    process: Process
    pad: bool = False

    def __post_init__(self) -> None:
        self.wrapped = build_parallel(self.recipe, self.model, self.process)
        self.optimizer = build_optimizer(self.recipe, self.model)
        # open_clip's loss knows no captions that are equal.
        assert isinstance(self.recipe.loss, InfoNCE | Sigmoid)
        self.objective = replace(build_contrastive(self.recipe.loss), equal_captions_positive=False)
        self.model.train()

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        """In fp32, in evaluation mode, in which nothing is drawn."""
        look, device = self.recipe.preprocess, self.process.device
        images = normalize(batch.pictures.to(device), look.mean, look.std)
        self.model.eval()
        ids = batch.padded_ids(self.tokenizer.pad).to(device)
        image, text, *scalars = self.model(images, ids, batch.lengths.long())
        self.model.train()
        return float(self.objective.loss(Features.local(image, text), *scalars).total)

    def update(self, batch: Batch, step: int, lr: float) -> Tensor:
        """Train on one batch; its loss."""
        look, device = self.recipe.preprocess, self.process.device
        ids, lengths = batch.padded_ids(self.tokenizer.pad), batch.lengths.long()
        if self.pad:
            cap = self.tokenizer.context_length
            ids = torch.nn.functional.pad(ids, (0, cap - ids.shape[1]), value=self.tokenizer.pad)
            lengths = torch.full_like(lengths, cap)
        result = train_step(
            self.wrapped,
            self.objective,
            self.optimizer,
            Inputs(
                images=normalize(batch.pictures.to(device), look.mean, look.std),
                ids=ids.to(device),
                lengths=lengths,
                groups=batch.groups.to(device),
            ),
            self.process,
            step=step,
            seed=self.recipe.training.seed,
            lr=lr,
            micro_batch=self.recipe.training.micro_batch,
            gradient_clip=self.recipe.training.gradient_clip,
        )
        self.model.after_update_()
        return result.loss


class OpenClipSide:
    """open_clip's `train_one_epoch` with its own model, optimizer groups and loss; it pads captions to the cap.

    `schedule(optimizer)` gives what its loop calls with each step's number; `None` keeps the learning rate.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: TwoTower,
        tokenizer: BPETokenizer,
        device: torch.device,
        *,
        lr: float,
        schedule: Callable[[torch.optim.Optimizer], Callable[[int], object]] | None = None,
    ) -> None:
        from open_clip.loss import ClipLoss

        self.recipe, self.tokenizer, self.device = recipe, tokenizer, device
        self.model = open_clip_model(recipe, tokenizer, model).to(device).train()
        # Its `--torchcompile`.
        self._called = torch.compile(self.model) if recipe.training.compile else self.model
        self.losses = _Recorded(ClipLoss(local_loss=True, gather_with_grad=True))
        config = recipe.optimizer  # its betas, eps and decay; theirs is AdamW whatever ours is
        named = list(self.model.named_parameters())
        # open_clip_train.main's rule for weight decay.
        plain = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
        rest = [p for p in self.model.parameters() if all(p is not q for q in plain)]
        self._optimizer = torch.optim.AdamW(
            [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": config.weight_decay}],
            lr=lr, betas=(config.beta1, config.beta2), eps=getattr(config, "eps", AdamW(lr=lr).eps),
        )  # fmt: skip
        self._scheduler = None if schedule is None else schedule(self._optimizer)
        precision = {"bf16": "amp_bf16", "fp32": "fp32", "fp16": "amp"}[recipe.training.precision]
        # What its loop reads of its command line.
        self._args = SimpleNamespace(
            device=str(device),
            precision=precision,
            batch_size=recipe.data.batch_size,
            grad_clip_norm=recipe.training.gradient_clip,
            accum_freq=1,
            log_every_n_steps=10**9,
            rank=0,
            local_rank=0,
            world_size=1,
            distill=False,
            skip_scheduler=schedule is None,
            horovod=False,
            wandb=False,
            distributed=False,
            local=False,
        )
        self._scaler = torch.amp.GradScaler() if recipe.training.precision == "fp16" else None  # pyright: ignore[reportPrivateImportUsage]
        logging.getLogger().setLevel(logging.WARNING)

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        """In fp32, in evaluation mode."""
        images, ids = peer_inputs(self.recipe, batch, self.tokenizer)
        output = self.model.eval()(images.to(self.device), ids.to(self.device))
        self.model.train()
        return float(self.losses(**output)["contrastive_loss"])

    def train(self, inputs: Sequence[tuple[Tensor, Tensor]], part: int) -> list[float]:
        """Its loop over the batches of part `part` of equal parts; the losses."""
        from open_clip_train.train import train_one_epoch

        self.losses.values.clear()
        data: dict[str, Any] = {"train": _Data(_Loader(inputs))}
        train_one_epoch(
            self._called, data, self.losses, part, self._optimizer, self._scaler, self._scheduler, None, self._args
        )
        return [float(value) for value in self.losses.values]


class _Recorded(nn.Module):
    """open_clip's loss, remembered: its loop keeps running means only."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.values: list[Tensor] = []

    def forward(self, *args: Any, output_dict: bool = True, **kwargs: Any) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self.loss(*args, output_dict=output_dict, **kwargs)
        self.values.append(torch.stack(list(terms.values())).sum().detach())
        return terms


class _Loader:
    """As much of open_clip's loader as its loop reads."""

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._batches = batches
        self.num_batches = len(batches)
        self.num_samples = sum(len(images) for images, _ in batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._batches)


@dataclass
class _Data:
    dataloader: _Loader

    def set_epoch(self, epoch: int) -> None:
        """The batches are given."""
