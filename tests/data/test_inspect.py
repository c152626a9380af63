"""Inspecting, checked with tarfile and Pillow, and by comparing everything with everything."""

from __future__ import annotations

import io
import json
import tarfile
import tomllib
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture
from PIL import Image
from servers import ShardServer
from tars import BytesTokenizer, encoded, write_tar

from clip_train.cli import main
from clip_train.data.cache import Cache
from clip_train.data.inspect import inspect
from clip_train.data.inspect_duplicates import equal_groups, near_groups
from clip_train.data.inspect_fix import fix
from clip_train.data.inspect_shard import difference_hash
from clip_train.data.shards import data_fingerprint, index
from clip_train.errors import DataError
from tokenizer import BPETokenizer


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # pyright: ignore


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards: formats, modes and sizes of all kinds; three broken samples and a stray."""
    folder = tmp_path_factory.mktemp("mixed")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    write_tar(
        folder / "a.tar",
        [
            ("rgb.jpg", encoded(noise, "JPEG")),
            ("rgb.txt", b"a photo of noise"),
            ("rgba.png", encoded(noise.convert("RGBA"))),
            ("rgba.txt", b"a photo of noise"),
            ("grey.webp", encoded(noise.convert("L").convert("RGB").resize((20, 20)), "WEBP")),
            ("grey.txt", "ein graues Bild — très gris".encode()),
            ("cut.jpg", encoded(noise, "JPEG")[:-30]),
            ("cut.txt", b"cut short"),
            ("README", b"not a sample"),
        ],
    )
    write_tar(
        folder / "b.tar",
        [
            ("same.jpg", encoded(noise, "JPEG")),
            ("same.txt", b"a very long caption " * 30),
            ("blank.png", encoded(Image.new("RGB", (7, 9), "blue"))),
            ("blank.txt", b"blue"),
            ("alone.jpg", encoded(noise, "JPEG")),
            ("mute.jpg", encoded(noise, "JPEG")),
            ("mute.txt", b" \n"),
            ("rgb.jpg", encoded(noise.resize((40, 40)), "JPEG")),
            ("rgb.txt", b"the key is in the other shard, too"),
        ],
    )
    return folder


def test_figures(mixed: Path) -> None:
    found = inspect(f"{mixed}/*.tar", workers=2)
    figures = found.figures
    assert (found.image, found.caption) == ("jpg;png;webp", "txt")
    assert figures["samples"] == 9
    assert figures["bytes"] == sum(path.stat().st_size for path in mixed.glob("*.tar"))
    assert figures["extensions"] == {"txt": 8, "jpg": 6, "png": 2, "webp": 1}
    assert figures["keys_in_several_shards"] == 1
    assert figures["shards"][0]["strays"] == ["README"]
    good = {"rgb": "a", "rgba": "a", "grey": "a", "same": "b", "blank": "b", "rgb ": "b"}
    opened = []
    for key, shard in good.items():
        (data,) = [
            data for name, data in members(mixed / f"{shard}.tar").items()
            if name.startswith(key.strip() + ".") and not name.endswith("txt")
        ]  # fmt: skip
        opened.append((Image.open(io.BytesIO(data)), len(data)))
    pictures = figures["image"]
    assert pictures["formats"] == dict(Counter(image.format for image, _ in opened))
    assert pictures["modes"] == dict(Counter(image.mode for image, _ in opened))
    assert pictures["width"]["mean"] == pytest.approx(np.mean([image.width for image, _ in opened]))
    assert pictures["height"]["max"] == max(image.height for image, _ in opened)
    assert pictures["bytes"]["median"] == np.median([size for _, size in opened])
    assert pictures["blank"] == 1
    texts = figures["captions"]
    tokens = [len(BPETokenizer.default().encode(text)) + 2 for text in
              ["a photo of noise"] * 2 + ["ein graues Bild — très gris", "a very long caption " * 30, "blue",
               "the key is in the other shard, too"]]  # fmt: skip
    assert texts["tokens"]["mean"] == pytest.approx(np.mean(tokens))
    assert (texts["beyond_cap"], texts["share_beyond_cap"]) == (1, pytest.approx(1 / 6))
    assert texts["tokens"]["max"] == 122  # 4 words, 30 times, SOT and EOT
    assert texts["most_frequent"] == {"a photo of noise": 2}
    assert [(one.key, one.cause.split(":")[0]) for one in found.broken] == [
        ("cut", "JPEG is cut short"),
        ("alone", "it has no txt member, only jpg"),
        ("mute", "its caption is empty"),
    ]


def test_a_sample_of_them(mixed: Path) -> None:
    found = inspect([f"{mixed}/{{a,b}}.tar"], sample=4)
    assert found.figures["looked_at"] == len(found.measured) == 4
    assert found.figures["samples"] == 9
    assert [one.key for one in found.measured] == [one.key for one in inspect(f"{mixed}/*.tar", sample=4).measured]


# ------------------------------------------------------------------------------------------------- duplicates


def brute(hashes: list[int], distance: int) -> set[frozenset[int]]:
    """Connected components of the graph of near pairs, by comparing all and merging until nothing changes."""
    groups = [{place} for place in range(len(hashes))]
    for i, j in combinations(range(len(hashes)), 2):
        if bin(hashes[i] ^ hashes[j]).count("1") <= distance:
            merged = next(group for group in groups if i in group) | next(group for group in groups if j in group)
            groups = [group for group in groups if not group & merged] + [merged]
    return {frozenset(group) for group in groups if len(group) > 1}


@pytest.mark.parametrize("distance", [0, 1, 3])
def test_near_groups_are_those_of_brute_force(distance: int) -> None:
    rng = np.random.default_rng(distance)
    hashes = [int(one) for one in rng.integers(0, 2**63, 40)]
    for _ in range(120):  # flip a few bits of an earlier one
        old = hashes[int(rng.integers(len(hashes)))]
        for bit in rng.choice(64, int(rng.integers(0, 6)), replace=False):
            old ^= 1 << int(bit)
        hashes.append(old)
    found = {frozenset(group) for group in near_groups(hashes, distance)}
    assert found == brute(hashes, distance)
    assert len(found) > 5


def test_equal_groups() -> None:
    assert equal_groups(["a", "b", "a", "c", "b", "a"]) == [[0, 2, 5], [1, 4]]


def test_difference_hash_by_hand() -> None:
    rising = np.repeat(np.arange(0, 9, dtype=np.uint8)[None, :, None] * 20, 8, axis=0).repeat(3, axis=2)
    assert difference_hash(np.ascontiguousarray(rising)) == 2**64 - 1
    assert difference_hash(np.ascontiguousarray(rising[:, ::-1])) == 0
    left_half = rising.copy()
    left_half[:, 5:] = left_half[:, 4:5]
    assert difference_hash(left_half) == 0xF0F0F0F0F0F0F0F0


def test_duplicates_by_bytes_pixels_and_look(tmp_path: Path) -> None:
    smooth = Image.fromarray(np.random.default_rng(3).integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((96, 96))
    other = Image.fromarray(np.random.default_rng(4).integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((96, 96))
    pictures = {
        "a": encoded(smooth),
        "copy": encoded(smooth),
        "again": encoded(smooth, compress_level=1),  # other bytes, same pixels
        "small": encoded(smooth.resize((70, 70)), "JPEG", quality=60),
        "other": encoded(other),
    }
    data = [member for key, one in pictures.items() for member in ((f"{key}.png", one), (f"{key}.txt", b"x"))]
    path = write_tar(tmp_path / "x.tar", data)
    duplicates = inspect(str(path)).figures["duplicates"]

    def named(*keys: str) -> list[list[str]]:
        return [[f"{path}: {key}" for key in keys]]

    assert duplicates["bytes"]["samples"] == named("a", "copy")
    assert duplicates["pixels"]["samples"] == named("a", "copy", "again")
    assert duplicates["pixels"]["surplus"] == 2
    assert duplicates["look_alikes"]["samples"] == named("a", "copy", "again", "small")


# ------------------------------------------------------------------------------------- columns and img2dataset


def write_img2dataset(folder: Path, shards: int = 2, count: int = 4) -> Path:
    """Shards as img2dataset 1.45 writes them with its defaults (`--output_format webdataset`)."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(count):
                key = f"{shard:05d}{number:04d}"
                text = f"caption {number} of {shard}"
                meta = {
                    "caption": text, "url": f"https://x/{key}.jpg", "key": key, "status": "success",
                    "error_message": None, "width": 32, "height": 32, "original_width": 64, "original_height": 64,
                    "exif": "{}", "sha256": "0" * 64,
                }  # fmt: skip
                with Image.open(io.BytesIO(picture(number))) as image:
                    jpg = encoded(image.convert("RGB"), "JPEG")
                for name, data in ((f"{key}.jpg", jpg), (f"{key}.json", json.dumps(meta, indent=4).encode()),
                                   (f"{key}.txt", text.encode())):  # fmt: skip
                    info = tarfile.TarInfo(name)
                    info.size, info.mtime, info.uname, info.mode = len(data), 1700000000, "bigdata", 0o444
                    tar.addfile(info, io.BytesIO(data))
        stats = {"count": count + 1, "successes": count, "failed_to_download": 1, "failed_to_resize": 0,
                 "duration": 1.5, "status_dict": {"success": count, "HTTP Error 404: Not Found": 1}}  # fmt: skip
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4))
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1 is not read")
    return folder


