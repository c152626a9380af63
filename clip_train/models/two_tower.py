"""Two towers and one joint space: the CLIP model (Radford et al. 2021, figure 3).

Shapes: `B` batch, `L` longest caption, `W` a tower's width, `D` size of the joint space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.models.base import Model, Tower, TowerOutput


class TwoTower(Model):
    """An image tower and a text tower, each projected linearly into a joint space of `embed_dim` dimensions.

    Args:
        init_temperature: `logit_scale` starts at the log of its inverse.
        init_logit_bias: where `logit_bias` starts, which exists only then: for losses that add a bias to the logits.
        max_logit_scale: what `after_update_` clamps `exp(logit_scale)` to.
    """

    def __init__(
        self,
        image: Tower,
        text: Tower,
        embed_dim: int,
        *,
        init_temperature: float = 0.07,
        init_logit_bias: float | None = None,
        max_logit_scale: float = 100.0,
    ) -> None:
        super().__init__()
        self.image, self.text, self.embed_dim = image, text, embed_dim
        self.image_projection = _projection(image, embed_dim)
        self.text_projection = _projection(text, embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / init_temperature)))
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.tensor(init_logit_bias))
        self.max_logit_scale = max_logit_scale

    @property
    def towers(self) -> Mapping[str, Tower]:
        """Both."""
        return {"image": self.image, "text": self.text}

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """`images` `(B, 3, H, W)` float, normalised -> features `(B, D)` fp32, of unit length by default."""
        output: TowerOutput = self.image(images, pooled_only=True)
        return _finish(self.image_projection(output.pooled), normalize)

    def encode_text(self, ids: Tensor, lengths: Tensor | None = None, normalize: bool = True) -> Tensor:
        """`ids` `(B, L)`, `lengths` `(B,)` (see `TextTransformer.forward`) -> features `(B, D)` fp32."""
        output: TowerOutput = self.text(ids, lengths, pooled_only=True)
        return _finish(self.text_projection(output.pooled), normalize)

    def forward(self, images: Tensor, ids: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, ...]:
        """Unit image features `(B, D)`, unit text features `(B, D)`, `exp(logit_scale)`, and `logit_bias` where there
        is one, all fp32.

        One call holds every parameter, as data-parallel wrapping requires.
        """
        scalars = [self.logit_scale.exp()] + ([] if self.logit_bias is None else [self.logit_bias])
        return self.encode_image(images), self.encode_text(ids, lengths), *scalars

    @torch.no_grad()
    def after_update_(self) -> None:
        """Keep `exp(logit_scale)` at `max_logit_scale` or below (section 2.5)."""
        self.logit_scale.clamp_(max=math.log(self.max_logit_scale))


def _projection(tower: Tower, embed_dim: int) -> nn.Linear | nn.Identity:
    if not tower.projection:
        if tower.width != embed_dim:
            raise ValueError(
                f"a tower without projection has the joint space's width: width={tower.width}, embed_dim={embed_dim}"
            )
        return nn.Identity()
    projection = nn.Linear(tower.width, embed_dim, bias=tower.projection_bias)
    nn.init.normal_(projection.weight, std=tower.width**-0.5)
    if tower.projection_bias:
        nn.init.zeros_(projection.bias)
    return projection


def _finish(features: Tensor, normalize: bool) -> Tensor:
    # The norm is taken in fp32: in bf16 "unit" vectors are off by up to 0.4 %.
    features = features.float()
    return F.normalize(features, dim=-1) if normalize else features
