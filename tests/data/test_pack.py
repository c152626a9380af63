"""Packing, checked with tarfile and Pillow, and read back by the stream."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture
from PIL import Image
from tars import BytesTokenizer, encoded

from clip_train.cli import main
from clip_train.data.files import ShardFiles
from clip_train.data.index_files import parse_index
from clip_train.data.inspect import inspect
from clip_train.data.pack import pack
from clip_train.data.pack_shard import PictureOptions, encode_picture
from clip_train.data.pack_sources import open_source
from clip_train.data.shards import data_fingerprint, index, resolve
from clip_train.errors import DataError


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unpacked(folder: Path) -> list[tuple[str, bytes]]:
    """All members of all shards, as Python's tarfile reads them."""
    found: list[tuple[str, bytes]] = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found.append((member.name, file.read()))
    return found


def captions(folder: Path) -> list[list[str]]:
    return [json.loads(data)["captions"] for name, data in unpacked(folder) if name.endswith(".json")]


def rows(count: int) -> list[dict[str, Any]]:
    return [{"image": picture(n, 8), "caption": f"number {n}", "license": "CC0"} for n in range(count)]


def pictures_folder(folder: Path, count: int = 5) -> Path:
    (folder / "sub").mkdir(parents=True)
    for n in range(count):
        path = folder / ("sub" if n % 2 else ".") / f"p{n}.png"
        path.write_bytes(picture(n, 8))
        path.with_suffix(".txt").write_text(f"number {n}\n")
    return folder


# -------------------------------------------------------------------------------------------------- sources


def test_a_folder(tmp_path: Path) -> None:
    folder = pictures_folder(tmp_path / "in")
    (folder / "p4.txt").unlink()
    (folder / "p4.json").write_text(json.dumps({"captions": ["four", "", "vier "], "license": "CC0"}))
    packed = pack(open_source(folder), tmp_path / "out", per_shard=2)
    order = ["p0.png", "p2.png", "p4.png", "sub/p1.png", "sub/p3.png"]  # by path
    members = unpacked(tmp_path / "out")
    assert [name for name, _ in members][:4] == ["000000000.png", "000000000.json", "000000001.png", "000000001.json"]
    assert [data for name, data in members if name.endswith(".png")] == [(folder / name).read_bytes() for name in order]
    stored = [json.loads(data) for name, data in members if name.endswith(".json")]
    assert [one["name"] for one in stored] == order
    assert [one["captions"] for one in stored] == [
        ["number 0"], ["number 2"], ["four", "vier"], ["number 1"], ["number 3"],
    ]  # fmt: skip
    assert (packed.samples, packed.captions, packed.formats) == (5, 6, {"png": 5})


def tables(folder: Path) -> Iterator[Path]:
    """The same four rows as csv, tsv, jsonl and their gzips: pictures by path."""
    import gzip

    lines = [(f"sub/p{n}.png" if n % 2 else f"p{n}.png", f'a "{n}", said\nshe — ünd') for n in range(4)]
    for kind, delimiter in (("csv", ","), ("tsv", "\t")):
        with (folder / f"t.{kind}").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter).writerows([("file_name", "caption"), *lines])
        yield folder / f"t.{kind}"
    jsonl = "".join(json.dumps({"file_name": name, "caption": text}) + "\n" for name, text in lines)
    (folder / "t.jsonl").write_text(jsonl)
    yield folder / "t.jsonl"
    (folder / "t.csv.gz").write_bytes(gzip.compress((folder / "t.csv").read_bytes()))
    yield folder / "t.csv.gz"


def test_tables_with_paths_give_the_same_shards(tmp_path: Path) -> None:
    folder = pictures_folder(tmp_path / "in")
    outs = []
    for number, table in enumerate(tables(folder)):
        pack(open_source(table), tmp_path / str(number))
        outs.append(unpacked(tmp_path / str(number)))
    assert outs == [outs[0]] * 4
    assert captions(tmp_path / "0")[1] == ['a "1", said\nshe — ünd']
    assert outs[0][2][1] == picture(1, 8)


def test_a_captions_table_in_a_folder(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(picture(n, 8))
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "".join(f"{n}.png,t{n}\n" for n in range(3)))
    pack(open_source(tmp_path), tmp_path / "out")
    assert captions(tmp_path / "out") == [["t0"], ["t1"], ["t2"]]


