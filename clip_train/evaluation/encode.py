"""Texts and pictures to normalised embeddings, and what all evaluations need around that: modes, ranks, errors.

Evaluation runs on every rank at once: each takes a strided part of the work (`items[rank::world]`) and hands its
part to `gather`, which returns every rank's part in the order of ranks. With one process `gather` is `alone`.

Shapes: `N` texts, `L` tokens of the longest text of a batch, `D` width of the joint space.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip_train.errors import DataError, UserError

Part = TypeVar("Part")
Rows = dict[str, npt.NDArray[Any]]
"""Arrays by name with a row a sample; what a task's npz holds."""
Gather = Callable[[Any], list[Any]]
"""Gives every rank's argument, in the order of ranks. Arguments are picklable, tensors among them
on the CPU; `clip_train.runtime.collectives.gather_objects` is one."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Encoder(Protocol):
    """The part of a two-tower model that evaluation uses."""

    training: bool

    def train(self, mode: bool = True) -> Any: ...
    def encode_image(self, images: Tensor) -> Tensor: ...
    def encode_text(self, ids: Tensor, lengths: Tensor) -> Tensor: ...


class Tokenizer(Protocol):
    """The part of a tokenizer that evaluation uses."""

    @property
    def pad(self) -> int: ...
    def encode_batch(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]: ...


class Loaded(Protocol):
    """A model with its preprocessing and tokenizer; `clip_train.loading.LoadedModel` is one."""

    @property
    def model(self) -> Any: ...
    @property
    def preprocess(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...


def alone(part: Part) -> list[Part]:
    """The `gather` of a single process."""
    return [part]


def gathered(gather: Gather, work: Callable[[], Part]) -> list[Part]:
    """Every rank's result of `work`, or the first error that any rank met, raised on all of them.

    A rank that simply raised would leave the others waiting in their next collective for ever.
    """
    part, message = _tried(work)
    replies: list[tuple[str | None, Part]] = gather((message, part))
    for reply in replies:
        if reply[0] is not None:
            raise DataError(reply[0])
    return [reply[1] for reply in replies]


def agreed(gather: Gather, work: Callable[[], Part]) -> Part:
    """This rank's result of `work`, which stays here, or the first error that any rank met, raised on all of them."""
    part, message = _tried(work)
    for reply in gather(message):
        if reply is not None:
            raise DataError(reply)
    assert part is not None
    return part


def _tried(work: Callable[[], Part]) -> tuple[Part | None, str | None]:
    try:
        return work(), None
    except UserError as error:
        return None, str(error)


@contextmanager
def evaluating(model: Encoder, device: torch.device, precision: str) -> Generator[None]:
    """Evaluation mode, no gradients, and the towers' arithmetic in `precision`; the mode is restored after."""
    dtype = DTYPES.get(precision)
    was_training = model.training
    model.train(False)
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            yield
    finally:
        model.train(was_training)


def encode_images(model: Encoder, images: Tensor) -> Tensor:
    """`(b, 3, H, W)` preprocessed -> `(b, D)` float32, normalised."""
    return normalize(model.encode_image(images).float(), dim=-1)


def encode_texts(
    model: Encoder, tokenizer: Tokenizer, texts: Sequence[str], device: torch.device, batch: int = 256
) -> Tensor:
    """`N` texts -> `(N, D)` float32, normalised, in the order given.

    Texts are sorted by length first, so that a batch is only as long as its longest text.
    """
    if not texts:
        raise DataError("there is no text to encode")
    ids, lengths = tokenizer.encode_batch(texts)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    out: Tensor | None = None
    for first in range(0, len(texts), batch):
        rows = order[first : first + batch]
        length = lengths[rows].astype(np.int64)
        padded = np.full((len(rows), int(length.max())), tokenizer.pad, dtype=np.int64)
        for i, row in enumerate(rows):
            padded[i, : length[i]] = ids[starts[row] : starts[row + 1]]
        encoded = model.encode_text(torch.from_numpy(padded).to(device), torch.from_numpy(length).to(device))
        encoded = normalize(encoded.float(), dim=-1)
        if out is None:
            out = torch.empty(len(texts), encoded.shape[1], device=device)
        out[torch.from_numpy(rows).to(device)] = encoded
    assert out is not None
    return out


def in_order(parts: Sequence[Rows]) -> Rows:
    """All ranks' rows in the order of the set: by `number`, which is taken out."""
    numbers = np.concatenate([part["number"] for part in parts])
    order = np.argsort(numbers, kind="stable")
    assert np.array_equal(numbers[order], np.arange(len(numbers))), "samples are missing or were read twice"
    return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0] if name != "number"}


def unstride(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Undo `items[rank::world]` over tensors gathered in the order of ranks: `(n, D)` on the device."""
    world, total = len(parts), sum(len(part) for part in parts)
    out = torch.empty(total, max(part.shape[1] for part in parts), device=device)
    for rank, part in enumerate(parts):
        if len(part):
            out[rank::world] = part.to(device)
    return out
