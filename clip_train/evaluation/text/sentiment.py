"""Sentiment with human ratings: tweets, film and product reviews, editorials, each rated by some ten people.

Hutto and Gilbert 2014 (VADER) published the ratings; the rights in the quoted snippets are their authors', so they are
fetched, not shipped:

    pip download --no-deps --no-build-isolation vaderSentiment==0.5 --dest DIR
    clip-train probe RUN --sentiment DIR

Each corpus is two tasks: `sentiment_NAME`, positive or negative where the mean rating is beyond ±0.5 (accuracy), and
`rating_NAME`, the rating itself (Pearson). Splits follow from hashes of the texts.
"""

from __future__ import annotations

import io
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clip_train.data.hashing import text_hash
from clip_train.errors import DataError
from clip_train.evaluation.text.tasks import Split, TextTask, check_task, split_of

CORPORA = {"tweets": "tweets", "movie": "movieReviewSnippets", "amazon": "amazonReviewSnippets",
           "nyt": "nytEditorialSnippets"}  # fmt: skip
"""Our names and the archive's."""
BEYOND = 0.5
"""Mean ratings nearer to zero are neither positive nor negative."""
SIZES = {"train": 2000, "dev": 400, "test": 1000}
"""Texts of a split at most."""
_INNER = "hutto_ICWSM_2014.tar.gz"


def read_sentiment(path: Path) -> list[TextTask]:
    """The tasks of a package (`.zip`, `.tar.gz`), of the archive in it, or of a folder that holds any of these.

    Raises:
        DataError: the path does not hold the ratings, or a line of them is not `id, rating, text`.
    """
    tasks: list[TextTask] = []
    files = dict(_files(path))
    for name, stem in CORPORA.items():
        content = files.get(f"{stem}_GroundTruth.txt")
        if content is None:
            raise DataError(
                f"{path}: there is no {stem}_GroundTruth.txt in it; see clip-train probe --help for the source"
            )
        rows = _rows(content, f"{path}: {stem}_GroundTruth.txt")
        rated = _splits(rows)
        polar = {split: _polar(one) for split, one in rated.items()}
        tasks.append(TextTask(f"sentiment_{name}", "labels", polar, ("negative", "positive"), about=stem))
        tasks.append(TextTask(f"rating_{name}", "ratings", rated, metric="pearson", also=("spearman",), about=stem))
    for task in tasks:
        check_task(task)
    return tasks


def _rows(content: bytes, where: str) -> list[tuple[str, float]]:
    """Distinct texts with their ratings."""
    found: dict[str, float] = {}
    for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), 1):
        fields = line.split("\t", 2)
        if not line.strip():
            continue
        try:
            text = re.sub(r"\s+", " ", fields[2]).strip()
            found.setdefault(text, float(fields[1]))
        except (IndexError, ValueError):
            raise DataError(
                f"{where}, line {number}: not an id, a rating and a text between tabs: {line[:60]!r}"
            ) from None
    return list(found.items())


def _polar(rated: Split) -> Split:
    """The texts whose rating is beyond the bound, positive (1) or negative (0)."""
    rows = np.flatnonzero(np.abs(rated.answers) > BEYOND)
    return Split([rated.first[row] for row in rows], None, (rated.answers[rows] > 0).astype(np.float64))


def _splits(rows: list[tuple[str, float]]) -> dict[str, Split]:
    ordered = sorted(rows, key=lambda row: text_hash(row[0]))
    total = sum(SIZES.values())
    scale = min(1.0, len(ordered) / total)
    found: dict[str, Split] = {}
    start = 0
    for split in ("test", "dev", "train"):
        size = int(SIZES[split] * scale)
        found[split] = split_of(ordered[start : start + size])
        start += size
    return {split: found[split] for split in SIZES}


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name without folders, and content, of the rating files in whatever this is."""
    if path.is_dir():
        inside = [*path.rglob("*_GroundTruth.txt")]
        inside = inside or [*path.rglob(_INNER)] or [*path.glob("vaderSentiment*")]
        for one in sorted(inside):
            yield from _files(one)
    elif path.name.endswith("_GroundTruth.txt"):
        yield path.name, path.read_bytes()
    elif path.is_file():
        yield from _unpacked(path.name, path.read_bytes(), str(path))
    else:
        raise DataError(f"{path}: there is no such file or folder")


def _unpacked(name: str, content: bytes, where: str) -> Iterator[tuple[str, bytes]]:
    members: list[tuple[str, bytes]] = []
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                members = [(one, archive.read(one)) for one in archive.namelist() if _wanted(one)]
        else:
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                for member in archive:
                    stream = archive.extractfile(member) if member.isfile() and _wanted(member.name) else None
                    if stream is not None:
                        members.append((member.name, stream.read()))
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError) as error:
        raise DataError(f"{where}: {name} is no whole archive: {error}") from error
    for one, data in members:
        if one.endswith(_INNER):
            yield from _unpacked(_INNER, data, where)
        else:
            yield Path(one).name, data


def _wanted(name: str) -> bool:
    return name.endswith(("_GroundTruth.txt", _INNER)) and not Path(name).name.startswith("._")
