"""Data sets of Hugging Face's `datasets`: `datasets:PLACE?split=test&image=img&label=label`.

PLACE is a folder that `save_to_disk` wrote, a folder of parquet files or of pictures (imagefolder), a `.parquet`
file, or a name on the hub. Rows are read from memory-mapped tables as they are asked for. Columns that are not named
are found by their types: the one of pictures, the one of classes. A sample's key is its number.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from clip_train.data.collections.base import Whole, as_captions, read_picture
from clip_train.data.columns import BadSampleError
from clip_train.data.decode import Pixels, decode
from clip_train.data.pack_shard import CAPTION_FIELDS
from clip_train.data.pack_sources import IMAGE_FIELDS
from clip_train.errors import DataError

_LABELS = ("label", "labels", "fine_label", "class", "target", "cls")


class HuggingFace(Whole):
    """A `Collection`; labels have names where the column is a ClassLabel.

    Raises:
        DataError: `datasets` is not installed, the set cannot be opened, has no such split or column.
    """

    def __init__(self, place: str, name: str, options: Mapping[str, str], relative_to: Path | None = None) -> None:
        rows: Any = _split(_load(place, name, options, relative_to), options.get("split"), name)
        self._features: Mapping[str, Any] = rows.features
        self._image = self._column("image", options.get("image"), name, IMAGE_FIELDS, "Image")
        if self._image is None:
            raise DataError(f"{name}: which column holds the pictures? {self._shown()}. ?image=COLUMN names it")
        self._label = self._column("label", options.get("label"), name, _LABELS, "ClassLabel")
        self._caption = self._column("caption", options.get("caption"), name, CAPTION_FIELDS, None)
        if type(self._features[self._image]).__name__ == "Image":
            import datasets

            rows = rows.cast_column(self._image, datasets.Image(decode=False))  # pyright: ignore
        self._rows = rows
        names: Any = getattr(self._features.get(self._label or ""), "names", None)
        super().__init__(name, list(names) if names else None)

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, number: int) -> str:
        return str(number)

    def pixels(self, number: int) -> Pixels:
        found = self._cell(number, self._image)
        if isinstance(found, Mapping):
            cell = cast("Mapping[str, Any]", found)
            found = cell.get("bytes") or cell.get("path")
        if isinstance(found, bytes):
            return decode(found)
        if not isinstance(found, str):
            raise BadSampleError(f"its {self._image} is a {type(found).__name__}: bytes or a path are wanted")
        return read_picture(Path(found))

    def label(self, number: int) -> int | str:
        found = self._cell(number, self._label)
        if isinstance(found, str) and found.strip():
            return found.strip()
        if not isinstance(found, int) or isinstance(found, bool) or found < 0:
            raise BadSampleError(f"its {self._label} is {str(found)[:60]}: a class is wanted")
        return found

    def captions(self, number: int) -> list[str]:
        return as_captions(self._cell(number, self._caption))

    def check(self, *, label: bool, captions: bool) -> None:
        for wanted, column, what in ((label, self._label, "label"), (captions, self._caption, "caption")):
            if wanted and column is None:
                raise DataError(f"{self.name}: which column holds a {what}? {self._shown()}. ?{what}=COLUMN names it")
        if len(self) == 0:
            raise DataError(f"{self.name}: holds no rows")

    def _cell(self, number: int, column: str | None) -> Any:
        assert column is not None, "`check` was not asked"
        table: Any = self._rows.select_columns([column])  # a view: the other columns are not read
        return table[number][column]

    def _column(
        self, what: str, wanted: str | None, name: str, usual: Sequence[str], feature: str | None
    ) -> str | None:
        """The column that is named, else the only one of a type, else the first with a usual name."""
        if wanted is not None:
            if wanted in self._features:
                return wanted
            near = difflib.get_close_matches(wanted, self._features, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{name}: there is no column {wanted!r} ({what}).{hint} {self._shown()}")
        typed = [one for one, kind in self._features.items() if type(kind).__name__ == feature]
        if len(typed) == 1:
            return typed[0]
        return next((one for one in usual if one in self._features), None)

    def _shown(self) -> str:
        kinds = (f"{one} ({type(kind).__name__})" for one, kind in self._features.items())
        return f"There are: {', '.join(kinds)}"


def _load(place: str, name: str, options: Mapping[str, str], relative_to: Path | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{name}: needs Hugging Face's datasets: pip install 'clip-train[datasets]'") from error
    path = next((one for one in (Path(relative_to or ".", place), Path(place)) if one.exists()), None)
    hub: Any = datasets
    config, cache = options.get("config"), options.get("cache_dir")
    try:
        if path is None:
            return hub.load_dataset(place, config, cache_dir=cache)
        if path.suffix == ".parquet":
            return hub.load_dataset("parquet", data_files=str(path), cache_dir=cache)
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return hub.load_from_disk(str(path))
        return hub.load_dataset(str(path), config, cache_dir=cache)
    except Exception as error:  # it raises errors of many libraries
        what = "is no file or folder here, and not to be had from the hub" if path is None else "cannot be opened"
        raise DataError(f"{name}: {place} {what}: {str(error)[:300]}") from error


def _split(loaded: Any, wanted: str | None, name: str) -> Any:
    if not isinstance(loaded, Mapping):
        if wanted is not None:
            raise DataError(f"{name}: has no splits: leave ?split={wanted} out")
        return loaded
    splits = cast("Mapping[str, Any]", loaded)
    shown = ", ".join(f"{one} ({len(rows):,})" for one, rows in splits.items())
    if wanted is None:
        if len(splits) == 1:
            return next(iter(splits.values()))
        raise DataError(f"{name}: has the splits {shown}: choose one, ?split=test")
    if wanted not in splits:
        raise DataError(f"{name}: has no split {wanted!r}, only {shown}")
    return splits[wanted]
