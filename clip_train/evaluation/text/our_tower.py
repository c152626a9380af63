"""Text towers of our own checkpoints, CLIPs and language models alike.

Shapes: `B` texts, `L` tokens of the longest, `W` width of the tower, `D` of the joint space.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from clip_train.errors import CheckpointError
from clip_train.evaluation.text.encoder import Sequences, joined
from clip_train.loading import LoadedLanguageModel, Weights, load_any, read_recipe
from clip_train.models.base import TowerOutput
from clip_train.training.checkpoint import read_checkpoint
from tokenizer import BPETokenizer


class OurTower:
    """A text tower with its vocabulary, and the projection behind it where it is a CLIP's.

    Args:
        step: of the checkpoint that it is of.
        weights: which of a checkpoint's they are; None of what was no checkpoint.
    """

    def __init__(
        self,
        text: nn.Module,
        tokenizer: BPETokenizer,
        projection: nn.Module | None = None,
        step: int | None = None,
        weights: Weights | None = None,
    ) -> None:
        self.module, self.tokenizer, self.projection, self.step = text, tokenizer, projection, step
        self.weights: Weights | None = weights
        self.width = int(text.width)  # pyright: ignore[reportArgumentType]
        self.pad, self.eot_id = tokenizer.pad, tokenizer.eot
        self.free_pools = ("eot", "last", "cls", "mean", "max")

    def tokenise(self, first: Sequence[str], second: Sequence[str] | None) -> Sequences:
        """SOT a EOT, or SOT a EOT b EOT."""
        if self.tokenizer.context_length < (3 if second is None else 5):
            raise CheckpointError(f"a cap of {self.tokenizer.context_length} tokens has no room for two texts")
        rows: list[list[int]] = []
        cuts = 0
        room = self.tokenizer.context_length - (2 if second is None else 3)
        for number, text in enumerate(first):
            other = None if second is None else self.tokenizer.encode(second[number])
            a, b, cut = joined(self.tokenizer.encode(text), other, room)
            tail = [] if b is None else [*b, self.tokenizer.eot]
            rows.append([self.tokenizer.sot, *a, self.tokenizer.eot, *tail])
            cuts += cut
        return Sequences(rows, None, cuts)

    def run(self, ids: Tensor, lengths: Tensor, types: Tensor | None) -> TowerOutput:
        return self.module(ids, lengths)

    def project(self, pooled: Tensor) -> Tensor | None:
        return None if self.projection is None else self.projection(pooled)


def open_tower(path: Path, weights: Weights | None = None) -> OurTower:
    """The text tower of a run folder or a checkpoint, of a CLIP or a language model.

    Args:
        weights: by default those that the recipe's evaluation measures (`evaluation.weights`).

    Raises CheckpointError as `clip_train.load`.
    """
    checkpoint = read_checkpoint(path)
    weights = weights or read_recipe(checkpoint).evaluation.weights
    loaded = load_any(checkpoint, weights=weights)
    if isinstance(loaded, LoadedLanguageModel):
        return OurTower(loaded.model.towers["text"], loaded.tokenizer, step=loaded.step, weights=weights)
    return OurTower(
        loaded.model.text, loaded.tokenizer, loaded.model.text_projection, step=loaded.step, weights=weights
    )
