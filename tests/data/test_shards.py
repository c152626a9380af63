from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from conftest import add_member
from tars import write_tar

from clip_train.data.shards import data_fingerprint, index, resolve
from clip_train.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a-000.tar", "a-001.tar", "a-002.tar", "b.tar"):
        write_tar(tmp_path / name, [("k.txt", name.encode())])
    return tmp_path


def names(shards: list[str]) -> list[str]:
    return [Path(shard).name for shard in shards]


def test_resolve_braces_globs_lists(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(resolve(f"{folder}/a-{{000..002}}.tar")) == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert names(resolve("a-*.tar", folder)) == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert names(resolve(["b.tar", "a-{002,000}.tar"], folder)) == ["b.tar", "a-002.tar", "a-000.tar"]
    monkeypatch.chdir(folder)  # relative paths that the recipe's folder does not have: the working directory
    assert names(resolve("b.tar", folder / "elsewhere")) == ["b.tar"]


def test_resolve_says_what_is_there(folder: Path) -> None:
    with pytest.raises(DataError, match=r"'a-003\.tar' names no file.*a-000\.tar, a-001\.tar, a-002\.tar, b\.tar"):
        resolve("a-{000..003}.tar", folder)
    with pytest.raises(DataError, match="names no file"):
        resolve("c-*.tar", folder)
    with pytest.raises(DataError, match=r"names no file.*holds a-000"):
        resolve("no/such/folder/x.tar", folder)
    with pytest.raises(DataError, match="named 2 times"):
        resolve(["b.tar", "b.tar"], folder)
    with pytest.raises(DataError, match="`shards` is empty"):
        resolve([])
    with pytest.raises(DataError, match="no-such-set"):
        resolve("embedded:no-such-set/x.tar")


LONG = "folder/" + "n" * 150 + ".jpg"


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_agrees_with_tarfile(tmp_path: Path, kind: int) -> None:
    members = [(f"d/{i:03}.{e}", bytes([i]) * (i * 37)) for i in range(30) for e in ("JPG", "seg.png", "json")]
    if kind != tarfile.USTAR_FORMAT:
        members += [(LONG, b"long"), ("ключ.jpg", b"utf"), ("x" * 300 + "/y.jpg", b"deep")]
    else:
        members += [("p" * 90 + "/" + "q" * 90 + ".jpg", b"prefix")]
    path = write_tar(tmp_path / "x.tar", members, kind)
    raw, found = path.read_bytes(), {}
    one = index(str(path))
    for sample in range(len(one)):
        for extension in one.extensions:
            if place := one.member(sample, extension):
                found[f"{one.key(sample)}.{extension}"] = raw[place[0] : sum(place)]
    with tarfile.open(path) as tar:
        expected = {
            m.name.replace(".JPG", ".jpg"): tar.extractfile(m).read()  # type: ignore[union-attr]
            for m in tar.getmembers()
        }
    assert found == expected


def test_samples_and_what_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("./d/1.jpg", "d/2.jpg", "README", "d/.DS_Store", "d/1.txt", "d/2.cls.txt"):
            add_member(tar, name, b"x")
    one = index(str(path))
    assert [one.key(i) for i in range(len(one))] == ["d/1", "d/2"]
    assert one.contents() == "jpg ×2, txt ×1, cls.txt ×1"
    assert one.member(1, "txt") is None
    assert one.member(0, "nothing") is None


def good(path: Path) -> bytes:
    return write_tar(path, [(f"{i}.txt", b"x" * 700) for i in range(5)]).read_bytes()


def header(name: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "target" if kind != tarfile.REGTYPE else ""
        tar.addfile(info)
    return out.getvalue()


def pax_header(records: bytes) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    return info.tobuf() + records.ljust(512, b"\0") + header("a.jpg")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: b"", "is empty"),
        (lambda p: good(p)[: 512 * 2 + 100], "cut short"),
        (lambda p: good(p)[: 512 * 3 + 100], "cut short"),
        (lambda p: good(p)[: 512 * 3], "cut short.*end mark"),
        (lambda p: b"<html>404 not found</html>" * 100, r"not a tar file .*<html>404"),
        (lambda p: gzip.compress(good(p)), "compressed.*gunzip"),
        (lambda p: good(p)[:1536] + b"#" * 512 + good(p)[2048:], "damaged at byte 1536"),
        (lambda p: good(p) + good(p), "joined with `cat`"),
        (lambda p: bytes(10240), "holds no samples"),
        (lambda p: header("README"), "holds no samples.*1 members have no KEY.EXTENSION"),
        (lambda p: pax_header(b"0 path=x\n"), "damaged"),
        (lambda p: pax_header(b"no length at all"), "damaged"),
        (lambda p: header("../up.jpg"), r"'\.\./up\.jpg' names a place outside"),
        (lambda p: header("/etc/x.jpg"), "names a place outside"),
        (lambda p: header("a.jpg", tarfile.SYMTYPE), "link"),
        (lambda p: header("a.jpg", tarfile.LNKTYPE), "link"),
    ],
)
def test_bad_shards_stop_and_are_named(tmp_path: Path, make, message: str) -> None:
    content = make(tmp_path / "good.tar")
    path = tmp_path / "bad.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        index(str(path))
    assert str(path) in str(caught.value)


def test_duplicate_member(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("1.jpg", b"a"), ("2.jpg", b"b"), ("1.jpg", b"c")])
    with pytest.raises(DataError, match=r"'1\.jpg' occurs twice"):
        index(str(path))


def test_missing_and_unreadable_shard(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        index(str(tmp_path / "gone.tar"))


def test_fingerprint_sees_changes_but_not_folders(tmp_path: Path) -> None:
    def fingerprint(folder: str, *members: tuple[str, bytes]) -> str:
        (tmp_path / folder).mkdir()
        return data_fingerprint([index(str(write_tar(tmp_path / folder / "s.tar", members)))])

    base = fingerprint("one", ("1.txt", b"abc"), ("2.txt", b"abc"))
    assert base == fingerprint("two", ("1.txt", b"abc"), ("2.txt", b"abc"))
    assert base != fingerprint("key", ("1.txt", b"abc"), ("3.txt", b"abc"))
    assert base != fingerprint("order", ("2.txt", b"abc"), ("1.txt", b"abc"))
    assert base != fingerprint("size", ("1.txt", b"abc"), ("2.txt", b"abcd"))
