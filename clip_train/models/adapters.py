"""Towers made of other libraries' models."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from clip_train.models.base import Tower, TowerOutput


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