def test_img2datasets_output_is_read_as_it_is(tmp_path: Path) -> None:
    from clip_train.data.stream import Stream, open_source
    from clip_train.data.transforms import Augment

    folder = write_img2dataset(tmp_path / "in")
    found = inspect(str(folder / "*.tar"))
    assert (found.image, found.caption, found.figures["samples"], found.broken) == ("jpg", "txt", 8, [])
    assert found.figures["shards"][0]["img2dataset"]["failed_to_download"] == 1
    for caption in ("txt", "json.caption"):
        source = tomllib.loads(found.stanza)["data"]["sources"]["mine"] | {"caption": caption}
        stream = Stream([open_source("x", **source)], BytesTokenizer(), Augment(8), seed=0, batch_size=8)
        batch = stream[0]
        assert sorted(batch.keys) == [f"{shard:05d}{number:04d}" for shard in range(2) for number in range(4)]
        text = bytes(batch.ids[1 : int(batch.lengths[0]) - 1].to(dtype=batch.ids.dtype).tolist()).decode()
        assert text == f"caption {int(batch.keys[0][-4:])} of {int(batch.keys[0][:5])}"


def test_lost_samples_of_img2dataset_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_img2dataset(tmp_path / "in")
    stats = json.loads((folder / "00001_stats.json").read_text()) | {"successes": 9}
    (folder / "00001_stats.json").write_text(json.dumps(stats))
    assert main(["data", "inspect", str(folder / "*.tar"), "--workers", "0"]) == 0
    assert "img2dataset wrote 9 samples, 4 are here" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("name", "data", "column"),
    [
        ("json", b'{"captions": ["a", "b"], "caption": "c"}', "json.captions"),
        ("json", b'{"url": "x", "text": "t"}', "json.text"),
        ("txt", b"plain", "txt"),
    ],
)
def test_the_caption_column_is_found_and_the_stanza_is_a_recipe(
    name: str, data: bytes, column: str, tmp_path: Path, recipe_tree: dict[str, Any]
) -> None:
    from clip_train.config.load import parse_recipe

    write_tar(tmp_path / "ünd 'x'.tar", [("k.png", picture(0)), (f"k.{name}", data)])
    found = inspect(str(tmp_path / "*.tar"))
    assert found.caption == column
    recipe_tree["data"]["sources"] = tomllib.loads(found.stanza)["data"]["sources"]
    source = parse_recipe(recipe_tree).data.sources["mine"]
    assert (source.shards, source.image, source.caption) == (str(tmp_path / "*.tar"), "png", column)
    assert source.caption_choice == ("random" if column == "json.captions" else "first")


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    path = str(write_tar(tmp_path / "x.tar", [("k.png", picture(0)), ("k.json", b'{"alt": "x"}')]))
    with pytest.raises(DataError, match=r"fields of json: alt.*--caption"):
        inspect(path)
    with pytest.raises(DataError, match=r"--image jpg.*png ×1"):
        inspect(path, image="jpg", caption="json.alt")
    assert inspect(path, caption="json.alt").broken == []
    with pytest.raises(DataError, match="names no file"):
        inspect(str(tmp_path / "y*.tar"))


