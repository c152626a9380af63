"""Our training step beside open_clip's own loop, `open_clip_train.train.train_one_epoch`.

Same weights, data and precision on both sides.

Both are given the same batches, decoded and tokenised beforehand, so that the step alone is timed: ours with captions
trimmed (or padded with `--pad`), open_clip's padded to the cap as its tokenizer gives them. Before anything is timed,
both losses on the same batch are compared in fp32.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clip_train.bench.measure import conclude, interleave, machine, median_ratio
from clip_train.build import build_model, build_objective, build_optimizer, build_stream, build_tokenizer
from clip_train.config import load_recipe
from clip_train.config.load import set_values
from clip_train.config.schema import AdamW, Recipe, ResNet, Timm, VisionTransformer
from clip_train.data.batch import Batch
from clip_train.data.transforms import normalize
from clip_train.errors import UserError
from clip_train.export.open_clip_keys import to_open_clip
from clip_train.models.flops import image_flops, text_flops
from clip_train.models.two_tower import TwoTower
from clip_train.runtime.process import Process, launched
from clip_train.training.metrics import measured_peak_flops
from clip_train.training.update import Inputs, train_step
from tokenizer import BPETokenizer


def main(args: argparse.Namespace) -> int:
    """Compare, time, print one table and the ratio."""
    console = Console(highlight=False)
    overrides = list(args.overrides)
    if args.embedded:
        overrides += EMBEDDED
    recipe = load_recipe(args.recipe, overrides)
    if not args.own_optimizer and not isinstance(recipe.optimizer, AdamW):
        adamw = [f"optimizer.{key}={getattr(recipe.optimizer, key)}" for key in AdamW.model_fields if key != "kind"]
        recipe = set_values(recipe, ["optimizer.kind=adamw", *adamw])
    if args.device == "cpu":
        torch.cuda.is_available = lambda: False
    with launched(recipe.training.precision) as process:
        tokenizer = build_tokenizer(recipe)
        torch.manual_seed(0)
        model = build_model(recipe, tokenizer).to(process.device)
        peer = open_clip_model(recipe, tokenizer, model).to(process.device)
        stream = build_stream(recipe, tokenizer)
        batches = [stream[step] for step in range(args.steps)]
        with console.status("comparing losses"):
            check_equal_losses(recipe, model, peer, batches[0], tokenizer, process)
        ours = OurSide(recipe, model, tokenizer, process, batches, pad=args.pad)
        theirs = OpenClipSide(recipe, peer, tokenizer, process, batches)
        with console.status("timing"):
            times = interleave(
                {"open_clip": theirs.run, "clip-train": ours.run}, rounds=args.rounds, device=process.device
            )
        peak = measured_peak_flops(process.device, recipe.training.precision, seconds=1.0)

    samples = sum(len(batch) for batch in batches)
    tokens = sum(int(batch.lengths.sum()) for batch in batches) / samples
    cap = tokenizer.context_length
    table = Table(title=f"training step, {recipe.name}, batch {recipe.data.batch_size}, {recipe.training.precision}")
    for column in ("", "tokens a caption", "samples/s", "ms/step", "share of GEMM peak"):
        table.add_column(column, justify="left" if not column else "right")
    for name, length in (("open_clip", float(cap)), ("clip-train", float(cap) if args.pad else tokens)):
        rate = samples / times[name].median
        flops = 3 * (image_flops(model.image) + text_flops(model.text, length))
        table.add_row(
            name,
            f"{length:.1f}",
            f"{rate:,.1f}",
            f"{1000 * times[name].median / len(batches):,.1f}",
            f"{100 * flops * rate / peak:.1f} %",
        )
    console.print(table)
    console.print(f"{machine(process.device)}; measured peak {peak / 1e12:.2f} TFLOP/s; median of {args.rounds} rounds")
    return conclude(median_ratio(times["open_clip"], times["clip-train"]), args.bar, console)


EMBEDDED = [
    "data.sources={pictograms={shards='embedded:pictograms/train-*.tar', image='webp', caption='json.captions'}}",
    "data.sources.pictograms.caption_choice=random",
    "data.workers=0",
]


def open_clip_model(recipe: Recipe, tokenizer: BPETokenizer, model: TwoTower) -> Any:
    """open_clip's model of the same recipe, with our weights."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    text = recipe.text
    if text.attention != "causal" or text.pool != "eot":
        raise UserError("open_clip's native text tower is causal with EOT pooling: compare such a recipe")
    image = recipe.image
    match image:
        case VisionTransformer():
            vision = CLIPVisionCfg(
                image_size=image.image_size, patch_size=image.patch_size, width=image.width, layers=image.layers,
                head_width=image.width // image.heads, mlp_ratio=image.mlp_ratio,
            )  # fmt: skip
        case ResNet():
            vision = CLIPVisionCfg(
                image_size=image.image_size, layers=image.layers, width=image.width,
                head_width=image.width * 32 // image.heads,
            )  # fmt: skip
        case Timm():
            if image.arguments:
                raise UserError("open_clip cannot pass image.arguments to timm: compare a recipe without")
            vision = CLIPVisionCfg(
                timm_model_name=image.name, timm_pool="", timm_proj="linear", image_size=image.image_size
            )
    quick = text.activation == "quick_gelu"
    peer = CLIP(
        embed_dim=recipe.model.embed_dim,
        vision_cfg=vision,
        text_cfg=CLIPTextCfg(
            context_length=tokenizer.context_length, vocab_size=tokenizer.vocab_size, width=text.width,
            heads=text.heads, layers=text.layers, mlp_ratio=text.mlp_ratio,
        ),
        quick_gelu=quick,
        output_dict=True,
    )  # fmt: skip
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
    return normalize(batch.images, look.mean, look.std), ids


