"""Data sets of torchvision by the name of their class: `torchvision:CIFAR10?root=FOLDER&split=test`.

Options are the constructor's arguments. `split=train` and `split=test` also serve the sets that call them
`train=true` and `train=false`; a set that has parts needs one to be named. Nothing is downloaded unless
`download=true` says so. A sample's key is its number.
"""

from __future__ import annotations

import difflib
import fcntl
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from PIL import Image

from clip_train.data.collections.base import Whole, as_captions
from clip_train.data.columns import BadSampleError
from clip_train.data.decode import DecodeError, Pixels, cause_of, to_rgb
from clip_train.errors import DataError

_NOT_OPTIONS = {"self", "transform", "target_transform", "transforms", "loader", "is_valid_file", "root"}


class TorchvisionSet(Whole):
    """A `Collection`: targets that are numbers are labels, those that are texts are captions.

    Raises:
        DataError: no such data set, an option it has not, no root, or its files are not there.
    """

    def __init__(self, dataset: str, name: str, options: Mapping[str, str], root: Path | None) -> None:
        self._set = _open(dataset, name, options, root)
        classes: Any = getattr(self._set, "classes", None)
        if isinstance(classes, list | tuple):  # ImageNet's are tuples of synonyms
            own = [one[0] if isinstance(one, tuple) else one for one in cast("Sequence[Any]", classes)]
            classes = cast("list[str]", own) if own and all(isinstance(one, str) for one in own) else None
        super().__init__(name, cast("list[str] | None", classes))
        self._last: tuple[int, Any, Any] | None = None

    def __len__(self) -> int:
        return len(self._set)

    def key(self, number: int) -> str:
        return str(number)

    def pixels(self, number: int) -> Pixels:
        picture, _ = self._read(number)
        if not isinstance(picture, Image.Image):
            raise BadSampleError(f"it is a {type(picture).__name__}: pictures are wanted")
        try:
            return to_rgb(picture)
        except DecodeError:
            raise
        except Exception as error:
            raise DecodeError(f"not a readable picture: {cause_of(error)}") from error

    def label(self, number: int) -> int:
        _, target = self._read(number)
        if hasattr(target, "item") and getattr(target, "ndim", 1) == 0:
            target = target.item()
        if not isinstance(target, int) or isinstance(target, bool):
            raise BadSampleError(f"its target is a {type(target).__name__} ({str(target)[:60]}), not a class")
        return target

    def captions(self, number: int) -> list[str]:
        return as_captions(self._read(number)[1])

    def check(self, *, label: bool, captions: bool) -> None:
        try:
            self.pixels(0)
            if label:
                self.label(0)
            if captions:
                self.captions(0)
        except (BadSampleError, DecodeError) as error:
            raise DataError(f"{self.name}: its first sample cannot be used: {error}") from error

    def _read(self, number: int) -> tuple[Any, Any]:
        """Picture and target; the last one is kept, for a sample is asked for both in turn."""
        if self._last is None or self._last[0] != number:
            try:
                picture, target = self._set[number]
            except Exception as error:  # torchvision's sets raise whatever a damaged file makes them
                raise BadSampleError(f"torchvision cannot read it: {cause_of(error)}") from error
            self._last = number, picture, target
        return self._last[1], self._last[2]


def _open(dataset: str, name: str, options: Mapping[str, str], root: Path | None) -> Any:
    from torchvision import datasets

    known = [one for one in datasets.__all__ if isinstance(getattr(datasets, one), type)]
    if dataset not in known:
        near = difflib.get_close_matches(dataset, known, n=3)
        raise DataError(f"{name}: torchvision has no data set {dataset!r}; {_or('did you mean', near)}")
    made_by: Any = getattr(datasets, dataset)
    signature = inspect.signature(made_by.__init__).parameters
    takes = [one for one, given in signature.items() if one not in _NOT_OPTIONS and given.kind is not given.VAR_KEYWORD]
    free = any(given.kind is given.VAR_KEYWORD for given in signature.values())
    arguments: dict[str, Any] = {}
    for option, value in options.items():
        if option == "root":
            continue
        if option == "split" and option not in signature and "train" in signature:
            if value not in ("train", "test"):
                raise DataError(f"{name}: {dataset} has the splits train and test, not {value!r}")
            arguments["train"] = value == "train"
        elif option in takes or (free and option not in _NOT_OPTIONS):
            keep = option in signature and isinstance(signature[option].default, str)
            arguments[option] = value if keep else _value(value)
        else:
            raise DataError(f"{name}: {dataset} has no option {option!r}; it has {', '.join(['root', *takes])}")
    for part in ("split", "train"):
        if part in signature and part not in arguments:
            raise DataError(f"{name}: {dataset} has several parts: say which, ?split=test")
    if "root" in signature and root is None:
        raise DataError(f"{name}: where do its files lie? ?root=FOLDER")
    if root is not None and "root" not in signature:
        raise DataError(f"{name}: {dataset} has no root")
    if root is not None:
        arguments["root"] = str(root)
    try:
        if not arguments.get("download"):
            return made_by(**arguments)
        assert root is not None
        root.mkdir(parents=True, exist_ok=True)
        with (root / f".{dataset}.lock").open("w") as lock:  # one process downloads, the others then find it there
            fcntl.lockf(lock, fcntl.LOCK_EX)
            return made_by(**arguments)
    except Exception as error:  # what they raise for missing files differs from set to set
        hint = ". ?download=true fetches it" if "download" in takes and not arguments.get("download") else ""
        raise DataError(f"{name}: {dataset} cannot be opened: {error}{hint}") from error


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if text.isascii() and text.isdecimal() else text


def _or(lead: str, names: Sequence[str]) -> str:
    return f"{lead} {' or '.join(names)}?" if names else "see torchvision.datasets"
