"""From a recipe to modules: the one place where configuration meets the plain keyword arguments of the code below."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import torch
from torch import nn

from clip_train.config import schema
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
    ResNet,
    Source,
    Timm,
    VisionTransformer,
)
from clip_train.data.batch import Batch
from clip_train.data.cache import Cache, make_cache
from clip_train.data.loader import Loader
from clip_train.data.order import Order
from clip_train.data.stages import Stage
from clip_train.data.stream import Stream, open_source
from clip_train.data.transforms import Augment, Preprocess
from clip_train.errors import ConfigError
from clip_train.models.adapters import TimmTower, TransformersText
from clip_train.models.base import Model, Tower
from clip_train.models.bert import BertText
from clip_train.models.language import BertHead, LanguageModel, TiedHead
from clip_train.models.modern import ModernText
from clip_train.models.resnet import ModifiedResNet
from clip_train.models.t5 import T5Text
from clip_train.models.text import TextTransformer
from clip_train.models.text_tower import TextTower
from clip_train.models.two_tower import TwoTower
from clip_train.models.vision import VisionTransformer as VisionTransformerTower
from clip_train.objectives.causal_lm import CausalLM
from clip_train.objectives.contrastive import InfoNCE
from clip_train.objectives.masked import MaskedLM
from clip_train.objectives.sigmoid import Sigmoid
from clip_train.runtime import collectives
from clip_train.runtime.parallel import Replicated, Sharded, parallelize
from clip_train.runtime.process import Process
from clip_train.training import optimizer as optimizers
from clip_train.training import schedule as schedules
from clip_train.training.average import WeightAverage
from clip_train.training.layer_decay import layer_scales
from clip_train.training.muon import Share
from clip_train.training.update import Objective
from tokenizer import BPETokenizer
from tokenizer.vocabulary import END_OF_WORD


def build_tokenizer(recipe: Recipe) -> BPETokenizer:
    """The vocabulary: the shipped one, our JSON, OpenAI's merges, or a transformers directory's (of CLIP's kind)."""
    path, cap = recipe.tokenizer.path, recipe.tokenizer.context_length
    try:
        if path == "default":
            return BPETokenizer.default(context_length=cap)
        if Path(path).is_dir():
            return BPETokenizer.from_transformers(path, context_length=cap)
        if path.endswith((".txt", ".txt.gz")):
            return BPETokenizer.from_openai(path, **({} if cap is None else {"context_length": cap}))
        return BPETokenizer.load(path, context_length=cap)
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer.path = {path!r}: {error}") from error


def build_model(recipe: Recipe, tokenizer: BPETokenizer) -> TwoTower | LanguageModel:
    """What the recipe trains, with fresh weights, on the current default device.

    Raises ConfigError where choices contradict each other.
    """
    return build_language_model(recipe, tokenizer) if recipe.is_language else build_two_tower(recipe, tokenizer)


def build_two_tower(recipe: Recipe, tokenizer: BPETokenizer) -> TwoTower:
    """Both towers of a CLIP (paper, section 2.5).

    Raises ConfigError where choices contradict each other, or the recipe trains a text tower alone.
    """
    try:
        return TwoTower(
            image=build_image_tower(recipe),
            text=build_text_tower(recipe, tokenizer),
            embed_dim=recipe.joint.embed_dim,
            init_temperature=recipe.joint.init_temperature,
            init_logit_bias=recipe.loss.init_logit_bias if isinstance(recipe.loss, schema.Sigmoid) else None,
            max_logit_scale=recipe.joint.max_logit_scale,
        )
    except ValueError as error:
        raise ConfigError(f"the towers cannot be built: {error}") from error


def build_language_model(recipe: Recipe, tokenizer: BPETokenizer) -> LanguageModel:
    """A text tower with the head of its kind. Raises ConfigError where choices contradict each other."""
    try:
        tower = build_text_tower(recipe, tokenizer)
    except ValueError as error:
        raise ConfigError(f"the text tower cannot be built: {error}") from error
    return LanguageModel(tower, build_head(recipe.text.kind, tokenizer.vocab_size, tower.width))


def build_head(kind: str, vocab_size: int, width: int) -> TiedHead | BertHead:
    """What a language model of a text tower's kind has on top."""
    if kind == "bert":
        return BertHead(vocab_size, width)
    return TiedHead(vocab_size, scale=width**-0.5 if kind == "t5" else 1.0)


def build_image_tower(recipe: Recipe) -> Tower:
    """The image tower of the recipe's kind."""
    image = recipe.vision
    arguments = image.model_dump(exclude={"kind"})
    match image:
        case VisionTransformer():
            smaller = [stage.image_size for stage in recipe.training.stages if stage.image_size is not None]
            return VisionTransformerTower(**arguments, smaller_sizes=smaller)
        case ResNet():
            return ModifiedResNet(**arguments)
        case Timm():
            return TimmTower(image.name, image.image_size, pretrained=image.pretrained, **image.arguments)
        case _:
            assert_never(image)


def build_text_tower(recipe: Recipe, tokenizer: BPETokenizer) -> TextTower:
    """The text tower of the recipe's kind. Raises ValueError where choices contradict each other."""
    text = recipe.text
    arguments: dict[str, Any] = text.model_dump(exclude={"kind"}) | {
        "vocab_size": tokenizer.vocab_size,
        "context_length": tokenizer.context_length,
        "eot_id": tokenizer.eot,
    }
    match text:
        case schema.TextTransformer():
            return TextTransformer(**arguments, pad_id=tokenizer.pad)
        case schema.BertText():
            return BertText(**arguments)
        case schema.T5Text():
            return T5Text(**arguments)
        case schema.ModernText():
            return ModernText(**arguments)
        case schema.TransformersText():
            if text.path is not None:
                check_vocabulary(text.path, tokenizer)
            return TransformersText(**arguments)
        case _:
            assert_never(text)


def check_vocabulary(path: str, tokenizer: BPETokenizer) -> None:
    """Raises ConfigError unless the weights in a transformers directory were trained with the recipe's vocabulary."""
    if not (Path(path) / "tokenizer.json").is_file():
        raise ConfigError(
            f"text.path = {path!r} has no tokenizer.json: nothing says which words its ids stand for. Save its "
            "tokenizer there, or train the architecture from scratch with text.name"
        )
    try:
        theirs = BPETokenizer.from_transformers(path).vocabulary
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"text.path = {path!r}: its tokenizer cannot be that of a run ({error}), and with another its weights "
            "would read other words. Train the architecture from scratch with text.name"
        ) from error
    ours = tokenizer.vocabulary
    if (theirs.merges, theirs.special_ids) != (ours.merges, ours.special_ids):
        raise ConfigError(
            f"text.path = {path!r} was trained with another vocabulary, of {theirs.size} ids; the recipe's has "
            f"{ours.size}. Set tokenizer.path = {path!r}"
        )


