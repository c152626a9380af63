"""The pieces of a transformer block (Vaswani et al. 2017, pre-norm as in GPT-2 and CLIP).

Shapes: `B` batch, `L` tokens of a sample, `T` packed tokens of a batch, `W` width, `H` heads, `D = W / H`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.models.packing import Packing, take_rows

Activation = Literal["gelu", "quick_gelu"]


class QuickGELU(nn.Module):
    """`x * sigmoid(1.702 x)`, the approximation of OpenAI's weights (Hendrycks & Gimpel 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        # silu(a x) / a is the same function, and keeps one tensor for the backward pass, not three.
        return F.silu(1.702 * x) / 1.702


def activation_module(name: Activation) -> nn.Module:
    """The module of an activation's name."""
    if name == "gelu":
        return nn.GELU()
    if name == "quick_gelu":
        return QuickGELU()
    raise ValueError(f"activation={name!r} is unknown: choose 'gelu' or 'quick_gelu'")


class LayerNorm(nn.LayerNorm):
    """Layer norm with statistics in fp32 whatever the input's dtype, which it keeps."""

    def forward(self, input: Tensor) -> Tensor:
        # Under autocast CUDA answers in fp32; on CPU the kernel takes bf16 and computes in fp32 itself.
        return super().forward(input).to(input.dtype)


def to_compute_dtype(x: Tensor) -> Tensor:
    """`x` in the dtype that autocast computes in, so that the residual stream has it too.

    Without autocast, `x` itself. A bf16 stream halves the memory traffic of everything between the matrix
    products. ViT's starts as the output of a product and is bf16 by itself; text starts as a table look-up.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


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


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, valid: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention.

    Args:
        q, k, v: `(B, H, Lq | L | L, D)`, one floating dtype.
        causal: query `i` sees keys `0..i` (needs `Lq == L`).
        valid: `(B, L)` bool, keys that may be seen; each sample needs one.

    Returns:
        `(B, H, Lq, D)` in the dtype of `q`. The softmax is computed in fp32.
    """
    # In bf16 on CPU the backward pass of torch's fused kernel takes 3-6 times as long as plain products at
    # the lengths of captions and patches; in fp32 the two are equal, and the fused one needs less memory.
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= 512:
        return _attention_by_products(q, k, v, causal=causal, valid=valid)
    mask = None if valid is None else valid[:, None, None, :]
    if causal and mask is not None:
        mask, causal = mask & _causal_mask(q.shape[2], q.device), False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def _causal_mask(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril_()


def _attention_by_products(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, valid: Tensor | None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        scores = scores.masked_fill_(~_causal_mask(q.shape[2], q.device), -torch.inf)
    if valid is not None:
        scores = scores.masked_fill_(~valid[:, None, None, :], -torch.inf)
    # The kernel computes in fp32 and rounds its result once: no fp32 copy of the scores is needed.
    return torch.softmax(scores, dim=-1) @ v


class SelfAttention(nn.Module):
    """Multi-head self-attention with one matrix product for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not divisible by heads={heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`(B, L, W)` or `(T, W)` as `layout` says -> the same, or `(B, 1, W)` where it has `read`."""
        qkv: Tensor = self.qkv(x)
        if layout.read is not None:
            return self.out(self._read_one(qkv, layout, layout.read))
        if layout.packing is not None:
            qkv = layout.packing.unpack(qkv)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = attention(q, k, v, causal=layout.causal, valid=layout.valid).transpose(1, 2).flatten(2)
        if layout.packing is not None:
            mixed = layout.packing.pack(mixed)
        return self.out(mixed)

    def _read_one(self, qkv: Tensor, layout: Layout, read: Tensor) -> Tensor:
        width = self.out.in_features
        q = take_rows(qkv, read)[:, None, :width].unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = qkv[..., width:]
        if layout.packing is not None:
            kv = layout.packing.unpack(kv)
        k, v = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return attention(q, k, v, valid=layout.valid).transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, width: int, hidden: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.activation = activation_module(activation)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, activation: Activation = "gelu") -> None:
        super().__init__()
        self.attention_norm = LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio), activation)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        mixed = self.attention(self.attention_norm(x), layout)
        x = (x if layout.read is None else take_rows(x, layout.read)[:, None]) + mixed
        return x + self.mlp(self.mlp_norm(x))


def init_blocks_(blocks: Iterable[nn.Module]) -> None:
    """Initialise the blocks of one transformer as CLIP does (its released code, `initialize_parameters`).

    The outputs that are added to the residual stream are scaled by `(2 layers)^-1/2`, as in GPT-2.
    """
    blocks = list(blocks)
    for block in blocks:
        assert isinstance(block, Block)
        width = block.attention.out.in_features
        into_stream = width**-0.5 * (2 * len(blocks)) ** -0.5
        nn.init.normal_(block.attention.qkv.weight, std=width**-0.5)
        nn.init.normal_(block.attention.out.weight, std=into_stream)
        nn.init.normal_(block.mlp.up.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.down.weight, std=into_stream)
        for linear in (block.attention.qkv, block.attention.out, block.mlp.up, block.mlp.down):
            nn.init.zeros_(linear.bias)
