"""How data that are no shards are named: `KIND:PLACE?option=value&option=value`.

    folder:PATH                                               a folder of pictures a class
    captions:FILE?images=FOLDER&split=test                    Karpathy's JSON, COCO's, or a table
    torchvision:CIFAR10?root=FOLDER&split=test                a data set of torchvision
    datasets:NAME_OR_PATH?split=test&image=img&label=label    a data set of Hugging Face's `datasets`

A value may hold `%26` for `&` and `%23`-like escapes for any other sign. Nothing is opened here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from clip_train.errors import ConfigError

OPTIONS: Mapping[str, tuple[str, ...] | None] = {
    "folder": (),
    "captions": ("images", "split", "image", "caption"),
    "torchvision": None,  # those of the data set's class
    "datasets": ("split", "config", "image", "label", "caption", "cache_dir"),
}
"""The kinds, and the options of each."""
_PATHS = {"captions": "images", "torchvision": "root", "datasets": "cache_dir"}
"""The option of each kind that is a path."""


@dataclass(frozen=True)
class Spec:
    """A data set's name, taken apart."""

    kind: str
    place: str
    """A path; of torchvision the class's name, of datasets a name or a path."""
    options: Mapping[str, str]

    def __str__(self) -> str:
        options = "&".join(f"{name}={quote(value, safe='/:~ ,[]@+')}" for name, value in self.options.items())
        return f"{self.kind}:{self.place}" + (f"?{options}" if options else "")

    def anchored(self, anchor: Callable[[str], str]) -> Spec:
        """The same with `anchor` over its paths; a name of `datasets` is a path where there is such a one."""
        place, options = self.place, dict(self.options)
        if self.kind in ("folder", "captions") or (self.kind == "datasets" and Path(anchor(place)).exists()):
            place = anchor(place)
        path = _PATHS.get(self.kind)
        if path in options:
            options[path] = anchor(options[path])
        return Spec(self.kind, place, options)


def is_spec(text: str) -> bool:
    """Whether this names data of one of the kinds, and not a shard."""
    return text.partition(":")[0] in OPTIONS


def parse_spec(text: str) -> Spec:
    """`KIND:PLACE?option=value` taken apart.

    Raises:
        ConfigError: another kind, no place, an option that the kind has not.
    """
    kind, colon, rest = text.partition(":")
    if not colon or kind not in OPTIONS:
        raise ConfigError(
            f"data {text!r} does not begin with one of {', '.join(f'{one}:' for one in OPTIONS)}; shards go to `shards`"
        )
    place, _, query = rest.partition("?")
    if not place:
        raise ConfigError(f"data {text!r}: after {kind}: comes a path or a name")
    options: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        name, equals, value = part.partition("=")
        if not equals or not name or not value:
            raise ConfigError(f"data {text!r}: {part!r} is not of the form option=value")
        if name in options:
            raise ConfigError(f"data {text!r}: {name} is given twice")
        options[name] = unquote(value)
    allowed = OPTIONS[kind]
    for name in options:
        if allowed is not None and name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f"; did you mean {near[0]}?" if near else f": it has {', '.join(allowed) or 'no options'}"
            raise ConfigError(f"data {text!r}: {kind}: has no option {name!r}{hint}")
    return Spec(kind, place, options)
