"""The steps of the build, on a few SVGs made here."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("resvg_py")

from clip_train.embedded import clipart, emoji
from clip_train.embedded.dedup import clusters, digest, fingerprints, near_pairs
from clip_train.embedded.picture import Picture, rasterise
from clip_train.embedded.shards import Sample, shuffled, write_shards
from clip_train.embedded.split import make_splits, merge_equal


def svg(body: str, height: int = 100) -> str:
    size = f'viewBox="0 0 100 {height}" width="100" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{body}</svg>'


CIRCLE = svg('<circle cx="50" cy="50" r="40" fill="red"/>')
ALMOST = svg('<circle cx="50" cy="50" r="40.5" fill="red"/>')
SQUARE = svg('<rect x="10" y="10" width="80" height="80" fill="blue"/>')
BARS = svg('<rect width="100" height="25"/><rect y="50" width="100" height="25" fill="#0a0"/>')


def picture(key: str, body: str, **fields: object) -> Picture:
    captions = (key.replace("-", " "), "a keyword")
    return Picture(key, body, captions, "test", "CC0-1.0", **fields)  # type: ignore[arg-type]


def sample(key: str, body: str, **fields: object) -> Sample:
    one = picture(key, body, **fields)
    return Sample(one, rasterise(one))


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    def build(folder: Path) -> dict[str, bytes]:
        folder.mkdir()
        samples = [sample("circle", CIRCLE), sample("square", SQUARE), sample("bars", BARS)]
        write_shards(folder, "train", shuffled(samples, seed=1), per_shard=2, quality=90)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    first, second = build(tmp_path / "first"), build(tmp_path / "second")
    assert sorted(first) == ["train-000000.tar.gz", "train-000001.tar.gz"]
    assert first == second
    with tarfile.open(fileobj=io.BytesIO(first["train-000000.tar.gz"])) as tar:
        assert {member.mtime for member in tar} == {0}


def test_shuffling_depends_on_keys_and_seed_alone() -> None:
    samples = [sample(name, CIRCLE) for name in "abcdefgh"]
    keys = [one.picture.key for one in shuffled(samples, 1)]
    assert keys == [one.picture.key for one in shuffled(samples[::-1], 1)]
    assert sorted(keys) == list("abcdefgh") != keys
    assert keys != [one.picture.key for one in shuffled(samples, 2)]


def test_rasterise_draws_on_white_in_the_middle() -> None:
    wide = svg('<rect width="100" height="50" fill="#ff0000"/>', height=50)
    pixels = rasterise(picture("wide", wide))
    assert pixels.shape == (64, 64, 3)
    assert (pixels[:16] == 255).all() and (pixels[48:] == 255).all()
    assert (pixels[16:48] == (255, 0, 0)).all()


def test_rasterise_averages_edges() -> None:
    half = svg('<rect width="50.78125" height="100"/>')  # 32.5 of 64 columns
    column = rasterise(picture("half", half))[32, :, 0]
    assert column[31] == 0 and column[33] == 255
    assert 118 <= column[32] <= 138


def test_rasterise_trims_and_mirrors() -> None:
    corner = svg('<rect width="12.5" height="12.5" fill="black"/>')
    trimmed = rasterise(picture("corner", corner, trim=True))
    assert (trimmed[2:62, 2:62] == 0).all() and (trimmed[0] == 255).all()
    left = svg('<rect width="50" height="100" fill="black"/>')
    assert (rasterise(picture("right", left, flip=True))[:, 32:] == 0).all()


@pytest.mark.parametrize("body", ["", '<rect width="100" height="100" fill="white"/>'])
def test_rasterise_refuses_what_shows_nothing(body: str) -> None:
    with pytest.raises(ValueError, match="nothing is drawn"):
        rasterise(picture("empty", svg(body)))


def test_near_pairs_agree_with_the_definition() -> None:
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(5)]
    pictures += [rasterise(picture("circle", CIRCLE)), rasterise(picture("almost", ALMOST))]
    found = {(i, j): d for i, j, d in near_pairs(*[fingerprints(pictures)] * 2, threshold=2.1, block=3)}
    for i, one in enumerate(pictures):
        for j, other in enumerate(pictures):
            # PIL's reduce rounds to whole levels, hence the tolerance.
            a, b = (255.0 - np.asarray(Image.fromarray(p).reduce(4), np.float64) for p in (one, other))
            expected = np.sqrt(((a - b) ** 2).mean()) * 2 / (np.sqrt((a**2).mean()) + np.sqrt((b**2).mean()))
            assert found[i, j] == pytest.approx(expected, abs=0.01)


def test_clusters_follow_chains() -> None:
    # On a line, each 1 from the next, ink about 100: 0.01 apart; the last one is far away.
    prints = np.array([[100.0, 0], [101, 0], [102, 0], [0, 100]])
    assert clusters(prints, 0.015) == [0, 0, 0, 3]
    assert clusters(prints, 0.005) == [0, 1, 2, 3]


def test_equal_pictures_become_one_with_the_captions_of_both() -> None:
    samples, merged = merge_equal([sample("man", CIRCLE), sample("square", SQUARE), sample("person", CIRCLE)])
    assert merged == 1
    assert [one.picture.key for one in samples] == ["man", "square"]
    assert samples[0].picture.captions == ("man", "a keyword", "person")


def test_a_test_picture_near_to_training_goes_and_is_named() -> None:
    train = [sample("a-circle", CIRCLE, label="circle"), sample("a-square", SQUARE, label="square")]
    train.append(sample("a-bars", svg('<rect width="99" height="9" fill="red"/>'), label="bars"))
    unseen = [sample("b-circle", ALMOST, label="circle"), sample("b-bars", BARS, label="bars")]
    unseen.append(sample("b-square", SQUARE, label="square"))
    unseen.append(sample("b-other", svg('<rect width="9" height="99"/>'), label="never trained"))
    splits = make_splits(train, unseen, [], near=0.2, seed=0)
    assert [one.picture.label for one in splits.unseen_style] == ["bars"]
    assert splits.removed["unseen_style_equal_to_training"] == ["square"]
    assert splits.removed["unseen_style_concept_not_trained"] == 1
    (near,) = splits.removed["unseen_style_near_training"]  # type: ignore[misc]
    assert near.startswith("circle (a-circle, 0.0")
    assert {digest(one.pixels) for one in splits.train} == {digest(one.pixels) for one in train}


def test_clip_art_is_held_out_by_family() -> None:
    shapes = [f'<rect x="{x}" y="{y}" width="20" height="20"/>' for x in range(0, 80, 20) for y in range(0, 80, 20)]
    clip_art = [sample(f"shape-{i}", svg(shape)) for i, shape in enumerate(shapes)]
    twins = [sample(f"twin-{i}", svg(shape.replace('20"/>', '20.2"/>'))) for i, shape in enumerate(shapes)]
    splits = make_splits([sample("emoji", CIRCLE, label="circle")], [], [*clip_art, *twins], near=0.2, seed=0)
    held_out = {one.picture.key.split("-")[1] for one in splits.openclipart_test}
    assert len(splits.openclipart_test) == len(held_out) == 3  # a tenth of 32
    assert held_out.isdisjoint(one.picture.key.split("-")[-1] for one in splits.train)
    assert len(splits.train) == 1 + 32 - 2 * 3


def test_captions_of_an_emoji() -> None:
    apple = emoji.Concept("🍎", "red apple", ("apple", "fruit", "red"))
    assert emoji.captions(apple) == ("red apple", "apple, fruit, red", "red apple: apple, fruit, red")
    assert emoji.captions(emoji.Concept("🇯🇵", "flag: Japan", ("flag",))) == ("flag: Japan", "flag of Japan")
    assert emoji.captions(emoji.Concept("⛺", "tent", ("tent",))) == ("tent",)


def record(path: str, title: str, *keywords: str, creator: str = "Ann", text: str = "") -> clipart.Record:
    return clipart.Record(path, title, keywords, text, creator, True)


def test_captions_of_clip_art() -> None:
    series = [record(f"tools/{tool}.svg", "SVG Tool Set") for tool in ("saw", "axe", "file", "awl", "plane")]
    apple = record("food/fruit/red_apple_ann_01.svg", "Red Apple", "hash", "fruit", "0xa10", text="An apple, red.")
    italian = record("animals/mammals/cane_01.svg", "Cane bianco", "dog", creator="Architetto Francesco")
    flag = record("signs_and_symbols/flags/africa/mali.svg", "mali", "flag", "sign")
    card = record("recreation/games/cards/white/white_c_q.svg", "card", "card")
    captioner = clipart.Captioner([*series, apple, italian, flag, card])
    assert captioner.captions(series[0])[0] == "saw"  # not the title that names the series
    assert captioner.captions(apple) == ("Red Apple", "fruit", "Red Apple: fruit", "An apple, red")
    assert captioner.captions(italian) == ("dog, mammals",)
    assert captioner.captions(flag)[0] == "flag of Mali"
    assert captioner.captions(card)[0] == "queen of clubs"
    assert captioner.captions(record("people/x.svg", "", "people", creator="Architetto X")) == ()
