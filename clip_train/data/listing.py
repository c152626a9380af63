"""From the members of a tar to samples: which belong together, and which cannot be used.

Members whose path agrees up to the first dot of the file name are one sample, the rest of the name is the extension.
Training refuses a shard with one unusable member; an inspection names them all and goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_train.data.index_files import ShardIndex
from clip_train.data.tar import members
from clip_train.errors import DataError

MEND = "To keep its good samples: clip-train data inspect SHARD --fix NEW_FOLDER."
_MOST_KINDS = 256
_LONGEST_NAME = 4096  # bytes; as long as a path may be


class DamagedShardError(DataError):
    """A shard's own fault, not that of the way to it."""


class Listing(NamedTuple):
    """The samples of a shard."""

    samples: ShardIndex | None
    """None where there are none."""
    strays: list[str]
    """Members without KEY.EXTENSION names, which belong to no sample."""
    damage: str
    """Where the tar ends before its end: why. Only for those who asked to read on."""


def split_name(name: str) -> tuple[str, str]:
    """A member's name -> its sample's key and its extension, in lower case; ("", "") where it belongs to no sample.

    As webdataset has it: `.DS_Store`, `._0001.jpg` and `README` are no samples.
    """
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, extension = file.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and extension else ("", "")


def list_samples(shard: str, path: Path, problem: Callable[[str, str], None] | None = None) -> Listing:
    """One pass over the headers of a file.

    Args:
        shard: what messages call it.
        path: the file.
        problem: called with the key and the cause of each sample that cannot be used; and the tar is read as far as
            it goes. Without it, both raise.

    Raises:
        DataError: the file cannot be listed; members of more than 256 kinds.
        OSError: it cannot be read.
    """

    def refuse(key: str, cause: str) -> None:
        raise DamagedShardError(f"{shard}: {cause}. {MEND}")

    report = refuse if problem is None else problem
    kinds: dict[str, int] = {}
    rows: dict[str, int] = {}
    places: dict[tuple[int, int], tuple[int, int]] = {}
    strays: list[str] = []
    damage = ""
    try:
        for name, offset, length, cause in members(path):
            key, extension = split_name(name)
            if len(name) > _LONGEST_NAME or "\0" in name:
                report(name[:40], f"a member's name ({name[:40]!r}…) is no name of a file")
                continue
            if name.startswith("/") or ".." in name.split("/"):
                report(key or name, f"member {name!r} names a place outside of the archive")
            if not key:
                strays.append(name)
                continue
            place = (rows.setdefault(key, len(rows)), kinds.setdefault(extension, len(kinds)))
            if len(kinds) > _MOST_KINDS:
                raise DataError(
                    f"{shard}: its members have more than {_MOST_KINDS} extensions ({', '.join(list(kinds)[:3])}, …). "
                    "A key ends at the first dot of the file name: pack the shard again with keys without dots."
                )
            if cause:
                report(key, f"member {name!r} {cause}")
            elif place in places:
                report(key, f"member {name!r} occurs twice, so it is unclear which one belongs to the sample")
            places.setdefault(place, (offset, length))
    except DataError as error:
        damage = str(error).replace(str(path), shard)
        if problem is None:
            raise DamagedShardError(damage) from error
    if not rows:
        return Listing(None, strays, damage)
    table = np.full((2, len(rows), len(kinds)), -1, dtype=np.int64)
    at = np.array(list(places), dtype=np.int64)
    table[:, at[:, 0], at[:, 1]] = np.array(list(places.values()), dtype=np.int64).T
    keys = np.array([key.encode("utf-8", "surrogateescape") for key in rows])
    return Listing(ShardIndex(shard, path.stat().st_size, tuple(kinds), keys, table[0], table[1]), strays, damage)
