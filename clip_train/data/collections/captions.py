"""Pictures of a folder with their captions in a file beside it: Karpathy's splits of COCO and Flickr30k, COCO's own
annotations, or a table with a line a caption.

- Karpathy and Fei-Fei 2015, `dataset_coco.json`, `dataset_flickr30k.json`: `{"images": [{"filepath", "filename",
  "split", "sentences": [{"raw"}]}]}`.
- COCO, `captions_val2017.json`: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`.
- `.csv`, `.tsv`, `.jsonl`, `.parquet` (also `.gz`): columns as `clip-train data pack` finds them; rows of one picture
  are its captions, in order. A column `split` is read where a split is asked for.

A picture's key is its path below the folder.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from clip_train.data.collections.base import Whole, as_captions, read_picture
from clip_train.data.columns import BadSampleError
from clip_train.data.decode import Pixels
from clip_train.data.pack_shard import lookup
from clip_train.data.pack_sources import choose, open_source
from clip_train.errors import DataError

_Entry = tuple[str, str | None, Any]
"""Path below the folder, split, and a caption or captions."""


class Captions(Whole):
    """A `Collection` with captions; the file is read at once, pictures one by one.

    Args:
        path: the file.
        images: the folder of the pictures; by default the file's own.
        split: entries of this one; `train,restval` takes several.
        image, caption: columns of a table.

    Raises:
        DataError: the file is of no known form, has splits and none was chosen, or names pictures that are not there.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        images: Path | None = None,
        split: str | None = None,
        image: str | None = None,
        caption: str | None = None,
    ) -> None:
        super().__init__(name)
        self.root = path.parent if images is None else images
        if not path.is_file():
            raise DataError(f"{name}: {path} is no file")
        if not self.root.is_dir():
            raise DataError(f"{name}: {self.root} is no folder of pictures: images=FOLDER names it")
        if path.suffix.lower() == ".json":
            if image or caption:
                raise DataError(f"{name}: image and caption are columns of a table; {path.name} is JSON")
            entries = list(_read_json(path, name, self.root))
        else:
            entries = list(_read_table(path, name, split is not None, image, caption))
        captions: dict[str, list[Any]] = {}
        for key, _, found in _of_split(entries, split, name):
            captions.setdefault(key, []).extend(cast("list[Any]", found) if isinstance(found, list) else [found])
        if not captions:
            raise DataError(f"{name}: {path} holds no picture with a caption")
        self._keys, self._captions = list(captions), list(captions.values())
        if gone := [key for key in self._keys if not (self.root / key).is_file()]:
            raise DataError(
                f"{name}: {len(gone):,} of {len(self._keys):,} pictures are not in {self.root}, the first is "
                f"{gone[0]!r}: images=FOLDER names their folder"
            )

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, number: int) -> str:
        return self._keys[number]

    def pixels(self, number: int) -> Pixels:
        return read_picture(self.root / self._keys[number])

    def label(self, number: int) -> int | str:
        raise NotImplementedError("`check` refuses it")

    def captions(self, number: int) -> list[str]:
        return as_captions(self._captions[number])

    def check(self, *, label: bool, captions: bool) -> None:
        if label:
            raise DataError(f"{self.name}: captions are no classes: take kind = 'retrieval', or data with labels")
        for number in range(len(self) if captions else 0):
            try:
                self.captions(number)
            except BadSampleError as error:
                raise DataError(f"{self.name}: picture {self._keys[number]!r}: {error}") from error


def _of_split(entries: list[_Entry], split: str | None, name: str) -> Iterator[_Entry]:
    splits = Counter(one[1] for one in entries)
    shown = ", ".join(f"{one} ({count:,})" for one, count in splits.items())
    if split is None and len(splits) > 1:
        raise DataError(f"{name}: the file holds several splits, {shown}: choose one, ?split=test")
    wanted = None if split is None else split.split(",")
    for one in wanted or ():
        if one not in splits:
            raise DataError(f"{name}: there is no split {one!r}: {'the file names none' if None in splits else shown}")
    return (one for one in entries if wanted is None or one[1] in wanted)


def _read_json(path: Path, name: str, root: Path) -> Iterator[_Entry]:
    try:
        tree: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{name}: {path} cannot be read as JSON: {error}") from error
    found: Any = cast("dict[str, Any]", tree).get("images") if isinstance(tree, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in cast("list[Any]", found)):
        raise DataError(f"{name}: {path} has no list `images`: neither Karpathy's form nor COCO's")
    images, entry = cast("list[dict[str, Any]]", found), None
    try:
        if "annotations" in tree:
            files = {one["id"]: str(one["file_name"]) for one in images}
            for entry in tree["annotations"]:
                yield files[entry["image_id"]], None, entry["caption"]
            return
        for entry in images:
            key = str(entry["filename"])
            if entry.get("filepath") and not (root / key).is_file():
                key = f"{entry['filepath']}/{key}"
            yield key, entry.get("split"), [sentence["raw"] for sentence in entry["sentences"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{name}: {path}: not of the form at {str(entry)[:120]}: {error!r}") from error


def _read_table(path: Path, name: str, split: bool, image: str | None, caption: str | None) -> Iterator[_Entry]:
    source = open_source(path)
    fields = choose(source, image, caption, ["split"] if split else [])
    assert fields.caption is not None
    for number, row in enumerate(source.rows([fields.image, fields.caption, *fields.keep])):
        key = lookup(row, fields.image)
        if isinstance(key, Mapping):
            key = cast("Mapping[str, Any]", key).get("path")
        if not isinstance(key, str) or not key:
            raise DataError(f"{name}: row {number} of {path.name} names no picture in its column {fields.image!r}")
        yield key, str(lookup(row, "split")) if split else None, lookup(row, fields.caption)
