from __future__ import annotations

import json
from pathlib import Path

import pytest
from tars import write_tar

from clip_train.data import columns
from clip_train.data.columns import BadSampleError, Column
from clip_train.data.files import ShardFiles
from clip_train.data.shards import ShardIndex, index
from clip_train.errors import DataError


def test_parse() -> None:
    assert columns.parse("jpg; PNG") == (Column("jpg"), Column("png"))
    assert columns.parse("json.meta.title") == (Column("json", ("meta", "title")),)
    assert columns.parse(".txt;seg.png") == (Column("txt"), Column("seg.png"))
    assert columns.parse("json.a.b[:2];txt") == (Column("json", ("a", "b"), 2), Column("txt"))
    with pytest.raises(DataError, match="names no member"):
        columns.parse(" ; ")
    for wrong in ("json.captions[0]", "json.captions[:-1]", "json.captions[:0]", "json.captions[1:2]"):
        with pytest.raises(DataError, match=r"as json.captions\[:2\]"):
            columns.parse(wrong)
    with pytest.raises(DataError, match=r"write `json.FIELD\[:2\]`"):
        columns.parse("txt[:2]")


@pytest.fixture
def shard(tmp_path: Path) -> ShardIndex:
    content = json.dumps({"captions": ["one", "two"], "label": 3, "meta": {"title": "t"}}).encode()
    members = [(f"{i}.{e}", d) for i in range(20) for e, d in (("jpg", b"pixels"), ("json", content), ("cls", b"7"))]
    return index(str(write_tar(tmp_path / "x.tar", members)))


def test_right_columns_pass(shard: ShardIndex) -> None:
    columns.check_columns(shard, image="png;jpg", caption="json.captions")
    columns.check_columns(shard, image="jpg", caption="json.meta.title", label="json.label")
    columns.check_columns(shard, image="jpg", label="cls")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"image": "jpeg;png"}, r"`image = 'jpeg;png'`.*jpg ×20, json ×20, cls ×20"),
        ({"image": "jpg", "caption": "txt"}, r"`caption = 'txt'`.*json\.captions \(list\), json\.label \(int\)"),
        ({"image": "jpg", "caption": "json.caption"}, r"no field caption.*json\.captions \(list\)"),
        ({"image": "jpg", "caption": "json.label"}, "its caption is 3"),
        ({"image": "jpg", "label": "json.captions"}, "its label is"),
    ],
)
def test_wrong_columns_stop_at_once(shard: ShardIndex, names: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        columns.check_columns(shard, **names)  # pyright: ignore[reportArgumentType]
    assert shard.shard in str(caught.value)


TEXT, FIELD = Column("txt"), Column("json", ("c",))


def test_captions() -> None:
    assert columns.read_captions(TEXT, "\ufeffgrün\n".encode()) == ["grün\n"]
    assert columns.read_captions(FIELD, b'{"c": "a"}') == ["a"]
    assert columns.read_captions(FIELD, b'{"c": ["a", " ", "b"]}') == ["a", "b"]
    assert columns.read_captions(Column("json", ("c",), 2), b'{"c": ["a", "b", "c"]}') == ["a", "b"]
    assert columns.read_captions(Column("json", ("c",), 2), b'{"c": "abc"}') == ["abc"]
    assert columns.read_captions(TEXT, b"x" * 20_000) == ["x" * 20_000]


@pytest.mark.parametrize(
    ("column", "data", "cause"),
    [
        (TEXT, "grün".encode("latin-1"), "not UTF-8 at byte 2"),
        (TEXT, b" \n", "empty"),
        (TEXT, "\u3000\u00a0\u200b\ufeff".encode(), "empty"),
        (TEXT, b"\0\1", "empty"),
        (TEXT, b"&nbsp; &amp;nbsp;", "empty"),
        (TEXT, b"x" * 100_001, "100,001 characters, above 100,000"),
        (FIELD, b'{"c": [["a"]]}', r'its caption is \["a"\]'),
        (FIELD, b'{"c": NaN}', "its caption is NaN"),
        (FIELD, b"{", "not JSON"),
        (FIELD, b"[" * 100_000, "not JSON"),
        (FIELD, b"[1]", "no field c"),
        (FIELD, b'{"c": []}', "empty"),
        (FIELD, b'{"c": null}', "its caption is null"),
        (FIELD, b'{"c": ["a", 1]}', "its caption is 1"),
    ],
)
def test_bad_captions(column: Column, data: bytes, cause: str) -> None:
    with pytest.raises(BadSampleError, match=cause):
        columns.read_captions(column, data)


def test_what_can_be_seen_is_no_blank() -> None:
    for text in (".", "\u00e9", "\U0001f600", "&amp;", "a\0"):
        assert columns.read_captions(TEXT, text.encode()) == [text]


def test_a_member_too_large_to_be_read(tmp_path: Path) -> None:
    """Not even tried: it would be read into memory whole."""
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"")])
    one = index(str(path))
    one.sizes[:] = 1 << 40
    with pytest.raises(BadSampleError, match=r"has 1,099,511,627,776 bytes, above 536,870,912"):
        columns.read(ShardFiles(), one, 0, (TEXT,))


def test_labels() -> None:
    assert columns.read_label(Column("cls"), b"12\n") == 12
    assert columns.read_label(Column("cls"), b" red fox ") == "red fox"
    assert columns.read_label(FIELD, b'{"c": 5}') == 5
    for bad in (b'{"c": true}', b'{"c": ""}', b'{"c": 1.5}'):
        with pytest.raises(BadSampleError, match="its label is"):
            columns.read_label(FIELD, bad)
