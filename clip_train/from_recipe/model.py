"""From a recipe to its vocabulary, towers and loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_never

import numpy as np

from clip_train.config import schema
from clip_train.config.schema import Recipe, ResNet, Timm, VisionTransformer
from clip_train.errors import ConfigError
from clip_train.models.adapters import TimmTower, TransformersText
from clip_train.models.base import Tower
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
        if isinstance(tower, TransformersText):
            check_language_tower(tower, recipe.loss.kind)
    except ValueError as error:
        raise ConfigError(f"the text tower cannot be built: {error}") from error
    kind = "t5" if isinstance(tower, TransformersText) and tower.has_unit_embeddings else recipe.text.kind
    return LanguageModel(tower, build_head(kind, tokenizer.vocab_size, tower.width))


def build_head(kind: str, vocab_size: int, width: int) -> TiedHead | BertHead:
    """What a language model of a text tower's kind has on top."""
    if kind == "bert":
        return BertHead(vocab_size, width)
    return TiedHead(vocab_size, scale=width**-0.5 if kind == "t5" else 1.0)


def check_language_tower(tower: TransformersText, loss: str) -> None:
    """Raises ValueError for an architecture of transformers that a language loss contradicts."""
    if tower.causal != (loss == "clm") and not tower.token_embedding.weight.is_meta:  # there it is not known
        mask, other = ("causal", "clm") if tower.causal else ("bidirectional", "mlm")
        raise ValueError(f"it is {mask}, which loss.kind = {loss!r} does not go with: take loss.kind = {other!r}")
    if tower.token_embedding.embedding_dim != tower.width:
        raise ValueError(
            f"its embeddings are of {tower.token_embedding.embedding_dim} numbers, its tokens of {tower.width}: "
            "a language model needs one width for both (embedding_size = hidden_size in text.arguments)"
        )


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