def test_parquet_with_bytes_paths_and_structs(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = pictures_folder(tmp_path / "in")
    paths = [f"sub/p{n}.png" if n % 2 else f"p{n}.png" for n in range(5)]
    data = [(folder / path).read_bytes() for path in paths]
    texts = [[f"a {n}", f"b {n}"] for n in range(5)]
    columns = {
        "bytes": data,
        "path": paths,
        "struct": [{"bytes": one, "path": None} for one in data],
        "by_path": [{"bytes": None, "path": path} for path in paths],
    }
    for name, column in columns.items():
        table = pa.table({"picture": column, "texts": texts, "unused": range(5), "license": ["CC0"] * 5})
        parquet.write_table(table, folder / f"{name}.parquet", row_group_size=2)
        out = tmp_path / name
        pack(open_source(folder / f"{name}.parquet"), out, image="picture", keep=["license"])
        assert [one for key, one in unpacked(out) if key.endswith("png")] == data
        assert captions(out) == texts
        assert json.loads(unpacked(out)[1][1])["license"] == "CC0"


def test_texts_alone(tmp_path: Path) -> None:
    """Lines of a .txt, and a table without pictures, are the same shards; a language recipe trains on them."""
    texts = [f"text number {n}, a fox" for n in range(9)]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts) + "\n")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text, "page": 1}) + "\n" for text in texts))
    packed = pack(open_source(tmp_path / "texts.txt"), tmp_path / "a", per_shard=4)
    pack(open_source(tmp_path / "texts.jsonl"), tmp_path / "b", per_shard=4, image="none")
    assert (packed.samples, packed.captions, packed.formats) == (9, 9, {})
    assert [name for name, _ in unpacked(tmp_path / "a")] == [f"{n:09d}.json" for n in range(9)]
    assert captions(tmp_path / "a") == [[text] for text in texts]
    assert unpacked(tmp_path / "a") == unpacked(tmp_path / "b")
    assert "image" not in packed.stanza()
    found = inspect(f"{tmp_path}/a/*.tar", image="none")
    assert found.broken == [] and [one.captions for one in found.measured] == [(text,) for text in texts]
    assert found.stanza == packed.stanza()
    with pytest.raises(DataError, match=r"or pack texts alone with --image none\."):
        pack(open_source(tmp_path / "texts.jsonl"), tmp_path / "c")
    overrides = [
        f"data.sources={{texts={{shards='{tmp_path}/a/*.tar', caption='json.captions'}}}}", "data.batch_size=4",
        "training.steps=2", "evaluation.tasks={}", "text.width=16", "text.layers=1", "text.heads=2", "data.workers=0",
    ]  # fmt: skip
    command = ["train", "text-mlm", "--run-dir", str(tmp_path / "run")]
    assert main([*command, *(part for one in overrides for part in ("--set", one))]) == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2