def build_objective(recipe: Recipe, tokenizer: BPETokenizer) -> Objective:
    """The loss. Raises ConfigError where the vocabulary lacks what it needs."""
    match recipe.loss:
        case schema.MaskedLM() as config:
            return build_masked_lm(config, tokenizer)
        case schema.CausalLM():
            return CausalLM()
        case config:
            return build_contrastive(config)


def build_contrastive(config: schema.InfoNCE | schema.Sigmoid) -> InfoNCE | Sigmoid:
    """A loss over pairs."""
    match config:
        case schema.InfoNCE():
            return InfoNCE(**config.model_dump(exclude={"kind"}))
        case schema.Sigmoid():
            return Sigmoid(**config.model_dump(exclude={"kind", "init_logit_bias"}))
        case _:
            assert_never(config)


def build_masked_lm(config: schema.MaskedLM, tokenizer: BPETokenizer) -> MaskedLM:
    """Masking for a vocabulary. Raises ConfigError where it has no MASK."""
    if tokenizer.mask is None:
        raise ConfigError(
            "loss.kind = 'mlm' needs a vocabulary with a mask token, which OpenAI's has not: take tokenizer.path = "
            "'default', or learn one (clip-train tokenizer train)"
        )
    vocabulary = tokenizer.vocabulary
    return MaskedLM(
        vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask,
        special_ids=tuple(sorted(set(vocabulary.special_ids.values()))),
        rate=config.rate,
        word_ends=np.array([t.endswith(END_OF_WORD) for t in vocabulary.tokens]) if config.whole_words else None,
    )


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
            return optimizers.muon(parameters, share=share_of_work(), **arguments)
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


