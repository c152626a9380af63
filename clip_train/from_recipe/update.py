"""From a recipe to what an update takes: processes, optimizer, learning rate, average of the weights."""

from __future__ import annotations

from typing import Any, assert_never

import torch
from torch import nn

from clip_train.config.schema import (
    DDP,
    AdamW,
    Constant,
    ConstantCooldown,
    Cosine,
    Lamb,
    LayerDecay,
    Lion,
    Muon,
    Recipe,
)
from clip_train.data.order import Order
from clip_train.models.base import Model
from clip_train.runtime import collectives
from clip_train.runtime.parallel import Replicated, Sharded, parallelize
from clip_train.runtime.process import Process
from clip_train.training import optimizer as optimizers
from clip_train.training import schedule as schedules
from clip_train.training.average import WeightAverage
from clip_train.training.layer_decay import layer_scales
from clip_train.training.muon import Share


def build_parallel(recipe: Recipe, model: Model, process: Process) -> nn.Module:
    """The model on its device, spread over the processes; what is returned is what to call in training."""
    training = recipe.training
    arguments = training.parallel.model_dump(exclude={"kind"})
    return parallelize(
        model,
        process,
        Replicated(**arguments) if isinstance(training.parallel, DDP) else Sharded(**arguments),
        compile=training.compile,
        activation_checkpointing=training.activation_checkpointing,
        sync_batch_norm=training.sync_batch_norm,
    )


def build_optimizer(recipe: Recipe, model: Model) -> torch.optim.Optimizer:
    """The optimizer over the model's groups: with decay or without, and one for each learning rate."""
    config, parameters = recipe.optimizer, model.named_parameters()
    arguments: dict[str, Any] = config.model_dump(exclude={"kind", "layer_decay"})
    arguments |= {"no_decay": model.no_weight_decay(), "lr_scales": learning_rate_scales(recipe, model)}
    match config:
        case AdamW():
            return optimizers.adamw(parameters, **arguments)
        case Lamb():
            return optimizers.lamb(parameters, **arguments)
        case Lion():
            return optimizers.lion(parameters, **arguments)
        case Muon():
            return optimizers.muon(parameters, embeddings=model.lookup_tables(), share=share_of_work(), **arguments)
        case _:
            assert_never(config)


def build_average(recipe: Recipe, model: Model) -> WeightAverage | None:
    """The average of the weights, where the recipe keeps one."""
    config = recipe.training.ema
    return None if config is None else WeightAverage(model, **config.model_dump())


def learning_rate_scales(recipe: Recipe, model: Model) -> dict[str, float]:
    """Factors of the learning rate by parameter, where layers learn at different rates."""
    decay = recipe.optimizer.layer_decay
    if decay is None:
        return {}
    if isinstance(decay, LayerDecay):
        return layer_scales(model, {"image": decay.image, "text": decay.text})
    return layer_scales(model, {"image": decay, "text": decay})


def share_of_work() -> Share | None:
    """How processes with the same gradients divide what all of them would repeat."""
    world = collectives.world_size()
    return None if world == 1 else Share(collectives.rank(), world, collectives.add_up_)


def total_steps(recipe: Recipe, order: Order) -> int:
    """Steps of the whole run: as given, or as many as the epochs take, the last batch filled up."""
    if recipe.training.steps is not None:
        return recipe.training.steps
    assert recipe.training.epochs is not None
    step, samples = order.origin
    left = recipe.training.epochs * order.samples - samples
    return step + max(0, -(-left // order.batch_size))


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate of the update after `step` of `steps` updates."""
    config, lr = recipe.schedule, recipe.optimizer.lr
    arguments = config.model_dump(exclude={"kind"})
    match config:
        case Cosine():
            return schedules.cosine(step, lr=lr, steps=steps, **arguments)
        case Constant():
            return schedules.constant(step, lr=lr, **arguments)
        case ConstantCooldown():
            return schedules.constant_cooldown(step, lr=lr, steps=steps, **arguments)
        case _:
            assert_never(config)
