"""Self-attention over grids and packed tokens (Vaswani et al. 2017), with what towers add to it for positions.

Shapes: `B` batch, `L` tokens of a sample, `T` packed tokens of a batch, `W` width, `H` heads, `D` size of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.models.packing import Packing, take_rows


@dataclass(frozen=True)
class Layout:
    """How the tokens of a batch lie in memory, and who may attend to whom."""

    causal: bool = False
    """Each token attends to itself and to earlier ones only."""
    valid: Tensor | None = None
    """`(B, L)` bool: keys that may be attended to; `None` means all."""
    packing: Packing | None = None
    """Tokens are packed `(T, W)`; `None` means that they lie in a grid `(B, L, W)`."""
    read: Tensor | None = None
    """`(B,)` int64, the only row of each sample that is read after this block, counted over all rows of the batch;
    it attends to every `valid` token. `None` means that all are read."""
    read_position: Tensor | None = None
    """`(B,)` int64, where in its sample the row of `read` stands; given for texts."""
    bias: Tensor | None = None
    """`(H, L, L)` floating, added to the scores of queries and keys (T5's relative positions)."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines `(L, D)` that turn queries and keys by their positions (RoPE)."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    valid: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q, k, v: `(B, H, Lq | L | L, D)`, one floating dtype.
        causal: query `i` sees keys `0..i` (needs `Lq == L`).
        valid: `(B, L)` bool, keys that may be seen; each sample needs one.
        bias: `(H, Lq, L)` or `(B, H, Lq, L)`, added to the scores.
        scale: factor of the scores before the bias; default `D^-1/2`.

    Returns:
        `(B, H, Lq, D)` in the dtype of `q`. The softmax is computed in fp32.
    """
    # In bf16 on CPU the backward pass of torch's fused kernel takes 3-6 times as long as plain products at
    # the lengths of captions and patches; in fp32 the two are equal, and the fused one needs less memory.
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= 512:
        return _attention_by_products(q, k, v, causal=causal, valid=valid, bias=bias, scale=scale)
    mask = None if valid is None else valid[:, None, None, :]
    if causal and (mask is not None or bias is not None):
        below = _causal_mask(q.shape[2], q.device)
        mask, causal = below if mask is None else mask & below, False
    if bias is not None:
        bias = bias.to(q.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


def _causal_mask(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril_()


def _attention_by_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    valid: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
) -> Tensor:
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if causal:
        scores = scores.masked_fill_(~_causal_mask(q.shape[2], q.device), -torch.inf)
    if valid is not None:
        scores = scores.masked_fill_(~valid[:, None, None, :], -torch.inf)
    # The kernel computes in fp32 and rounds its result once: no fp32 copy of the scores is needed.
    return torch.softmax(scores, dim=-1) @ v


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn pairs of dimensions by their position's angles (Su et al. 2021, RoFormer, equation 34).

    `x` `(B, H, L, D)`; cosines and sines `(L, D)` or `(B, 1, 1, D)`. Dimension `i` is paired with `i + D/2`, as in
    Llama's weights.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cosines.to(x.dtype) + torch.cat([-second, first], dim=-1) * sines.to(x.dtype)


def rotary_angles(length: int, dimensions: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(length, dimensions)` fp32 of `position * base^(-2i / dimensions)`."""
    frequencies = base ** (-torch.arange(0, dimensions, 2, dtype=torch.float32, device=device) / dimensions)
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()


class SelfAttention(nn.Module):
    """Multi-head self-attention with one matrix product for queries, keys and values.

    Args:
        head_dim: size of a head; default `width / heads`.
        bias: whether the products have biases.
        scale: factor of the scores; default `head_dim^-1/2`.
    """

    def __init__(
        self, width: int, heads: int, *, head_dim: int | None = None, bias: bool = True, scale: float | None = None
    ) -> None:
        super().__init__()
        if head_dim is None and width % heads:
            raise ValueError(f"width={width} is not divisible by heads={heads}")
        inner = width if head_dim is None else heads * head_dim
        self.heads, self.scale = heads, scale
        self.qkv = nn.Linear(width, 3 * inner, bias=bias)
        self.out = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`(B, L, W)` or `(T, W)` as `layout` says -> the same, or `(B, 1, W)` where it has `read`."""
        qkv: Tensor = self.qkv(x)
        if layout.read is not None:
            return self.out(self._read_one(qkv, layout, layout.read))
        if layout.packing is not None:
            qkv = layout.packing.unpack(qkv)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if layout.rotary is not None:
            q, k = rotate(q, *layout.rotary), rotate(k, *layout.rotary)
        mixed = attention(q, k, v, causal=layout.causal, valid=layout.valid, bias=layout.bias, scale=self.scale)
        mixed = mixed.transpose(1, 2).flatten(2)
        if layout.packing is not None:
            mixed = layout.packing.pack(mixed)
        return self.out(mixed)

    def _read_one(self, qkv: Tensor, layout: Layout, read: Tensor) -> Tensor:
        inner = self.out.in_features
        q = take_rows(qkv, read)[:, None, :inner].unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = qkv[..., inner:]
        if layout.packing is not None:
            kv = layout.packing.unpack(kv)
        k, v = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = None
        if layout.rotary is not None:
            cosines, sines = (table[layout.read_position][:, None, None] for table in layout.rotary)
            q, k = rotate(q, cosines, sines), rotate(k, *layout.rotary)
        if layout.bias is not None:
            bias = layout.bias[:, layout.read_position].transpose(0, 1)[:, :, None]
        return attention(q, k, v, valid=layout.valid, bias=bias, scale=self.scale).transpose(1, 2).flatten(2)