def build_preprocess(recipe: Recipe) -> Preprocess:
    """How a picture becomes the image tower's input."""
    return Preprocess(size=recipe.vision.image_size, **recipe.preprocess.model_dump())


def build_stream(recipe: Recipe, tokenizer: BPETokenizer, *, rank: int = 0, world: int = 1) -> Stream:
    """The training data as this process sees it. Opens and indexes every shard.

    Raises DataError for missing shards or keys, and where the batch is larger than the data.
    """
    data = recipe.data
    return Stream(
        [
            open_source(
                name,
                **source.model_dump(exclude={"image", "augment"}),
                image=None if recipe.image is None else source.image,
                augment=None if recipe.image is None or source.augment is None else build_augment(recipe, source),
                cache=build_cache(recipe),
                show=rank == 0,
            )
            for name, source in data.sources.items()
        ],
        tokenizer,
        None if recipe.image is None else build_augment(recipe),
        seed=recipe.training.seed,
        batch_size=data.batch_size,
        lanes=data.lanes,
        window=data.shuffle_window,
        sampling=data.sampling,
        rank=rank,
        world=world,
        cache_decoded=int((data.cache_decoded_gib or 4) * 2**30) // max(1, data.workers) if data.cache_decoded else 0,
        threads=data.threads,
        stages=build_stages(recipe, tokenizer),
    )


def build_stages(recipe: Recipe, tokenizer: BPETokenizer) -> list[Stage]:
    """The smaller sizes of the first steps. Raises ConfigError for captions longer than the vocabulary's cap."""
    size = None if recipe.image is None else recipe.image.image_size
    cap = tokenizer.context_length
    stages = [
        Stage(stage.until_step, stage.image_size or size, stage.context_length or cap)
        for stage in recipe.training.stages
    ]
    for stage in stages:
        if stage.context_length > cap:
            raise ConfigError(f"training.stages: context_length = {stage.context_length} is above the run's own, {cap}")
    return stages


def build_cache(recipe: Recipe, *, commands: bool = True) -> Cache:
    """Where shards from elsewhere are kept. `commands`: for the training data of a recipe that the user runs, whose
    `pipe:` shards may run too.
    """
    return replace(make_cache(recipe.data.cache_dir, recipe.data.cache_gib), commands=commands)


def build_loader(
    recipe: Recipe, stream: Stream, first_step: int, steps: int, *, pin_memory: bool = False
) -> Loader[Batch]:
    """Batches of the steps from `first_step` to the last of `steps`, read ahead by the recipe's workers."""
    size = 0 if recipe.image is None else recipe.image.image_size
    return Loader(
        stream,
        range(first_step, steps),
        workers=recipe.data.workers,
        pin_memory=pin_memory,
        item_bytes=3 * size * size * stream.batch_size // stream.world,
    )


def build_augment(recipe: Recipe, source: Source | None = None) -> Augment:
    """The random views of training: a source's own, or the shared ones."""
    own = None if source is None else source.augment
    arguments = (own or recipe.data.augment).model_dump()
    arguments |= arguments.pop("color")
    if (chosen := arguments.pop("rand_augment")) is not None:
        from clip_train.data.rand_augment import RandAugment  # torchvision: seconds, and most runs do without

        arguments["rand_augment"] = RandAugment(**chosen)
    return Augment(
        size=recipe.vision.image_size,
        interpolation=recipe.preprocess.interpolation,
        scaled_decode=recipe.data.scaled_decode,
        **arguments,
    )
