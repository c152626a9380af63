"""Text encoders as probes see them: texts, or pairs of texts, to vectors by every pool at once.

Features are the tower's outputs *before* CLIP's projection, so that every encoder is asked the same; the joint space is
asked for by name. Pairs are encoded in **one sequence**, so that a linear probe sees what the tower made of both.

Under a causal mask the first end-of-text token cannot see what follows it. An encoder that pools there gives a pair the
feature of its first sentence: CLIP's figures on GLUE's pair tasks in Chen et al. 2023 and FLAVA fit that fault.
`acting_pools` finds, by swapping second sentences, which pools see them; pair tasks use no others.

Shapes: `N` texts, `B` of a batch, `L` tokens of its longest, `W` width of the tower, `D` of the joint space.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from clip_train.errors import CheckpointError, DataError
from clip_train.loading import Weights
from clip_train.models.base import TowerOutput
from clip_train.models.pooling import pool_tokens

Vectors = NDArray[np.float32]
_OPEN_CLIP = "open_clip_config.json"
OWN = "own"
"""The pool that the tower was trained with."""


class TextEncoder(Protocol):
    """A frozen text encoder."""

    @property
    def name(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def pools(self) -> tuple[str, ...]:
        """`own` (as trained, before CLIP's projection), then those without parameters."""
        ...

    def features(self, first: Sequence[str], second: Sequence[str] | None = None) -> dict[str, Vectors]:
        """`(N, W)` by every pool, of texts, or of pairs in one sequence each."""
        ...

    def encode(self, texts: Sequence[str], pool: str = OWN) -> Vectors:
        """`(N, W)`."""
        ...

    def encode_pairs(self, first: Sequence[str], second: Sequence[str], pool: str = OWN) -> Vectors:
        """`(N, W)`."""
        ...

    def joint(self, texts: Sequence[str]) -> Vectors | None:
        """`(N, D)` unit vectors of CLIP's joint space; None where there is none."""
        ...


class Sequences(NamedTuple):
    """What a tokenizer made of texts, not padded."""

    ids: list[list[int]]
    types: list[list[int]] | None
    """Which sentence each token belongs to, for towers that are told."""
    cut: int
    """How many lost something to the cap."""


class ProbedTower(Protocol):
    """A tower with its tokenizer, of whatever library."""

    @property
    def module(self) -> nn.Module:
        """What holds the parameters that `run` uses."""
        ...

    @property
    def weights(self) -> Weights | None:
        """Which of a checkpoint of ours were read; None of other libraries', which have one kind."""
        ...

    @property
    def step(self) -> int | None:
        """Updates that its run had done, where that is known."""
        ...

    @property
    def width(self) -> int: ...
    @property
    def pad(self) -> int: ...
    @property
    def eot_id(self) -> int | None: ...
    @property
    def free_pools(self) -> tuple[str, ...]:
        """Parameter-free pools that make sense here."""
        ...

    def tokenise(self, first: Sequence[str], second: Sequence[str] | None) -> Sequences: ...
    def run(self, ids: Tensor, lengths: Tensor, types: Tensor | None) -> TowerOutput:
        """`(B, L)`, `(B,)`, `(B, L)` -> tokens `(B, L, W)` and the own pool's vectors `(B, W)`."""
        ...

    def project(self, pooled: Tensor) -> Tensor | None:
        """Own pool's `(B, W)` -> `(B, D)` of the joint space, not normalised; None where there is none."""
        ...


class PooledEncoder:
    """A `TextEncoder` of a tower: distinct texts once, in batches of like length, all pools of one pass.

    Args:
        batch_tokens: tokens of a batch, padding included, at most (but one text at least).
    """

    def __init__(
        self, name: str, tower: ProbedTower, *, device: torch.device | str = "cpu", batch_tokens: int = 2048
    ) -> None:
        self.name, self.tower, self.batch_tokens = name, tower, batch_tokens
        self.width, self.pools = tower.width, (OWN, *tower.free_pools)
        self.device = torch.device(device)
        tower.module.to(self.device).eval()

    @torch.inference_mode()
    def features(self, first: Sequence[str], second: Sequence[str] | None = None) -> dict[str, Vectors]:
        """See `TextEncoder`. Raises DataError for no texts, or pairs that do not pair up."""
        check_texts(first, second)
        distinct, places = _distinct(first, second)
        sequences = self._tokenised(distinct, pairs=second is not None)
        found = {pool: np.empty((len(distinct), self.width), np.float32) for pool in self.pools}
        for rows in batches([len(ids) for ids in sequences.ids], self.batch_tokens):
            ids, lengths, types = padded(sequences, rows, self.tower.pad)
            ids, types = ids.to(self.device), None if types is None else types.to(self.device)
            output = self.tower.run(ids, lengths, types)
            for pool in self.pools:
                pooled = output.pooled if pool == OWN else self.pool(output, ids, pool)
                found[pool][rows] = pooled.float().cpu().numpy()
        return {pool: vectors[places] for pool, vectors in found.items()}

    def texts_cut(self, first: Sequence[str], second: Sequence[str] | None = None) -> int:
        """How many distinct texts, or pairs in one sequence, lose something to the tower's cap."""
        distinct, _ = _distinct(first, second)
        return self._tokenised(distinct, pairs=second is not None).cut

    def _tokenised(self, distinct: Sequence[tuple[str, str]], *, pairs: bool) -> Sequences:
        return self.tower.tokenise([one for one, _ in distinct], [two for _, two in distinct] if pairs else None)

    def pool(self, output: TowerOutput, ids: Tensor, pool: str) -> Tensor:
        """`(B, W)` by a pool without parameters."""
        # Towers that attend to padding (SigLIP's) fill texts up themselves.
        ids = F.pad(ids, (0, output.tokens.shape[1] - ids.shape[1]), value=self.tower.pad)
        return pool_tokens(output.tokens, output.valid, ids, self.tower.eot_id, pool)  # pyright: ignore[reportArgumentType]

    def encode(self, texts: Sequence[str], pool: str = OWN) -> Vectors:
        return self._one(self.features(texts), pool)

    def encode_pairs(self, first: Sequence[str], second: Sequence[str], pool: str = OWN) -> Vectors:
        return self._one(self.features(first, second), pool)

    @torch.inference_mode()
    def joint(self, texts: Sequence[str]) -> Vectors | None:
        return self.joint_of(self.encode(texts))

    @torch.inference_mode()
    def joint_of(self, own: Vectors) -> Vectors | None:
        """As `joint`, of features that the own pool gave."""
        projected = self.tower.project(torch.from_numpy(own).to(self.device))
        return None if projected is None else F.normalize(projected.float(), dim=-1).cpu().numpy()

    def _one(self, found: dict[str, Vectors], pool: str) -> Vectors:
        if pool not in found:
            raise DataError(f"pool={pool!r} is none of this encoder's: {', '.join(found)}")
        return found[pool]


def open_encoder(
    path: str | os.PathLike[str], *, device: torch.device | str = "cpu", weights: Weights | None = None
) -> PooledEncoder:
    """The encoder of a run folder or checkpoint of ours, a transformers directory, or an open_clip directory.

    Args:
        weights: of a checkpoint of ours; by default those that its recipe's evaluation measures.

    Raises:
        CheckpointError: the path is none of these, or lacks weights or a tokenizer.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder")
    return PooledEncoder(path.name or str(path), _open_tower(path, weights), device=device)


def _open_tower(path: Path, weights: Weights | None) -> ProbedTower:
    # Each is imported where it is wanted: other libraries take seconds.
    if is_ours(path):
        from clip_train.evaluation.text import our_tower

        return our_tower.open_tower(path, weights)
    if (path / _OPEN_CLIP).is_file():
        from clip_train.evaluation.text import open_clip_tower as room
    else:
        from clip_train.evaluation.text import transformers_tower as room
    return room.open_tower(path)


def is_ours(path: Path) -> bool:
    """Whether a path is read as a run folder or checkpoint of ours: it is no directory of another library."""
    return not any((path / name).is_file() for name in (_OPEN_CLIP, "config.json"))


def acting_pools(encoder: TextEncoder, *, pairs: bool, once: bool = False) -> tuple[str, ...]:
    """Pools whose feature depends on the text, or in pairs on the second one: found by swapping it.

    Args:
        once: of pools that are one here (`distinct_pools`) the first alone.

    Raises DataError where there is none.
    """
    texts, other = ["a red apple on the table"] * 2, ["the dog runs home", "two birds sing at dawn"]
    found = encoder.features(texts, other) if pairs else encoder.features(other)
    acting = tuple(pool for pool, (one, two) in found.items() if np.abs(one - two).max() > 1e-5 * np.abs(one).max())
    if not acting:
        what = "the second of two texts" if pairs else "the text"
        raise DataError(f"{encoder.name}: no pool gives a feature that depends on {what}: {', '.join(found)}")
    return tuple(distinct_pools({pool: found[pool] for pool in acting})) if once else acting


def distinct_pools(found: dict[str, Vectors]) -> list[str]:
    """Those whose features are not just another's before them: of single texts `eot` and `last` are one."""
    kept: list[str] = []
    for pool, vectors in found.items():
        if not any(np.array_equal(vectors, found[other]) for other in kept):
            kept.append(pool)
    return kept


def check_texts(first: Sequence[str], second: Sequence[str] | None = None) -> None:
    """Raises DataError for no texts, or two lists of different lengths."""
    if not first:
        raise DataError("there is no text to encode")
    if second is not None and len(first) != len(second):
        raise DataError(f"{len(first)} first and {len(second)} second texts do not pair up")


def batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Numbers of the texts of each batch, longest texts first."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    found: list[list[int]] = []
    while order:
        size = max(1, batch_tokens // lengths[order[0]])
        found.append(order[:size])
        order = order[size:]
    return found


def padded(sequences: Sequences, rows: Sequence[int], pad: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids `(B, L)`, lengths `(B,)` and types `(B, L)` of some of the sequences, int64."""
    lengths = torch.tensor([len(sequences.ids[row]) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), pad)
    types = None if sequences.types is None else torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : lengths[number]] = torch.tensor(sequences.ids[row])
        if types is not None and sequences.types is not None:
            types[number, : lengths[number]] = torch.tensor(sequences.types[row])
    return ids, lengths, types


def joined(first: list[int], second: list[int] | None, room: int) -> tuple[list[int], list[int] | None, bool]:
    """Both cut to `room` tokens together, the longer one first, and whether anything was cut."""
    if second is None:
        return first[:room], None, len(first) > room
    a, b = len(first), len(second)
    if a + b > room:
        half = room // 2
        a, b = (min(a, room - min(b, half)), min(b, half)) if a > b else (min(a, room - half), b)
        b = min(b, room - a)
    return first[:a], second[:b], a < len(first) or b < len(second)


def _distinct(first: Sequence[str], second: Sequence[str] | None) -> tuple[list[tuple[str, str]], NDArray[np.int64]]:
    pairs = list(zip(first, first if second is None else second, strict=True))
    number: dict[tuple[str, str], int] = {}
    places = np.array([number.setdefault(pair, len(number)) for pair in pairs], dtype=np.int64)
    return list(number), places
