"""Towers made of other libraries' models."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from clip_train.models.base import Tower, TowerOutput
from clip_train.models.pooling import Pool
from clip_train.models.text_tower import TextTower, refuse_first_of_causal


class TimmTower(Tower):
    """Any timm backbone as image tower: its features and its own pooling, without the classifier.

    Args:
        name: a name timm knows (`timm.list_models()`).
        image_size: height and width of the input in pixels.
        pretrained: start from timm's weights (downloads them).
        **arguments: passed to `timm.create_model`.

    Raises:
        ValueError: timm does not know the name; the nearest ones are listed.
    """

    def __init__(self, name: str, image_size: int, pretrained: bool = False, **arguments: Any) -> None:
        super().__init__()
        import timm  # seconds to import, and most models do without

        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=3)
            raise ValueError(f"timm has no model {name!r}" + (f"; nearest: {', '.join(near)}" if near else ""))
        arguments = {"pretrained": pretrained, "num_classes": 0, **arguments}
        # What it takes to build the backbone again without weights, for exports.
        self.arguments = {key: value for key, value in arguments.items() if key not in ("pretrained", "num_classes")}
        try:
            self.backbone: Any = timm.create_model(name, img_size=image_size, **arguments)
            self.arguments["img_size"] = image_size
        except TypeError as error:
            # Convolutional models take any size and know no such argument.
            if "img_size" not in str(error):
                raise
            self.backbone = timm.create_model(name, **arguments)
        # Convolution kernels are faster on channels-last weights and pictures.
        self.backbone = self.backbone.to(memory_format=torch.channels_last)
        self.image_size = image_size
        self.width = int(getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features)
        stages = getattr(self.backbone, "blocks", None) or getattr(self.backbone, "stages", None)
        self.blocks = [module for module in stages or self.backbone.children() if isinstance(module, nn.Module)]

    def forward(self, images: Tensor, *, pooled_only: bool = False) -> TowerOutput:
        """`images` `(B, 3, image_size, image_size)` float, normalised. Tokens: cells of the last map, always all."""
        features: Tensor = self.backbone.forward_features(images.contiguous(memory_format=torch.channels_last))
        pooled: Tensor = self.backbone.forward_head(features, pre_logits=True)
        if features.ndim == 4:
            channels_last = features.shape[-1] == self.backbone.num_features != features.shape[1]
            features = features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
        valid = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        return TowerOutput(features, valid, pooled)

    def no_weight_decay(self) -> set[str]:
        """Gains, biases, and what timm says of the backbone."""
        own: set[str] = getattr(self.backbone, "no_weight_decay", set[str])()
        named = {name for name, _ in self.named_parameters()}
        return super().no_weight_decay() | ({f"backbone.{name}" for name in own} & named)


class TransformersText(TextTower):
    """Any text encoder of transformers, from scratch by its configuration or from a local directory with weights.

    Its tokens are the last hidden states; its own pooler is left out, `pool` takes its place. It computes on the padded
    grid, where the attention mask hides padding. Nothing is ever asked of a hub, and no code of a directory runs.
    Dropout is as the configuration says (0.1 in many: `arguments = {hidden_dropout_prob = 0.0}` and the like).

    Parameters have transformers' names behind `backbone.`.

    Args:
        name: a `model_type` transformers knows (`bert`, `modernbert`, `t5`, ...): fresh weights.
        path: a directory as `save_pretrained` writes it, with safetensors; its weights are where training starts.
        arguments: of the configuration of `name` (`hidden_size`, `num_hidden_layers`, ...).
        pool, eot_id: see `TextTower`.

    Raises:
        ValueError: transformers is not installed; not one of `name` and `path`; an unknown name or argument; a
            directory without configuration or weights, or with fewer ids than the vocabulary; an architecture that is
            no encoder of texts as long as `context_length`, or that leaves parameters without a part in its tokens.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        *,
        name: str | None = None,
        path: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        pool: Pool = "mean",
        eot_id: int | None = None,
    ) -> None:
        if (name is None) == (path is None):
            raise ValueError("give either name (an architecture from scratch) or path (a directory with weights)")
        if path is not None and arguments:
            raise ValueError(f"arguments are of an architecture by name; {path} brings its own configuration")
        if find_spec("transformers") is None:
            raise ValueError("a text tower of transformers needs that library: pip install 'clip-train[probe]'")
        backbone: Any = (
            _from_scratch(name, vocab_size, arguments or {}) if name else _from_directory(str(path), vocab_size)
        )
        signature = inspect.signature(backbone.forward).parameters
        if "inputs_embeds" not in signature or "attention_mask" not in signature:
            raise ValueError(f"{name or path}: {type(backbone).__name__} is no encoder of masked texts")
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None
        super().__init__(
            vocab_size, context_length, _width(backbone), causal=False, pool=pool, eot_id=eot_id, packed=False
        )
        self.backbone = backbone
        self.flops_of_length: dict[int, float] = {}
        """What `models/flops.py` has counted."""
        self._try_out(name or str(path))
        refuse_first_of_causal(self.causal, pool)
        self.attention_pool = self.make_attention_pool(_heads(backbone))

    @property
    def token_embedding(self) -> nn.Embedding:  # type: ignore[override]
        """The backbone's own."""
        return self.backbone.get_input_embeddings()

    @property
    def has_unit_embeddings(self) -> bool:
        """Whether embeddings begin with unit variance, as T5's do; a head that shares them scales tokens down."""
        return self.backbone.config.model_type in ("t5", "mt5", "umt5", "longt5", "switch_transformers")

    @property
    def blocks(self) -> list[nn.Module]:  # type: ignore[override]
        """The layers: the longest list of modules in the backbone."""
        lists = [module for module in self.backbone.modules() if isinstance(module, nn.ModuleList)]
        return list(max(lists, key=len)) if lists else [self.backbone]

    def forward(self, ids: Tensor, lengths: Tensor | None = None, *, pooled_only: bool = False) -> TowerOutput:
        """See `TextTower.forward`; all tokens are always computed."""
        lengths = self.checked_lengths(ids, lengths)
        valid = torch.arange(ids.shape[1], device=ids.device) < lengths.to(ids.device, non_blocking=True)[:, None]
        tokens = self._tokens(ids, valid)
        return TowerOutput(tokens, valid, self.pooled(tokens, valid, ids))

    def _tokens(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        # Of embeddings, not ids: what some models make of an id they take for padding would depend on our vocabulary.
        output = self.backbone(
            inputs_embeds=self.token_embedding(ids), attention_mask=None if valid is None else valid.long()
        )
        return output.last_hidden_state

    def _try_out(self, what: str) -> None:
        """One text of the greatest length, forward and backward, before anything is trained on it."""
        training = self.backbone.training
        self.backbone.eval()
        weight = self.token_embedding.weight
        # Masks of decoders ask for values, which tensors on meta have not; fake ones say so.
        mode = FakeTensorMode(allow_non_fake_inputs=True) if weight.is_meta else nullcontext()
        try:
            with torch.enable_grad(), mode:
                ids = torch.arange(self.context_length, device=weight.device)[None] % self.vocab_size
                tokens = self._tokens(ids)
        except (IndexError, RuntimeError) as error:
            raise ValueError(
                f"{what}: no text of {self.context_length} tokens can be encoded ({error}). Has its configuration "
                "enough positions (max_position_embeddings)? Else lower tokenizer.context_length"
            ) from error
        named = [(name, parameter) for name, parameter in self.backbone.named_parameters() if parameter.requires_grad]
        found: Any = torch.autograd.grad(tokens.sum(), [parameter for _, parameter in named], allow_unused=True)
        if unused := [name for (name, _), gradient in zip(named, found, strict=True) if gradient is None]:
            raise ValueError(f"{what}: {', '.join(unused[:3])} take no part in its tokens and could not be trained")
        if weight.device.type != "meta" and self.context_length > 1:
            changed = ids.clone()
            changed[0, -1] = (changed[0, -1] + 1) % self.vocab_size
            with torch.no_grad():
                self.causal = torch.equal(self._tokens(changed)[0, 0], tokens[0, 0])
        self.backbone.train(training)


def _from_scratch(name: str, vocab_size: int, arguments: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    if name not in CONFIG_MAPPING:
        near = difflib.get_close_matches(name, list(CONFIG_MAPPING.keys()), n=3)
        raise ValueError(f"transformers has no model_type {name!r}" + (f"; nearest: {', '.join(near)}" if near else ""))
    known = AutoConfig.for_model(name)
    for key in arguments:
        if not hasattr(known, key):  # transformers would take it and do nothing
            near = difflib.get_close_matches(key, list(known.to_dict()), n=3)
            raise ValueError(f"{name} has no argument {key!r}" + (f"; nearest: {', '.join(near)}" if near else ""))
    if arguments.get("vocab_size", vocab_size) != vocab_size:
        raise ValueError(f"vocab_size = {arguments['vocab_size']}, but the recipe's tokenizer has {vocab_size} ids")
    sizes: dict[str, Any] = {"vocab_size": vocab_size}
    for role in ("bos", "eos", "cls", "sep", "pad"):  # ids of another vocabulary, which ours may not reach
        if (getattr(known, f"{role}_token_id", None) or 0) >= vocab_size:
            sizes[f"{role}_token_id"] = 0 if role == "pad" else None
    try:
        config = AutoConfig.for_model(name, **{**sizes, **arguments})
        backbone = _encoder(_auto_class(config).from_config(config), config)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"{name}: {error}") from error
    embedding = backbone.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:
        # The id that transformers pads with is a token like any other in our vocabulary: it learns like any other.
        with torch.no_grad():
            embedding.weight[embedding.padding_idx].normal_(std=float(getattr(config, "initializer_range", 0.02)))
        embedding.padding_idx = None
    return backbone


def _from_directory(path: str, vocab_size: int) -> Any:
    from transformers import AutoConfig

    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{path} is no directory of a transformers model: there is no config.json")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{path} has no *.safetensors weights: save the model there with save_pretrained")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(path, **options)
    if config.vocab_size < vocab_size:
        raise ValueError(f"{path} has {config.vocab_size} ids, the recipe's tokenizer {vocab_size}")
    kind = _auto_class(config)
    if torch.get_default_device().type == "meta":  # an estimate, or weights to come from a checkpoint
        return _encoder(kind.from_config(config), config)
    return _encoder(kind.from_pretrained(path, use_safetensors=True, dtype=torch.float32, **options), config)


def _auto_class(config: Any) -> Any:
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoModel, AutoModelForTextEncoding

    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def _encoder(model: Any, config: Any) -> Any:
    if hasattr(config, "use_cache"):
        config.use_cache = False
    whole = getattr(config, "is_encoder_decoder", False) and hasattr(model, "decoder")
    return model.get_encoder() if whole else model


def _width(backbone: Any) -> int:
    return int(getattr(backbone.config, "hidden_size", None) or backbone.config.d_model)


def _heads(backbone: Any) -> int:
    return int(getattr(backbone.config, "num_attention_heads", 1))
