"""How the embedded text tasks were made: WordNet's files, the graph, splits; the shipped files from their sources."""

from __future__ import annotations

from pathlib import Path

from clip_train.embedded.text_tasks import pictures
from clip_train.embedded.text_tasks.build import write
from clip_train.embedded.text_tasks.common import Sides, overlap
from clip_train.embedded.text_tasks.meanings import Graph
from clip_train.embedded.text_tasks.wordnet import read_first_senses, read_synsets

SHIPPED = Path(pictures.__file__).parents[1] / "texts"
NOUNS = """\
  1 This software and database is being provided to you
00000001 03 n 01 thing 0 000 | that which is
00000002 05 n 02 animal 0 living_creature 0 001 @ 00000001 n 0000 | alive; "the animal ran"; "two animals slept"
00000003 05 n 01 cat 0 002 @ 00000002 n 0000 + 00000009 v 0101 | feline mammal
00000004 05 n 01 dog(p) 0 001 @ 00000002 n 0000 | a barking mammal
"""


def test_wordnets_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(NOUNS)
    (tmp_path / "index.noun").write_text("  1 licence\nliving_creature n 2 1 @ 2 1 00000002 00000003  \n")
    nouns = read_synsets(tmp_path, "noun")
    animal = nouns["n00000002"]
    assert (animal.lemmas, animal.category, animal.hypernyms) == (("animal", "living creature"), 5, ("n00000001",))
    assert (animal.definition, animal.examples) == ("alive", ("the animal ran", "two animals slept"))
    assert nouns["n00000003"].hypernyms == ("n00000002",) and nouns["n00000004"].lemmas == ("dog",)
    assert read_first_senses(tmp_path, "noun") == {"living creature": ("n00000002", 1)}
    graph = Graph(nouns)
    assert graph.above("n00000003") == {"n00000003": 0, "n00000002": 1, "n00000001": 2}
    # Wu and Palmer: animal lies at depth 2, cat and dog a step below: 2 * 2 / (1 + 1 + 2 * 2).
    assert graph.similarity("n00000003", "n00000004") == 4 / 6
    assert graph.similarity("n00000003", "n00000003") == 1


def test_a_word_is_on_one_side() -> None:
    sides = Sides("t", {"train": 0.5, "test": 0.5})
    found = {word: sides.natural(word) for word in "abcdefghij"}
    train, test = (next(word for word in found if found[word] == side) for side in ("train", "test"))
    assert sides.claim([train, "both"]) == "train" and sides.claim([test, "own"]) == "test"
    assert sides.claim([test, "both"]) is None and sides.claim(["both", test]) is None


def test_forms_of_a_word_overlap() -> None:
    assert overlap("bell pepper", "two peppers") and overlap("video", "videogame")
    assert not overlap("the cat", "the dog")


def test_a_shipped_file_is_what_the_embedded_pictures_give(tmp_path: Path) -> None:
    about = "One picture or two? Titles and keywords of clip art whose pictures and captions were held out."
    task = pictures.same_picture("same_picture_clipart", "openclipart_test", about, 0.3, negative="any")
    write(task, tmp_path)
    assert (tmp_path / f"{task.name}.json.gz").read_bytes() == (SHIPPED / f"{task.name}.json.gz").read_bytes()
