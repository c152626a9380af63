"""Real pictures with words that ship with the project, and the script that built them.

The shards are stored compressed (`NAME.tar.gz`: a tar member costs at least 1 KiB, as much as one of these
pictures). Samples are read at random places, so `path` unpacks a shard once into the user's cache folder.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import os
import shutil
import tempfile
from importlib import resources
from pathlib import Path

_COMPRESSED = ".gz"


def path(relative: str) -> Path:
    """The file of a relative name, such as `pictograms/train-000000.tar`.

    A name that exists only compressed is unpacked into `$XDG_CACHE_HOME/clip-train` (`~/.cache/clip-train`,
    or the temporary folder where that cannot be written) the first time. A name with `*`, `?` or `[` gives a
    pattern that matches the unpacked files.

    Raises:
        FileNotFoundError: no such file; the message names what its folder holds.
    """
    root = Path(str(resources.files(__name__)))
    wanted = root / relative
    if wanted.exists() and not any(sign in relative for sign in "*?["):
        return wanted
    folder = wanted.parent
    stored = sorted(folder.glob("*" + _COMPRESSED)) if folder.is_dir() else []
    matches = [one for one in stored if fnmatch.fnmatchcase(one.name.removesuffix(_COMPRESSED), wanted.name)]
    if matches:
        return _unpack(matches, _cache(folder.relative_to(root), stored)) / wanted.name
    if list(folder.glob(wanted.name)):
        return wanted
    while not folder.is_dir() and folder != root:
        folder = folder.parent
    names = sorted(one.name.removesuffix(_COMPRESSED) for one in folder.iterdir() if one.suffix not in (".py", ".pyc"))
    names = [name for name in names if not name.startswith("__")]
    where = folder.relative_to(root).as_posix()
    raise FileNotFoundError(f"no embedded data {relative!r}; {where!r} holds {', '.join(names) or 'nothing'}")


def _cache(folder: Path, stored: list[Path]) -> Path:
    """A folder of its own for these contents (a gzip file ends in its checksum and length)."""
    digest = hashlib.sha256()
    for one in stored:
        with one.open("rb") as file:
            file.seek(-8, os.SEEK_END)
            digest.update(one.name.encode() + file.read())
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = Path("clip-train", folder, digest.hexdigest()[:12])
    try:
        (base / name).mkdir(parents=True, exist_ok=True)
        if os.access(base / name, os.W_OK):
            return base / name
    except OSError:
        pass  # no home, or a read-only one
    fallback = Path(tempfile.gettempdir()) / name
    fallback.mkdir(parents=True, exist_ok=True)
    return fallback


def _unpack(compressed: list[Path], cache: Path) -> Path:
    """Each file appears in the cache whole or not at all, whatever other processes do."""
    for one in compressed:
        target = cache / one.name.removesuffix(_COMPRESSED)
        if target.exists():
            continue
        with tempfile.NamedTemporaryFile(dir=cache, prefix=".unpacking-", delete=False) as temporary:
            partial = Path(temporary.name)
            try:
                with gzip.open(one) as stream:
                    shutil.copyfileobj(stream, temporary)
                temporary.flush()
                partial.replace(target)
            except BaseException:
                partial.unlink()
                raise
    return cache
