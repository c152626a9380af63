"""What a recipe costs before anything is allocated: parameters, FLOPs, memory, samples/s, days.

Memory is a model of one process: weights, gradients and Adam's moments in fp32, the low-precision copies autocast
keeps of the weights, activations of one micro-batch, and the loss. It is an estimate: ±25 % is usual.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from clip_train.config.schema import InfoNCE, MaskedLM, Recipe, ResNet, Sigmoid, VisionTransformer
from clip_train.data.stages import Stage
from clip_train.from_recipe.data import build_stages
from clip_train.from_recipe.model import build_model, build_tokenizer
from clip_train.models.attention import SelfAttention
from clip_train.models.base import Tower
from clip_train.models.flops import forward_flops, parameter_count, text_flops
from clip_train.models.language import LanguageModel
from clip_train.models.text_tower import TextTower
from clip_train.models.two_tower import TwoTower
from clip_train.objectives.tiles import logit_bytes
from tokenizer import BPETokenizer

GiB = 2**30
# Dense peak FLOP/s of 16-bit matrix products, from the makers' data sheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX4090": 165e12}


@dataclass(frozen=True)
class Estimate:
    """One recipe on one kind of device."""

    image_parameters: int
    text_parameters: int
    parameters: int
    image_flops: float
    """Forward FLOPs of a picture."""
    text_flops: float
    """Forward FLOPs of a caption of the given length; of a language model with what its head is asked."""
    training_flops: float
    """Forward and backward of a sample, mean over the run's stages, without patches that are dropped."""
    state_bytes: int
    """Weights, gradients, the optimizer's moments, the average of the weights."""
    activation_bytes: int
    loss_bytes: int
    """Logits, or tiles of them, and everybody's features with their gradients; of a language model its logits."""
    samples_per_second: float
    """Of all devices."""
    samples: int | None
    """To be seen; None where the recipe counts epochs, since nobody has looked at the data."""

    @property
    def memory_bytes(self) -> int:
        return self.state_bytes + self.activation_bytes + self.loss_bytes

    @property
    def days(self) -> float | None:
        return None if self.samples is None else self.samples / self.samples_per_second / 86_400


