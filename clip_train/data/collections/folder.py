"""A folder with a folder of pictures for each class, as torchvision's ImageFolder reads it.

Classes are sorted as people count (`class2` before `class10`); so are pictures. A picture's key is its path below the
folder.
"""

from __future__ import annotations

from pathlib import Path

from clip_train.data.collections.base import Whole, natural, read_picture
from clip_train.data.decode import Pixels
from clip_train.data.pack_sources import PICTURES, walk
from clip_train.errors import DataError

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}


class Folder(Whole):
    """A `Collection` with labels; only names are read before its pictures are.

    Raises:
        DataError: no such folder, no classes, a class without pictures, pictures outside of the classes' folders, or
            folders that are called as the parts of a data set are.
    """

    def __init__(self, path: Path, name: str) -> None:
        if not path.is_dir():
            raise DataError(f"{name}: {path} is no folder")
        folders = [one for one in path.iterdir() if one.is_dir() and not one.name.startswith(".")]
        found = sorted(folders, key=lambda one: natural(one.name))
        super().__init__(name, [one.name for one in found])
        self.root = path
        if loose := [one.name for one in path.iterdir() if one.suffix.lower() in PICTURES and one.is_file()]:
            raise DataError(
                f"{name}: {len(loose)} pictures ({', '.join(sorted(loose)[:3])}) lie in {path} itself: "
                "which class are they of? Each class has a folder of its own."
            )
        if not found:
            raise DataError(f"{name}: {path} holds no folders: each class has one, with its pictures")
        if {one.name.lower() for one in found} <= _SPLITS:
            raise DataError(
                f"{name}: {path} holds {', '.join(one.name for one in found)}, which are parts of a data set, not "
                f"classes: name one, folder:{found[-1]}"
            )
        self._files: list[Path] = []
        self._labels: list[int] = []
        for label, folder in enumerate(found):
            own = [file for file in walk(folder) if file.suffix.lower() in PICTURES]
            if not own:
                raise DataError(f"{name}: class {folder.name!r} has no pictures ({', '.join(PICTURES)}) in {folder}")
            self._files += sorted(own, key=lambda file: natural(file.relative_to(path).as_posix()))
            self._labels += [label] * len(own)

    def __len__(self) -> int:
        return len(self._files)

    def key(self, number: int) -> str:
        return self._files[number].relative_to(self.root).as_posix()

    def pixels(self, number: int) -> Pixels:
        return read_picture(self._files[number])

    def label(self, number: int) -> int:
        return self._labels[number]

    def captions(self, number: int) -> list[str]:
        raise NotImplementedError("`check` refuses it")

    def check(self, *, label: bool, captions: bool) -> None:
        if captions:
            raise DataError(
                f"{self.name}: a folder of classes has no captions; with a file of them it is "
                "captions:FILE?images=FOLDER"
            )
