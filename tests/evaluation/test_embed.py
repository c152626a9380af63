"""Embedding of shards: what is written, going on after a cut, two processes, and exact search in it."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import add_member, caption, picture, torchrun

import clip_train
from clip_train.cli import main
from clip_train.data.decode import decode
from clip_train.errors import DataError
from clip_train.evaluation.embed import embed
from clip_train.evaluation.search import search
from clip_train.runtime import process


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on three shards, the second of which has a broken picture."""
    import tomli_w

    folder = tmp_path_factory.mktemp("embed")
    for shard in range(3):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
            for number in range(7 * shard, 7 * shard + 7):
                broken = number == 9
                add_member(tar, f"k{number:03}.png", b"no picture" if broken else picture(number, 16))
                add_member(tar, f"k{number:03}.txt", caption(number).encode())
    tree = {
        "name": "tiny",
        "data": {"batch_size": 8, "workers": 0, "max_bad_fraction": 1.0,
                 "sources": {"s": {"shards": str(folder / "s-{0..2}.tar"), "image": "png"}}},
        "image": {"kind": "vit", "image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "heads": 2},
        "text": {"width": 16, "layers": 1, "heads": 2},
        "model": {"embed_dim": 8},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "training": {"steps": 1, "precision": "fp32"},
    }  # fmt: skip
    (folder / "recipe.toml").write_text(tomli_w.dumps(tree))
    assert main(["train", str(folder / "recipe.toml"), "--run-dir", str(folder / "run")]) == 0
    return folder


def rows_of(out: Path) -> dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], str]]:
    """key -> (picture's vector, caption's vector, caption)"""
    found: dict[str, Any] = {}
    for path in sorted((out / "metadata").glob("*.parquet")):
        number = path.stem.removeprefix("metadata_")
        images = np.load(out / "img_emb" / f"img_emb_{number}.npy")
        texts = np.load(out / "text_emb" / f"text_emb_{number}.npy")
        table = pq.read_table(path).to_pydict()
        assert len(images) == len(texts) == len(table["key"])
        for row, key in enumerate(table["key"]):
            assert key not in found
            found[key] = images[row], texts[row], table["caption"][row]
    return found


def test_every_good_sample_once_with_the_models_own_vectors(trained: Path, tmp_path: Path) -> None:
    arguments = ["embed", str(trained / "run"), str(trained / "s-{0..2}.tar"), str(tmp_path), "--dtype", "fp32"]
    assert main([*arguments, "--batch-size", "4"]) == 0
    loaded, found = clip_train.load(trained / "run"), rows_of(tmp_path)
    assert sorted(found) == [f"k{number:03}" for number in range(21) if number != 9]
    for number in (0, 8, 20):
        image, text, words = found[f"k{number:03}"]
        from PIL import Image

        assert words == caption(number)
        pixels = Image.fromarray(decode(picture(number, 16)))
        assert np.abs(image - loaded.encode_image(pixels)[0].numpy()).max() < 1e-5
        assert np.abs(text - loaded.encode_text(caption(number))[0].numpy()).max() < 1e-5
    bad = [json.loads(line) for line in (tmp_path / "bad_samples/bad_1.jsonl").read_text().splitlines()]
    assert [sample["key"] for sample in bad] == ["k009"]


def test_a_cut_run_goes_on_and_finished_parts_stay(trained: Path, tmp_path: Path) -> None:
    loaded, shards = clip_train.load(trained / "run"), str(trained / "s-{0..2}.tar")

    class Cut(Exception):
        pass

    def cut(samples: int, left: int) -> None:
        assert (samples, left) == (7, 2)
        raise Cut

    with pytest.raises(Cut):
        embed(loaded, shards, tmp_path, advance=cut)
    first = tmp_path / "img_emb" / "img_emb_0.npy"
    (tmp_path / "img_emb" / "img_emb_1.npy").write_bytes(b"half a part, whose metadata is not there")
    before = first.stat().st_mtime_ns
    assert embed(loaded, shards, tmp_path) == 13
    assert first.stat().st_mtime_ns == before
    assert len(rows_of(tmp_path)) == 20
    assert embed(loaded, shards, tmp_path) == 0

    with pytest.raises(DataError, match="caption: 'txt' there, None now"):
        embed(loaded, shards, tmp_path, caption=None)


def test_two_processes_write_what_one_writes(trained: Path, tmp_path: Path) -> None:
    arguments = ["embed", str(trained / "run"), str(trained / "s-{0..2}.tar")]
    done = torchrun(2, "-m", "clip_train", *arguments, str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert "20 samples" in done.stdout
    assert main([*arguments, str(tmp_path / "one")]) == 0
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert one.keys() == two.keys()
    for key, (image, text, words) in one.items():
        assert image.dtype == np.float16
        assert np.array_equal(image, two[key][0])
        assert np.array_equal(text, two[key][1])
        assert words == two[key][2]


def test_arithmetic_in_bf16_is_rounded_and_near(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "has_bf16_products", lambda: True)
    for precision in ("fp32", "bf16"):
        arguments = ["embed", str(trained / "run"), str(trained / "s-0.tar"), str(tmp_path / precision)]
        assert main([*arguments, "--precision", precision, "--dtype", "fp32"]) == 0
    exact, rounded = rows_of(tmp_path / "fp32"), rows_of(tmp_path / "bf16")
    for key, (image, text, _) in exact.items():
        for one, other in ((image, rounded[key][0]), (text, rounded[key][1])):
            assert other.dtype == np.float32
            assert 1e-5 < np.abs(one - other).max() < 0.03


def test_search_is_exact_and_shows_the_pictures(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = clip_train.load(trained / "run")
    embed(loaded, str(trained / "s-{0..2}.tar"), tmp_path, dtype="fp32")
    rows = rows_of(tmp_path)
    queries = loaded.encode_text(["a red square", "a blue ring"]).numpy()
    for among, column in (("images", 0), ("captions", 1)):
        hits = search(tmp_path, queries, 5, among)  # pyright: ignore[reportArgumentType]
        for query, own in zip(queries, hits, strict=True):
            everything = sorted(((float(row[column] @ query), key) for key, row in rows.items()), reverse=True)[:5]
            assert [hit.key for hit in own] == [key for _, key in everything]
            assert [hit.cosine for hit in own] == pytest.approx([cosine for cosine, _ in everything], abs=1e-6)
    (tmp_path / "q.png").write_bytes(picture(5, 16))
    assert main(["search", str(tmp_path), str(trained / "run"), str(tmp_path / "q.png"), "--count", "3"]) == 0
    shown = capsys.readouterr().out
    assert "1.000  k005" in shown, "a picture finds itself first"
    assert (tmp_path / "search.html").read_text().count("data:image/webp") == 3
    with pytest.raises(DataError, match="8 dimensions, the model has 9"):
        search(tmp_path, np.ones((1, 9), np.float32), 3)
