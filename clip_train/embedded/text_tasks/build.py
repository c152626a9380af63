"""Build the embedded text tasks: `python -m clip_train.embedded.text_tasks.build --sources DIR [--out DIR]`.

Fetches WordNet where it is absent (`apt-get download wordnet-base`), reads the captions of the embedded pictures, and
writes a file a task. The same sources give the same bytes. Takes half a minute.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from clip_train.embedded.sources import run_client
from clip_train.embedded.text_tasks import meanings, pictures, sentences
from clip_train.embedded.text_tasks.common import Task
from clip_train.embedded.text_tasks.wordnet import Synset, read_first_senses, read_synsets

PACKAGE, VERSION = "wordnet-base", "1:3.0-37"
TRAINED = {"train": 1600, "dev": 400, "test": 1000}
RATED = {"dev": 400, "test": 1000}


def prepare(folder: Path) -> Path:
    """WordNet's files, fetched and unpacked where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    found = folder / "deb/usr/share/wordnet"
    if not found.is_dir():
        if not list(folder.glob(f"{PACKAGE}_*.deb")):
            run_client(["apt-get", "download", f"{PACKAGE}={VERSION}"], folder)
        (archive,) = folder.glob(f"{PACKAGE}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder / "deb")], check=True)
    return found


def make_tasks(wordnet: Path) -> list[Task]:
    """Every task."""
    parts = {part: read_synsets(wordnet, part) for part in ("noun", "verb", "adj", "adv")}
    everything: dict[str, Synset] = {key: one for part in parts.values() for key, one in part.items()}
    nouns = parts["noun"]
    senses = read_first_senses(wordnet, "noun")
    common = {word: key for word, (key, tagged) in senses.items() if tagged > 0}
    graph = meanings.Graph(nouns)
    emoji = "names and keywords of emoji whose pictures in one hand were held out"
    return [
        sentences.acceptability(everything, TRAINED),
        sentences.topic(nouns, TRAINED),
        sentences.word_in_context(everything, TRAINED),
        meanings.entailment(graph, {key for key, _ in senses.values()}, TRAINED),
        meanings.similarity(graph, common, RATED, glosses=False),
        meanings.similarity(graph, common, RATED, glosses=True),
        pictures.keyword_similarity(RATED),
        pictures.same_picture(
            "same_picture", "unseen_style", f"One picture or two? {emoji}; no word in common.", 0.3, negative="any"
        ),
        pictures.same_picture(
            "same_picture_near", "unseen_style",
            f"One picture or two, the other one near: {emoji}; no word in common with the name, but one of the right "
            "keywords among the wrong ones.", 0.3, negative="near",
        ),
        pictures.same_picture(
            "same_picture_word", "unseen_style",
            f"One picture or two, where both lists hold one word of the name: {emoji}.", 0.3, negative="word",
        ),
        pictures.same_picture(
            "same_picture_clipart", "openclipart_test",
            "One picture or two? Titles and keywords of clip art whose pictures and captions were held out.", 0.3,
            negative="any",
        ),
    ]  # fmt: skip


def write(task: Task, out: Path) -> None:
    """`NAME.json.gz`, with a row a line inside, without the time in its head."""
    head = {"name": task.name, "kind": task.kind, "about": task.about, "licence": task.licence, "classes": task.classes}
    text = json.dumps(head, ensure_ascii=False)[:-1] + ', "splits": {'
    splits = [
        f'"{name}": [\n' + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]"
        for name, rows in task.splits.items()
    ]
    text += ", ".join(splits) + "}}\n"
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=9, mtime=0) as stream:
        stream.write(text.encode("utf-8"))
    (out / f"{task.name}.json.gz").write_bytes(packed.getvalue())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m clip_train.embedded.text_tasks.build", description=__doc__)
    parser.add_argument("--sources", type=Path, required=True, help="folder of the packages")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "texts")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for task in make_tasks(prepare(options.sources)):
        write(task, options.out)
        print(task.name, {name: len(rows) for name, rows in task.splits.items()}, flush=True)


if __name__ == "__main__":
    main()
