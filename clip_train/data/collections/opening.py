"""From a name to a collection."""

from __future__ import annotations

from pathlib import Path

from clip_train.data.collections.base import Collection
from clip_train.data.collections.captions import Captions
from clip_train.data.collections.folder import Folder
from clip_train.data.collections.hugging_face import HuggingFace
from clip_train.data.collections.torchvision_sets import TorchvisionSet
from clip_train.dataset_spec import parse_spec


def open_collection(text: str, relative_to: Path | None = None) -> Collection:
    """What `folder:…`, `captions:…`, `torchvision:…` or `datasets:…` names.

    Args:
        relative_to: where relative paths are looked for before the working directory.

    Raises:
        ConfigError: no such kind or option.
        DataError: it is not there, or not what it is called.
    """

    def path(place: str) -> Path:
        own = Path(place).expanduser()
        beside = Path(relative_to or ".", own)
        return beside if beside.exists() else own

    spec = parse_spec(text)
    options = spec.options
    if spec.kind == "folder":
        return Folder(path(spec.place), text)
    if spec.kind == "captions":
        images = path(options["images"]) if "images" in options else None
        columns = {name: options.get(name) for name in ("split", "image", "caption")}
        return Captions(path(spec.place), text, images=images, **columns)
    if spec.kind == "torchvision":
        return TorchvisionSet(spec.place, text, options, path(options["root"]) if "root" in options else None)
    return HuggingFace(spec.place, text, options, relative_to)