def estimate(
    recipe: Recipe,
    *,
    devices: int,
    peak_flops: float,
    mfu: float,
    tokens: float | None = None,
    samples: int | None = None,
) -> Estimate:
    """Costs of a recipe on `devices` devices of `peak_flops` FLOP/s at a model FLOPs utilisation of `mfu`.

    `tokens` is the mean caption length (default: the cap, as if nothing were trimmed); `samples` defaults to the
    recipe's steps times its batch, and is unknown where it counts epochs.
    """
    tokenizer = build_tokenizer(recipe)
    with torch.device("meta"):
        model = build_model(recipe, tokenizer)
    tokens = float(tokenizer.context_length) if tokens is None else tokens
    parameters = parameter_count(model)
    batch = recipe.data.batch_size
    share = max(1, batch // devices)
    micro = min(recipe.training.micro_batch or share, share)
    width = 4 if recipe.training.precision == "fp32" else 2
    copies = 0 if width == 4 else width
    moments = 4 if recipe.optimizer.kind == "lion" else 8
    average = 0 if recipe.training.ema is None else 4
    if isinstance(model, LanguageModel):
        image_parameters, image, text = 0, 0.0, _language_flops(recipe, model, tokens)
        training = _mean_over_stages(
            recipe, tokenizer, tokens, lambda length, _: _language_flops(recipe, model, length)
        )
        activations = _text_activations(model.text, tokens)
        # Logits, their softmax and their gradient, fp32.
        loss_bytes = round(3 * 4 * micro * _targets(recipe, tokens) * model.embeddings.shape[0])
    else:
        image_parameters = parameter_count(model.image) + parameter_count(model.image_projection)
        flops = forward_flops(model, tokens)
        image, text, training = flops.image, flops.text, training_flops(recipe, model, tokenizer, tokens)
        activations = _image_activations(recipe) + _text_activations(model.text, tokens)
        assert isinstance(recipe.loss, InfoNCE | Sigmoid)
        loss_bytes = logit_bytes(recipe.loss.impl, share, batch, "cuda") + 4 * recipe.joint.embed_dim * 4 * batch
    return Estimate(
        image_parameters=image_parameters,
        text_parameters=parameters - image_parameters,
        parameters=parameters,
        image_flops=image,
        text_flops=text,
        training_flops=training,
        state_bytes=parameters * (4 + 4 + moments + average + copies),
        activation_bytes=round(micro * width * activations),
        loss_bytes=loss_bytes,
        samples_per_second=devices * peak_flops * mfu / training,
        samples=samples or (recipe.training.steps * batch if recipe.training.steps else None),
    )


def training_flops(recipe: Recipe, model: TwoTower, tokenizer: BPETokenizer, tokens: float) -> float:
    """FLOPs of a pair in a step, the mean over the steps of the run. All tokens of a caption count, as is usual."""

    def forward(length: float, image_size: int | None) -> float:
        return forward_flops(model, length, training=True, image_size=image_size).total

    return _mean_over_stages(recipe, tokenizer, tokens, forward)


def _mean_over_stages(
    recipe: Recipe, tokenizer: BPETokenizer, tokens: float, forward: Callable[[float, int | None], float]
) -> float:
    """Three times the FLOPs of `forward` of a caption's length and a picture's size, the mean over the run's steps."""
    size = None if recipe.image is None else recipe.image.image_size
    if not recipe.training.steps:  # counted in epochs, of data that nobody has looked at: as if all were of full size
        return 3 * forward(tokens, size)
    total, first = 0.0, 0
    for stage in (*build_stages(recipe, tokenizer), Stage(recipe.training.steps, size, tokenizer.context_length)):
        total += 3 * forward(min(tokens, stage.context_length), stage.image_size) * (stage.until_step - first)
        first = stage.until_step
    return total / recipe.training.steps


def _targets(recipe: Recipe, tokens: float) -> float:
    """Tokens of a text that are to be told: a share of those between SOT and EOT, or all but the first."""
    return recipe.loss.rate * (tokens - 2) if isinstance(recipe.loss, MaskedLM) else tokens - 1


def _language_flops(recipe: Recipe, model: LanguageModel, tokens: float) -> float:
    """Forward FLOPs of a text of `tokens` tokens and of the head."""
    return text_flops(model.text, tokens) + model.target_flops * _targets(recipe, tokens)


def _image_activations(recipe: Recipe) -> float:
    """Values kept for backward of one picture."""
    image = recipe.vision
    if isinstance(image, VisionTransformer):
        tokens = (image.image_size // image.patch_size) ** 2 * (1 - image.patch_dropout) + 1
        return image.layers * _block_activations(tokens, image.width, image.heads, image.mlp_ratio)
    if isinstance(image, ResNet):
        cells, width, total = (image.image_size // 4) ** 2, image.width, 0.0
        total += 4 * cells * 3 * 2 * width  # stem, at half resolution
        for stage, depth in enumerate(image.layers):
            stage_cells, stage_width = cells / 4**stage, width * 2**stage
            total += (
                depth * stage_cells * stage_width * 2 * (1 + 1 + 4)
            )  # input and normalised output of each convolution
        return total
    # timm: no structure to read; a ResNet-50's 22 values a pixel is the middle of the field.
    return 22.0 * 3 * image.image_size**2


def _text_activations(tower: Tower, tokens: float) -> float:
    """Values kept for backward of one caption: what goes into and comes out of each product, two residuals, and the
    weights of the attention; of a ViT's blocks the same, by its recipe's sizes."""
    tokens, values = tower.tokens_encoded(tokens) if isinstance(tower, TextTower) else tokens, 0.0
    for block in tower.blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear):
                values += tokens * (module.in_features + module.out_features)
            if isinstance(module, SelfAttention):
                values += module.heads * tokens**2
        values += 2 * tokens * tower.width
    return values


def _block_activations(tokens: float, width: int, heads: int, mlp_ratio: float) -> float:
    # Norms in and out, q, k, v, mixed values, residuals; the MLP before and after its activation; attention weights.
    return tokens * width * (10 + 2 * mlp_ratio) + heads * tokens**2


def main(recipe: Recipe, args: argparse.Namespace, console: Console) -> int:
    """Print one table."""
    peak = args.peak_tflops * 1e12 if args.peak_tflops else PEAK_FLOPS[args.device]
    name = f"{args.peak_tflops:g} TFLOP/s" if args.peak_tflops else args.device
    cost = estimate(
        recipe,
        devices=args.devices,
        peak_flops=peak,
        mfu=args.mfu,
        tokens=args.tokens,
        samples=int(args.samples) if args.samples else None,
    )
    table = Table(title=f"{recipe.name} on {args.devices} × {name} at {100 * args.mfu:.0f} % MFU", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = {
        "parameters": f"{cost.parameters / 1e6:,.1f} M",
        "  image tower": f"{cost.image_parameters / 1e6:,.1f} M",
        "  text tower": f"{cost.text_parameters / 1e6:,.1f} M",
        "forward FLOPs a sample": f"{(cost.image_flops + cost.text_flops) / 1e9:,.2f} G",
        "  image": f"{cost.image_flops / 1e9:,.2f} G",
        "  text": f"{cost.text_flops / 1e9:,.2f} G",
        "training FLOPs a sample": f"{cost.training_flops / 1e9:,.2f} G",
        "memory a device": f"{cost.memory_bytes / GiB:,.1f} GiB",
        "  weights, gradients, optimizer": f"{cost.state_bytes / GiB:,.2f} GiB",
        "  activations": f"{cost.activation_bytes / GiB:,.2f} GiB",
        "  loss": f"{cost.loss_bytes / GiB:,.2f} GiB",
        "samples/s": f"{cost.samples_per_second:,.0f}",
    }
    if cost.samples is None or cost.days is None:
        rows["samples"] = f"{recipe.training.epochs} epochs (give --samples)"
    else:
        rows["samples"] = f"{cost.samples:,}"
        rows["time"] = f"{cost.days:,.1f} days" if cost.days >= 2 else f"{24 * cost.days:,.1f} hours"
    for label, value in rows.items():
        if cost.image_parameters or "image" not in label:
            table.add_row(label, value)
    console.print(table)
    return 0