def test_datasets_and_torchvision_objects(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    for n in range(3):
        (tmp_path / "in" / f"class {n}").mkdir(parents=True)
        (tmp_path / "in" / f"class {n}" / "x.png").write_bytes(picture(n, 8))
    pack(ImageFolder(tmp_path / "in", target_transform=lambda label: f"class {label}"), tmp_path / "pairs")  # pyright: ignore[reportArgumentType]
    members = unpacked(tmp_path / "pairs")
    for (_, stored), n in zip(members[::2], range(3), strict=True):  # PNG: nothing is lost
        with Image.open(io.BytesIO(stored)) as a, Image.open(io.BytesIO(picture(n, 8))) as b:
            assert np.array_equal(np.array(a), np.array(b))
    assert captions(tmp_path / "pairs") == [["class 0"], ["class 1"], ["class 2"]]

    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    samples = [{"image": {"bytes": picture(n, 8), "path": None}, "caption": f"c{n}"} for n in range(3)]
    data = datasets.Dataset.from_list(samples, features=features)
    pack(data, tmp_path / "decoded")
    pack(data.cast_column("image", datasets.Image(decode=False)), tmp_path / "raw")
    assert [one for name, one in unpacked(tmp_path / "raw") if name.endswith("png")] == [
        picture(n, 8) for n in range(3)
    ]
    for (_, again), n in zip(unpacked(tmp_path / "decoded")[::2], range(3), strict=True):
        with Image.open(io.BytesIO(again)) as a, Image.open(io.BytesIO(picture(n, 8))) as b:
            assert np.array_equal(np.array(a), np.array(b))


# ------------------------------------------------------------------------------------------------- the shards


def test_what_stands_beside_the_shards(tmp_path: Path) -> None:
    broken = [*rows(23), {"image": b"no picture", "caption": "x", "license": "?"}]
    packed = pack(broken, tmp_path, per_shard=10, keep=["license"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["samples"], summary["captions"], summary["skipped"]) == (23, 23, 1)
    assert [one["samples"] for one in summary["shards"]] == [10, 10, 3]
    assert [one["bytes"] for one in summary["shards"]] == [p.stat().st_size for p in sorted(tmp_path.glob("*.tar"))]
    indexes = [index(shard) for shard in resolve(f"{tmp_path}/*.tar")]
    assert summary["fingerprint"] == packed.fingerprint == data_fingerprint(indexes)
    for one in indexes:
        assert parse_index(Path(one.shard + ".index.json").read_bytes(), one.shard).same_listing(one)
    (skipped,) = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert skipped["name"] == "row 23"
    assert "not a readable picture" in skipped["cause"]
    assert not (tmp_path / ".pack").exists()


def test_the_stanza_trains(tmp_path: Path) -> None:
    import tomllib

    from clip_train.data.stream import Stream
    from clip_train.data.stream import open_source as open_shards
    from clip_train.data.transforms import Augment

    packed = pack([{**row, "caption": [row["caption"], "other"]} for row in rows(12)], tmp_path, per_shard=5)
    source = tomllib.loads(packed.stanza("x"))["data"]["sources"]["x"]
    assert source["caption_choice"] == "random"
    stream = Stream([open_shards("x", **source)], BytesTokenizer(), Augment(8), seed=0, batch_size=4)
    batches = [stream[step] for step in range(3)]
    assert sorted(key for batch in batches for key in batch.keys) == [f"{n:09d}" for n in range(12)]
    assert not any(batch.skipped for batch in batches)


def test_equal_bytes_whatever_the_processes_and_the_time(tmp_path: Path) -> None:
    pack(rows(30), tmp_path / "a", per_shard=7)
    time.sleep(1.1)  # a second is what a tar's times tell apart
    pack(iter(rows(30)), tmp_path / "b", per_shard=7, workers=3)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    with tarfile.open(tmp_path / "a" / "shard-000000.tar") as tar:
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in tar} == {(0, 0, "", 0o644)}


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_resizing_and_encoding(kind: str) -> None:
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((900, 600))
    extension, data = encode_picture(encoded(large), PictureOptions(300, kind, 95))  # pyright: ignore
    assert extension == kind
    with Image.open(io.BytesIO(data)) as small:
        assert small.size == (300, 200)
        difference = np.abs(np.asarray(small.convert("RGB"), int) - np.asarray(large.resize((300, 200)), int))
    assert difference.mean() < (0.1 if kind == "png" else 3)


def test_what_fits_keeps_its_bytes_and_names_follow_content(tmp_path: Path) -> None:
    jpg = encoded(Image.new("RGB", (20, 10), "red"), "JPEG", quality=70)
    assert encode_picture(jpg, PictureOptions(20)) == ("jpg", jpg)
    assert encode_picture(jpg, PictureOptions(None, "jpg", 20)) == ("jpg", jpg)
    (tmp_path / "lies.png").write_bytes(jpg)
    assert encode_picture(tmp_path / "lies.png", PictureOptions()) == ("jpg", jpg)
    transparent = encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))
    with Image.open(io.BytesIO(encode_picture(transparent, PictureOptions(None, "jpg"))[1])) as white:
        assert white.convert("L").getextrema() == (255, 255)


# -------------------------------------------------------------------------------------------------- resuming


