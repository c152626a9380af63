"""The generator: a causal transformer over a picture's codes that starts from a few conditioning vectors.

Shapes: `B` pictures, `L` codes of a picture, `K` kinds of code, `P` vectors of a prefix, `W` width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.models.attention import Layout, attention
from clip_train.models.layers import Block, LayerNorm, init_blocks_


class PictureModel(nn.Module):
    """`p(codes | prefix)`, one code after the other, row by row.

    The prefix is `null + offset`: no offset is the unconditional model, and a linear map to the offset is all that an
    encoder under test is given. The last prefix vector is where the first code is predicted.
    """

    def __init__(
        self, codes: int = 512, length: int = 36, width: int = 128, layers: int = 3, heads: int = 4, prefix: int = 4
    ) -> None:
        super().__init__()
        self.length, self.width, self.prefix = length, width, prefix
        self.code_embedding = nn.Embedding(codes, width)
        self.positions = nn.Parameter(torch.empty(length - 1, width))
        self.null = nn.Parameter(torch.empty(prefix, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.final_norm = LayerNorm(width)
        self.head = nn.Linear(width, codes)
        nn.init.normal_(self.code_embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.null, std=0.02)
        init_blocks_(self.blocks)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def prefix_of(self, offset: Tensor | None, batch: int) -> Tensor:
        """`(B, P * W)` or None -> `(B, P, W)`."""
        if offset is None:
            return self.null.expand(batch, -1, -1)
        return self.null + offset.view(batch, self.prefix, self.width)

    def forward(self, ids: Tensor, offset: Tensor | None = None) -> Tensor:
        """int64 `(B, L)`, float `(B, P * W)` -> logits `(B, L, K)`, each of the prefix and earlier codes."""
        known = self.code_embedding(ids[:, :-1]) + self.positions[: ids.shape[1] - 1]
        x = torch.cat([self.prefix_of(offset, len(ids)), known], dim=1)
        for block in self.blocks:
            x = block(x, Layout(causal=True))
        return self.head(self.final_norm(x[:, self.prefix - 1 :]))

    def bits(self, ids: Tensor, offset: Tensor | None = None) -> Tensor:
        """`(B,)` negative log-likelihood in bits a code, the mean over a picture's codes."""
        losses = F.cross_entropy(self(ids, offset).transpose(1, 2), ids, reduction="none")
        return losses.mean(1) / math.log(2)

    @torch.inference_mode()
    def bits_of(self, ids: Tensor, offset: Tensor | None = None, batch: int = 128) -> Tensor:
        """As `bits`, of any number of pictures."""
        parts = range(0, len(ids), batch)
        cut = [slice(start, start + batch) for start in parts]
        return torch.cat([self.bits(ids[part], None if offset is None else offset[part]) for part in cut])

    @torch.inference_mode()
    def sample(
        self, offset: Tensor | None, count: int, *, guidance: float = 1.0, temperature: float = 1.0, seed: int = 0
    ) -> Tensor:
        """Draw pictures.

        Args:
            offset: `(count, P * W)`; None draws from the unconditional model.
            guidance: 1 is the model itself; above, logits go as far beyond the unconditional ones (classifier-free
                guidance, Ho and Salimans 2022).

        Returns:
            int64 `(count, L)`. Picture `i` depends on `seed`, `i` and its own offset, not on the others.
        """
        guided = offset is not None and guidance != 1.0
        x = self.prefix_of(offset, count)
        if guided:
            x = torch.cat([x, self.prefix_of(None, count)])
        noise = torch.rand(count, self.length, generator=torch.Generator().manual_seed(seed))
        cache: list[tuple[Tensor, Tensor] | None] = [None] * len(self.blocks)
        drawn: list[Tensor] = []
        for place in range(self.length):
            logits = self.head(self.final_norm(self._step(x, cache)[:, -1]))
            if guided:
                own, free = logits.chunk(2)
                logits = free + guidance * (own - free)
            cumulative = torch.softmax(logits / temperature, -1).cumsum(-1)
            code = torch.searchsorted(cumulative, noise[:, place, None] * cumulative[:, -1:])[:, 0]
            drawn.append(code)
            if place + 1 < self.length:
                x = (self.code_embedding(code) + self.positions[place])[:, None]
                x = torch.cat([x, x]) if guided else x
        return torch.stack(drawn, 1)

    def _step(self, x: Tensor, cache: list[tuple[Tensor, Tensor] | None]) -> Tensor:
        """Blocks on the newest tokens `(B, l, W)`; keys and values of earlier ones come from `cache` and go there."""
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            qkv: Tensor = block.attention.qkv(block.attention_norm(x))
            q, k, v = qkv.unflatten(-1, (3, block.attention.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            if (earlier := cache[number]) is not None:
                k, v = torch.cat([earlier[0], k], 2), torch.cat([earlier[1], v], 2)
            cache[number] = (k, v)
            mixed = attention(q, k, v, causal=earlier is None).transpose(1, 2).flatten(2)
            x = x + block.attention.out(mixed)
            x = x + block.mlp(block.mlp_norm(x))
        return x


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return re.findall(r"[^\W_]+", text.lower())


class WordPrefix(nn.Module):
    """The neutral conditioning that the generator is trained with: the sum of a caption's word vectors over the root of
    their number, through one linear layer to the prefix. No encoder under test has a part in it.
    """

    def __init__(self, vocabulary: Sequence[str], prefix_size: int, rank: int = 128) -> None:
        super().__init__()
        self.vocabulary = {word: number for number, word in enumerate(vocabulary)}
        self.words = nn.EmbeddingBag(len(vocabulary) or 1, rank, mode="sum")
        self.out = nn.Linear(rank, prefix_size, bias=False)
        nn.init.normal_(self.words.weight, std=0.05)
        nn.init.normal_(self.out.weight, std=0.5 * rank**-0.5)

    def bags(self, texts: Sequence[str]) -> list[list[int]]:
        """The known words of each text, each once."""
        return [sorted({self.vocabulary[word] for word in words_of(text) if word in self.vocabulary}) for text in texts]

    def forward(self, bags: Sequence[Sequence[int]]) -> Tensor:
        """Word numbers of `B` captions -> offset `(B, P * W)`; a caption without a known word gives zeros."""
        flat = torch.tensor([word for bag in bags for word in bag], dtype=torch.int64)
        lengths = torch.tensor([len(bag) for bag in bags])
        weights = torch.repeat_interleave(lengths.clamp(min=1).float().rsqrt(), lengths)
        starts = lengths.cumsum(0) - lengths
        return self.out(self.words(flat, starts, per_sample_weights=weights))