def check_equal_losses(
    recipe: Recipe, model: TwoTower, peer: Any, batch: Batch, tokenizer: BPETokenizer, process: Process
) -> None:
    """Both sides compute the same plain InfoNCE in fp32, or there is nothing to compare."""
    from open_clip.loss import ClipLoss

    objective = replace(build_objective(recipe), equal_captions_positive=False)
    images, ids = (tensor.to(process.device) for tensor in peer_inputs(recipe, batch, tokenizer))
    model.train()
    peer.train()
    from clip_train.objectives.base import Features

    # BatchNorm's statistics must not drift apart: both see this batch once, in training mode.
    with torch.no_grad():
        image, text, scale = model(images, ids, batch.lengths.long())
        ours = float(objective.loss(Features.local(image, text), scale).total)
        theirs = float(ClipLoss()(**peer(images, ids)))
    if abs(ours - theirs) > 1e-4 * abs(theirs):
        raise UserError(f"the two losses differ before any training: ours {ours:.6f}, open_clip's {theirs:.6f}")


@dataclass
class OurSide:
    """`train_step` on the batches, with everything the trainer does to them on the device."""

    recipe: Recipe
    model: TwoTower
    tokenizer: BPETokenizer
    process: Process
    batches: list[Batch]
    pad: bool

    def __post_init__(self) -> None:
        self.optimizer = build_optimizer(self.recipe, self.model)
        self.objective = replace(build_objective(self.recipe), equal_captions_positive=False)
        self.model.train()

    def run(self) -> None:
        look, device = self.recipe.preprocess, self.process.device
        for number, batch in enumerate(self.batches):
            ids, lengths = batch.padded_ids(self.tokenizer.pad), batch.lengths.long()
            if self.pad:
                cap = self.tokenizer.context_length
                ids = torch.nn.functional.pad(ids, (0, cap - ids.shape[1]), value=self.tokenizer.pad)
                lengths = torch.full_like(lengths, cap)
            train_step(
                self.model,
                self.objective,
                self.optimizer,
                Inputs(
                    images=normalize(batch.images.to(device), look.mean, look.std),
                    ids=ids.to(device),
                    lengths=lengths,
                    groups=batch.groups.to(device),
                ),
                self.process,
                step=number,
                seed=0,
                lr=1e-5,
                micro_batch=None,
                gradient_clip=self.recipe.training.gradient_clip,
            )
            self.model.clamp_logit_scale_()


class OpenClipSide:
    """open_clip's `train_one_epoch` with its own optimizer groups over the same batches."""

    def __init__(
        self, recipe: Recipe, peer: Any, tokenizer: BPETokenizer, process: Process, batches: list[Batch]
    ) -> None:
        from open_clip.loss import ClipLoss

        self._model, self._loss = peer, ClipLoss(local_loss=True, gather_with_grad=True)
        inputs = [peer_inputs(recipe, batch, tokenizer) for batch in batches]
        self._data = {"train": _Data(_Loader(inputs))}
        config = recipe.optimizer  # with --own-optimizer theirs is AdamW all the same: open_clip has no other
        named = list(peer.named_parameters())
        # open_clip_train.main's rule for weight decay.
        plain = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
        rest = [p for p in peer.parameters() if all(p is not q for q in plain)]
        self._optimizer = torch.optim.AdamW(
            [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": config.weight_decay}],
            lr=1e-5, betas=(config.beta1, config.beta2), eps=config.eps,
        )  # fmt: skip
        precision = {"bf16": "amp_bf16", "fp32": "fp32", "fp16": "amp"}[recipe.training.precision]
        # What its loop reads of its command line.
        self._args = SimpleNamespace(
            device=str(process.device),
            precision=precision,
            batch_size=recipe.data.batch_size,
            grad_clip_norm=recipe.training.gradient_clip,
            accum_freq=1,
            log_every_n_steps=10**9,
            rank=0,
            local_rank=0,
            world_size=1,
            distill=False,
            skip_scheduler=True,
            horovod=False,
            wandb=False,
            distributed=False,
            local=False,
        )
        self._scaler = torch.amp.GradScaler() if recipe.training.precision == "fp16" else None  # pyright: ignore[reportPrivateImportUsage]
        logging.getLogger().setLevel(logging.WARNING)

    def run(self) -> None:
        from open_clip_train.train import train_one_epoch

        train_one_epoch(self._model, self._data, self._loss, 0, self._optimizer, self._scaler, None, None, self._args)


class _Loader:
    """As much of open_clip's loader as its loop reads."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self._batches = batches
        self.num_batches = len(batches)
        self.num_samples = sum(len(images) for images, _ in batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._batches)


@dataclass
class _Data:
    dataloader: _Loader

    def set_epoch(self, epoch: int) -> None:
        """The batches are the same in every epoch."""