def test_a_killed_pack_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 256, (500, 500, 3), dtype=np.uint8))
    for n in range(160):
        pixels.putpixel((0, 0), (n, n, n))
        (folder / f"{n:03}.jpg").write_bytes(encoded(pixels, "JPEG", quality=90) if n != 31 else b"broken")
        (folder / f"{n:03}.txt").write_text(f"number {n}")
    command = [sys.executable, "-m", "clip_train", "data", "pack", str(folder), str(tmp_path / "killed"),
               "--per-shard", "4", "--workers", "2", "--max-size", "300", "--format", "webp"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while len(list((tmp_path / "killed" / ".pack").glob("*.tar.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / ".pack").glob("*.tar.json")}
    tars = {path.name: (tmp_path / "killed" / path.stem).stat().st_mtime_ns for path in finished}
    assert finished, "killed too early"
    assert not (tmp_path / "killed" / "summary.json").exists(), "killed too late"
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name, modified in tars.items():  # finished shards were kept, not written again
        assert (tmp_path / "killed" / name.removesuffix(".json")).stat().st_mtime_ns == modified
    options: dict[str, Any] = {"per_shard": 4, "max_size": 300, "format": "webp"}
    pack(open_source(folder), tmp_path / "whole", **options)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "skipped.jsonl").read_text())["name"] == "031.jpg"


def test_packing_again_writes_nothing_and_mends_what_is_gone(tmp_path: Path) -> None:
    pack([*rows(20), {"image": None, "caption": "x"}], tmp_path, per_shard=6)
    before = content(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = pack([*rows(20), {"image": None, "caption": "x"}], tmp_path, per_shard=6)
    assert again.already
    assert len(again.skipped) == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    (tmp_path / "shard-000001.tar").unlink()
    assert not pack([*rows(20), {"image": None, "caption": "x"}], tmp_path, per_shard=6).already
    assert content(tmp_path) == before


def test_another_source_or_other_options_are_refused(tmp_path: Path) -> None:
    pack(rows(12), tmp_path, per_shard=5)
    with pytest.raises(DataError, match="quality 90, now 80"):
        pack(rows(12), tmp_path, per_shard=5, quality=80)
    with pytest.raises(DataError, match="other rows"):
        pack(rows(13)[1:], tmp_path, per_shard=5)
    with pytest.raises(DataError, match="ends before it"):
        pack(rows(5), tmp_path, per_shard=5)


def test_two_packs_into_one_folder(tmp_path: Path) -> None:
    import fcntl

    (tmp_path / ".pack").mkdir()
    script = f"import fcntl, time; f = open({str(tmp_path / '.pack/lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); " \
             "print('locked', flush=True); time.sleep(60)"  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(DataError, match="another pack"):
            pack(rows(3), tmp_path)
        other.kill()
    assert fcntl and pack(rows(3), tmp_path).samples == 3


# -------------------------------------------------------------------------------------------------- bad input


def test_too_many_bad_samples_stop_and_a_larger_budget_goes_on(tmp_path: Path) -> None:
    bad = [{"image": b"" if n % 10 == 0 else picture(n, 8), "caption": "x"} for n in range(200)]
    with pytest.raises(DataError, match=r"10 of 100 samples.*row 0: .*0 bytes.*max-bad-fraction"):
        pack(bad, tmp_path, per_shard=100)
    packed = pack(bad, tmp_path, per_shard=100, max_bad_fraction=0.1)
    assert (packed.samples, [one.row for one in packed.skipped]) == (180, list(range(0, 200, 10)))


@pytest.mark.parametrize(
    ("image", "caption", "cause"),
    [
        ("nowhere.png", "x", "No such file"),
        ("", "x", "no picture"),
        (None, "x", "no picture"),
        (3, "x", "int"),
        (picture(0)[:200], "x", "not a readable picture"),
        (encoded(Image.new("RGB", (64, 64)), "JPEG")[:-40], "x", "cut short"),
        (picture(0), "  ", "empty"),
        (picture(0), None, "empty"),
        (picture(0), 7, "int '7'"),
        (picture(0), ["a", {}], "dict"),
    ],
)
def test_bad_rows_are_named_with_their_cause(image: Any, caption: Any, cause: str, tmp_path: Path) -> None:
    packed = pack([*rows(3), {"image": image, "caption": caption}], tmp_path)
    assert packed.samples == 3
    assert cause in packed.skipped[0].cause
    assert "Traceback" not in packed.skipped[0].cause


def test_bad_files_in_a_folder(tmp_path: Path) -> None:
    folder = pictures_folder(tmp_path / "in")
    (folder / "p0.txt").write_bytes("café".encode("latin-1"))
    (folder / "p2.txt").unlink()
    (folder / "p4.txt").unlink()
    (folder / "p4.json").write_text('{"alt": "x"}')
    causes = {one.name: one.cause for one in pack(open_source(folder), tmp_path / "out").skipped}
    assert "not UTF-8" in causes["p0.png"]
    assert "p2.txt" in causes["p2.png"]
    assert "only alt" in causes["p4.png"]


def refused(*arguments: object, capfd: pytest.CaptureFixture[str]) -> str:
    assert main(["data", "pack", *map(str, arguments), "--workers", "0"]) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    return error.replace("\n", " ")


def test_sources_that_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"

    def table(name: str, text: str | bytes) -> Path:
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return tmp_path / name

    good = table("a.csv", "file_name,captoin\nx.png,y\n")
    assert "file_name, captoin" in refused(good, out, capfd=capfd)  # no usual name: all are shown
    assert "'captoin'" in refused(good, out, "--caption", "caption", capfd=capfd)  # the nearest
    assert "--image" in refused(table("b.csv", "url,caption\nhttp://x/y.png,y\n"), out, capfd=capfd)
    urls = table("c.csv", "url,caption\nhttp://x/y.png,y\n")
    assert "img2dataset" in refused(urls, out, "--image", "url", capfd=capfd)
    latin = table("d.csv", "file_name,caption\nx.png,café\n".encode("latin-1"))
    assert "--encoding latin-1" in refused(latin, out, capfd=capfd)
    assert "row 0" in refused(table("e.csv", "file_name,caption\nx.png,a, b\n"), out, capfd=capfd)
    assert "line 2" in refused(table("f.jsonl", '{"path": "x", "text": "y"}\n{"path"\n'), out, capfd=capfd)
    assert "no samples" in refused(table("g.csv", ""), out, capfd=capfd)
    assert "no samples" in refused(table("h.csv", "file_name,caption\n"), out, capfd=capfd)
    assert "no such file" in refused(tmp_path / "nowhere", out, capfd=capfd)
    assert ".xlsx" in refused(table("i.xlsx", ""), out, capfd=capfd)
    assert "parquet" in refused(table("j.parquet", "PAR1"), out, capfd=capfd)


def test_latin_1_is_read_when_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(0, 8))
    (tmp_path / "t.csv").write_bytes("file_name,caption\na.png,café\n".encode("latin-1"))
    assert main(["data", "pack", str(tmp_path / "t.csv"), str(tmp_path / "o"), "--encoding", "latin-1"]) == 0
    assert captions(tmp_path / "o") == [["café"]]


def test_folders_that_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, out = pictures_folder(tmp_path / "in"), tmp_path / "out"
    (folder / "one.csv").write_text("file_name,caption\n")
    assert "beside the pictures" in refused(folder, out, capfd=capfd)
    (folder / "two.jsonl").write_text("{}")
    error = refused(folder, out, capfd=capfd)
    assert "one.csv" in error
    assert "two.jsonl" in error
    (tmp_path / "empty").mkdir()
    assert "no pictures" in refused(tmp_path / "empty", out, capfd=capfd)
    (tmp_path / "empty" / "a.png").write_bytes(picture(0))
    assert "no captions" in refused(tmp_path / "empty", out, capfd=capfd)
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    other = pictures_folder(tmp_path / "other")
    assert "thesis.tex" in refused(other, out, capfd=capfd)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    with pytest.raises(DataError, match="no samples"):
        pack([], tmp_path / "none")
    with pytest.raises(DataError, match="row 0"):
        pack([{"image": b"", "caption": "x"}], tmp_path / "all bad")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="cannot be written"):
        pack(rows(2), tmp_path / "out")


# --------------------------------------------------------------------------------------------- nasty folders


def test_a_folder_with_everything_that_can_go_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "a").mkdir(parents=True)
    odd = b"caf\xe9".decode("utf-8", "surrogateescape")
    for name in ("good", odd, "pipe", "device", "gone", "folder", "latin", "long", "surrogate"):
        (folder / "a" / f"{name}.txt").write_text(f"caption of {name!r}")
        if name in ("good", odd, "latin", "long"):
            (folder / "a" / f"{name}.png").write_bytes(picture(1))
    os.mkfifo(folder / "a" / "pipe.png")
    (folder / "a" / "device.png").symlink_to("/dev/zero")
    (folder / "a" / "gone.png").symlink_to("nowhere.png")
    (folder / "a" / "folder.png").mkdir()
    (folder / "a" / "latin.txt").write_bytes("für".encode("latin-1"))
    (folder / "a" / "long.txt").write_text("x" * 100_001)
    (folder / "a" / "surrogate.txt").unlink()
    (folder / "a" / "surrogate.json").write_text('{"caption": "half \\ud83d"}')
    (folder / "a" / "surrogate.png").write_bytes(picture(3))
    (folder / "a" / "loop").symlink_to("..")
    packed = pack(open_source(folder), tmp_path / "out", max_bad_fraction=1)
    assert packed.samples == 3
    assert {Path(one.name).stem: one.cause.rpartition(": ")[2] for one in packed.skipped} == {
        "pipe": "is no regular file",
        "device": "is no regular file",
        "gone": "No such file or directory",
        "latin": "latin.txt is not UTF-8 at byte 1",
        "long": "its caption has 100,001 characters, above 100,000",
    }
    one = index(str(tmp_path / "out" / "shard-000000.tar"))
    fields = [json.loads(ShardFiles().read(one, *one.member(row, "json") or (0, 0))) for row in range(len(one))]
    assert [field["captions"] for field in fields] == [[f"caption of {odd!r}"], ["caption of 'good'"], ["half \ud83d"]]
    assert fields[0]["name"] == f"a/{odd}.png"


def test_a_folder_that_may_not_be_entered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "in" / "closed").mkdir(parents=True)
    (tmp_path / "in" / "a.png").write_bytes(picture(1))
    (tmp_path / "in" / "a.txt").write_text("a")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"closed: cannot be read: Permission denied"):
        open_source(tmp_path / "in")
