"""From a recipe to its data: shards, views, batches."""

from __future__ import annotations

from dataclasses import replace

from clip_train.config.schema import Recipe, Source
from clip_train.data.batch import Batch
from clip_train.data.cache import Cache, make_cache
from clip_train.data.loader import Loader
from clip_train.data.stages import Stage
from clip_train.data.stream import Stream, open_source
from clip_train.data.transforms import Augment, Preprocess
from clip_train.errors import ConfigError
from tokenizer import BPETokenizer


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