# ------------------------------------------------------------------------------------------------- elsewhere


def test_shards_from_elsewhere_are_inspected_as_those_on_a_disk(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(path.name for path in mixed.glob("*.tar"))
    with ShardServer() as server:
        server.files = {name: (mixed / name).read_bytes() for name in names}
        server.faults.append("503")
        urls, cache = [server.url(name) for name in names], tmp_path / "cache"
        command = ["data", "inspect", *urls, "--cache-dir", str(cache), "--fix", str(tmp_path / "o"), "--workers", "0"]
        assert main([*command, "--out", str(tmp_path / "figures")]) == 0
        assert len(server.bodies()) == len(names) + 1  # each is fetched once (and one again after its fault)
    figures = json.loads((tmp_path / "figures" / "inspect.json").read_text())
    expected = inspect([str(mixed / name) for name in names])
    for name in ("samples", "image", "captions", "extensions", "fingerprint"):
        assert figures[name] == expected.figures[name], name
    assert [one["key"] for one in figures["broken"]] == [one.key for one in expected.broken]
    assert tomllib.loads(figures["stanza"])["data"]["sources"]["mine"]["shards"] == urls
    assert sorted(path.name for path in (tmp_path / "o").glob("*.tar")) == names
    assert members(tmp_path / "o" / names[0]).items() <= members(mixed / names[0]).items()
    capsys.readouterr()


def test_damage_elsewhere_is_told_and_not_kept(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    damaged(tmp_path / "in")
    with ShardServer() as server:
        server.files = {path.name: path.read_bytes() for path in (tmp_path / "in").glob("*.tar")}
        found = inspect(
            [server.url(name) for name in ("whole.tar", "cut.tar", "twice.tar")], cache=Cache(tmp_path / "c")
        )
        damage = {line["shard"].rpartition("/")[2]: line.get("damage", "") for line in found.figures["shards"]}
        assert "cut short" in damage["cut.tar"] and "twice" in damage["twice.tar"] and not damage["whole.tar"]
        assert [path.name.partition("-")[2] for path in (tmp_path / "c").glob("*-*.tar")] == ["whole.tar"]
        with pytest.raises(DataError, match=r"gone\.tar: does not exist"):
            inspect(server.url("gone.tar"), cache=Cache(tmp_path / "c"))


# ---------------------------------------------------------------------------------------------- damage and fix


def samples(*numbers: int) -> list[tuple[str, bytes]]:
    return [(f"s{n}.{name}", picture(n) if name == "png" else b"text") for n in numbers for name in ("png", "txt")]


def damaged(folder: Path) -> None:
    """One shard of each kind of damage, and a whole one."""
    write_tar(folder / "whole.tar", samples(0, 1))
    write_tar(folder / "cut.tar", samples(2, 3, 4))
    data = (folder / "cut.tar").read_bytes()
    (folder / "cut.tar").write_bytes(data[: data.index(b"s4.png") + 600])
    write_tar(folder / "hit.tar", samples(5, 6))
    data = bytearray((folder / "hit.tar").read_bytes())
    data[data.index(b"s6.png") + 3] ^= 0xFF  # its header's checksum no longer fits
    (folder / "hit.tar").write_bytes(data)
    write_tar(folder / "twice.tar", [*samples(7, 8), ("s7.png", picture(9))])
    write_tar(folder / "escape.tar", [*samples(9), ("../../evil.png", picture(1)), ("../../evil.txt", b"x")])
    (folder / "zero.tar").write_bytes(b"")
    write_tar(folder / "bad.tar", [*samples(10), ("s11.png", b""), ("s11.txt", b"x")])


def test_damaged_shards_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    damaged(tmp_path)
    found = inspect(str(tmp_path / "*.tar"))
    shards = {Path(line["shard"]).stem: line for line in found.figures["shards"]}
    assert {name: line["samples"] for name, line in shards.items()} == {
        "whole": 2, "cut": 2, "hit": 1, "twice": 2, "escape": 2, "zero": 0, "bad": 2,
    }  # fmt: skip
    assert "damage" not in shards["whole"] and "damage" not in shards["bad"]
    for name, word in (
        ("cut", "cut short"),
        ("hit", "damaged"),
        ("twice", "twice"),
        ("escape", "outside"),
        ("zero", "0 b"),
    ):
        assert word in shards[name]["damage"]
        with pytest.raises(DataError):  # just those that training refuses
            index(shards[name]["shard"])
    assert found.figures["fingerprint"] is None
    assert {one.key for one in found.broken} == {"s7", "../../evil", "s11"}


def test_fix_keeps_what_is_good_and_lists_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    damaged(tmp_path / "in")
    out = tmp_path / "out"
    assert main(["data", "inspect", str(tmp_path / "in" / "*.tar"), "--fix", str(out), "--workers", "0"]) == 0
    kept = {path.stem: index(str(path)) for path in sorted(out.glob("*.tar"))}
    assert {name: [one.key(row) for row in range(len(one))] for name, one in kept.items()} == {
        "whole": ["s0", "s1"], "cut": ["s2", "s3"], "hit": ["s5"], "twice": ["s8"], "escape": ["s9"], "bad": ["s10"],
    }  # fmt: skip
    assert members(out / "cut.tar") == dict(samples(2, 3))
    assert members(out / "whole.tar") == members(tmp_path / "in" / "whole.tar")
    left_out = [json.loads(line) for line in (out / "left_out.jsonl").read_text().splitlines()]
    assert {one["key"] for one in left_out if one["key"]} == {"s7", "../../evil", "s11"}
    assert {Path(one["shard"]).stem for one in left_out} == {"cut", "hit", "twice", "escape", "zero", "bad"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["fingerprint"] == data_fingerprint(index(str(out / one["name"])) for one in summary["shards"])
    again = inspect(str(out / "*.tar"))
    assert again.broken == [] and again.figures["samples"] == summary["samples"] == 8
    assert "nothing left of" in capsys.readouterr().out


def test_a_fix_destroys_nothing(mixed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(mixed / "*.tar"), "--fix", str(mixed), "--workers", "0"]) == 2
    assert "is there already" in capfd.readouterr().err
    assert main(["data", "inspect", str(mixed / "a.tar"), "--fix", str(tmp_path / "o"), "--sample", "2"]) == 2
    write_tar(tmp_path / "a.tar", samples(0))
    with pytest.raises(DataError, match=r"several shards are called a\.tar"):
        fix(inspect([str(mixed / "a.tar"), str(tmp_path / "a.tar")]), tmp_path / "o")
    assert not (tmp_path / "o").exists()


# --------------------------------------------------------------------------------------------------- the files


def test_inspect_json_and_the_contact_sheet(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(mixed / "*.tar"), "--out", str(tmp_path / "o"), "--workers", "0"]) == 0
    figures = json.loads((tmp_path / "o" / "inspect.json").read_text())
    assert figures == inspect(str(mixed / "*.tar")).figures
    assert figures["stanza"] in capsys.readouterr().out
    with Image.open(tmp_path / "o" / "contact_sheet.png") as sheet:
        assert sheet.format == "PNG"
        colours = sheet.getcolors(1 << 20)
    assert colours is not None
    # The blue picture of 7 x 9 is enlarged three times at most.
    assert {colour: count for count, colour in colours}[(0, 0, 255)] == 21 * 27


def test_inspecting_needs_no_torch() -> None:
    import subprocess
    import sys

    script = "import sys, clip_train.data.inspect_fix, clip_train.data.inspect_report, clip_train.data.pack; " \
             "print('torch' in sys.modules)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stdout + done.stderr
