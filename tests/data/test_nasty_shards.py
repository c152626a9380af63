"""Shards that no honest writer makes, or that the honest ones make on a bad day: refused by name, never a crash."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
from conftest import add_member, picture
from tars import write_tar

from clip_train.cli import main
from clip_train.data.inspect import inspect
from clip_train.data.listing import split_name
from clip_train.data.shards import data_fingerprint, index, resolve
from clip_train.data.tar import members
from clip_train.errors import DataError

ODD = b"caf\xe9".decode("utf-8", "surrogateescape")  # a name in latin-1


def pair(key: str, number: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", picture(number)), (f"{key}.txt", b"text")]


def keys(path: Path) -> list[str]:
    one = index(str(path))
    return [one.key(sample) for sample in range(len(one))]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.jpg", ("a/b", "jpg")),
        ("./a/b.JPG", ("a/b", "jpg")),
        ("a.b/c.seg.png", ("a.b/c", "seg.png")),
        ("v1.2.jpg", ("v1", "2.jpg")),
        ("._0001.jpg", ("", "")),
        ("__MACOSX/._a.jpg", ("", "")),
        (".DS_Store", ("", "")),
        ("README", ("", "")),
        ("a.", ("", "")),
        ("folder/", ("", "")),
    ],
)
def test_which_sample_a_member_belongs_to(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_sparse_members_are_named(tmp_path: Path, form: str) -> None:
    """GNU tar stores a file with holes in pieces: its bytes are not what lies in the tar."""
    with (tmp_path / "s1.png").open("wb") as file:
        for place in range(0, 40 << 20, 1 << 20):  # more pieces than one header holds
            file.seek(place)
            file.write(picture(1))
    (tmp_path / "s1.txt").write_text("sparse")
    (tmp_path / "s2.txt").write_text("after it")
    names = ["s1.png", "s1.txt", "s2.txt"]
    subprocess.run(["tar", "-S", f"--format={form}", "-cf", "x.tar", *names], cwd=tmp_path, check=True)
    found = list(members(tmp_path / "x.tar"))
    assert [one.name for one in found] == names
    data = (tmp_path / "x.tar").read_bytes()
    assert [data[one.offset : one.offset + one.size] for one in found[1:]] == [b"sparse", b"after it"]
    with pytest.raises(DataError, match=r"'s1\.png' has holes.*without `tar --sparse`.*--fix"):
        index(str(tmp_path / "x.tar"))


def test_a_link_costs_its_sample_and_not_what_follows(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in pair("s0"):
            add_member(tar, name, content)
        for name, kind in (("k", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE), ("f", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(f"{name}.png")
            info.type, info.linkname = kind, "s0.png" * (kind != tarfile.FIFOTYPE)
            tar.addfile(info)
            add_member(tar, f"{name}.txt", b"text")
        for name, content in pair("s1", 1):
            add_member(tar, name, content)
    with pytest.raises(DataError, match=r"'k\.png' is a link.*--dereference"):
        index(str(path))
    found = inspect(str(path))
    assert {one.key: one.cause.split(";")[0] for one in found.broken} == {
        "k": "member 'k.png' is a link (pack with `tar --dereference`)",
        "h": "member 'h.png' is a hard link (pack with `tar --hard-dereference`)",
        "f": "member 'f.png' is a pipe",
    }
    assert main(["data", "inspect", str(path), "--fix", str(tmp_path / "o"), "--workers", "0"]) == 0
    assert keys(tmp_path / "o" / "x.tar") == ["s0", "s1"]


def test_names_that_are_not_utf8_go_all_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"{ODD}.tar"
    write_tar(
        path, [*pair(ODD), *pair("plain", 1), (f"bad{ODD}.png", b"none"), (f"bad{ODD}.txt", b"x"), (f"a.{ODD}", b"")]
    )
    assert keys(path)[:2] == [ODD, "plain"]
    data_fingerprint([index(str(path))])
    out = tmp_path / "o"
    command = [
        "data",
        "inspect",
        str(tmp_path / "*.tar"),
        "--fix",
        str(out),
        "--out",
        str(tmp_path / "f"),
        "--workers",
        "0",
    ]
    assert main(command) == 0
    assert keys(next(out.glob("*.tar"))) == [ODD, "plain"]
    left_out = [json.loads(line) for line in (out / "left_out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert f"bad{ODD}" in [one["key"] for one in left_out]
    assert json.loads((tmp_path / "f" / "inspect.json").read_text(encoding="utf-8"))["samples"] == 4


def test_a_tar_in_a_tar_is_a_member(tmp_path: Path) -> None:
    inner = write_tar(tmp_path / "inner.tar", pair("in")).read_bytes()
    assert keys(write_tar(tmp_path / "x.tar", [*pair("s0"), ("deep.tar", inner), *pair("s1")])) == ["s0", "deep", "s1"]


def test_too_many_extensions_are_keys_with_dots(tmp_path: Path) -> None:
    """A table of samples by extensions would grow with their product."""
    path = write_tar(tmp_path / "x.tar", [(f"cam{n}.2024-{n}.png", b"x") for n in range(300)])
    with pytest.raises(DataError, match=r"x\.tar: .*more than 256 extensions \(2024-0\.png.*first dot"):
        index(str(path))


@pytest.mark.parametrize("name", ["n" * 5000 + ".jpg", "a\0b.jpg"])
def test_names_of_no_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("short.jpg")
        info.pax_headers = {"path": name}
        tar.addfile(info, io.BytesIO())
        add_member(tar, "good.jpg", b"x")
    with pytest.raises(DataError, match="no name of a file"):
        index(str(path))


def test_any_damage_is_a_data_error(tmp_path: Path) -> None:
    """Bytes of the headers, overwritten at random, 400 times: refused, or still a listing within the file."""
    rng = random.Random(0)
    path, whole = tmp_path / "x.tar", b""
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        whole = write_tar(tmp_path / "x.tar", [*pair("k" * 120), *pair("ü"), ("b.txt", b"x" * 700)], kind).read_bytes()
        starts = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
        refused = 0
        for _ in range(200):
            data = bytearray(whole)
            at = rng.choice(starts)
            for _ in range(rng.randint(1, 3)):
                data[at + rng.choice([rng.randrange(100), rng.randrange(124, 157), rng.randrange(512, 600)])] = (
                    rng.randrange(256)
                )
            data[at + 148 : at + 156] = b"%06o\0 " % (sum(data[at : at + 148]) + 256 + sum(data[at + 156 : at + 512]))
            path.write_bytes(data[: rng.choice([None, None, rng.randrange(len(data))])])
            try:
                one = index(str(path))
                assert (one.offsets + one.sizes).max() <= path.stat().st_size
            except DataError as error:
                assert str(path) in str(error)
                refused += 1
        assert 50 < refused < 200


def test_a_file_cut_short_while_it_is_listed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{n}.txt", b"x" * 3000) for n in range(50)])
    listed = members(path)
    next(listed)
    os.truncate(path, 2000)
    with pytest.raises(DataError, match="cut short"):
        list(listed)


# --------------------------------------------------------------------------------------------- what patterns name


def test_nothing_that_was_meant_as_a_shard_is_passed_over(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", pair("s"))
    (tmp_path / "b.tar").symlink_to("a.tar")
    (tmp_path / "folder").mkdir()
    write_tar(tmp_path / "folder" / "c.tar", pair("s"))
    (tmp_path / "linked").symlink_to("folder")
    names = [Path(one).name for one in resolve(f"{tmp_path}/*.tar")]
    assert names == ["a.tar", "b.tar"]  # a link to a file is one
    assert len(resolve(f"{tmp_path}/**")) >= 3  # folders on the way are none
    for make, message in (
        (lambda path: path.symlink_to("gone.tar"), r"d\.tar is a link to gone\.tar, where there is no file"),
        (lambda path: path.symlink_to("d.tar"), r"d\.tar is a link to d\.tar"),
        (lambda path: path.mkdir(), r"d\.tar is a folder, not a tar file"),
        (os.mkfifo, r"d\.tar is a pipe"),
    ):
        make(tmp_path / "d.tar")
        with pytest.raises(DataError, match=message):
            resolve(f"{tmp_path}/*.tar")
        (tmp_path / "d.tar").rmdir() if (tmp_path / "d.tar").is_dir() else (tmp_path / "d.tar").unlink()


@pytest.mark.parametrize("pattern", ["n" * 300 + ".tar", "~nobody-of-this-name/x.tar", "\0.tar", "a" * 5000])
def test_names_that_no_file_can_have(pattern: str) -> None:
    with pytest.raises(DataError):
        resolve(pattern)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_what_may_not_be_read() -> None:
    with tempfile.TemporaryDirectory() as name:  # others may not enter pytest's own folders
        Path(name).chmod(0o755)
        _may_not_be_read(Path(name))


def _may_not_be_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", pair("s"))
    path.chmod(0)
    (tmp_path / "closed").mkdir(mode=0o700)
    script = f"""
import os
from clip_train.data.shards import index, resolve
from clip_train.errors import DataError
os.setgid(65534), os.setuid(65534)
for task in (lambda: index({str(path)!r}), lambda: resolve({str(tmp_path)!r} + "/closed/a.tar"),
             lambda: resolve({str(tmp_path)!r} + "/closed/*.tar")):
    try:
        task()
    except DataError as error:
        print(error)
"""
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=60)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout + done.stderr
    assert all("ermission denied" in line for line in lines), lines
