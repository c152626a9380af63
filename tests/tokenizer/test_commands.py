"""`clip-train tokenizer …` and the files that captions are read from."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from rich.console import Console

from tokenizer import BPETokenizer, SmallVocabularyWarning
from tokenizer.commands import add_commands, open_tokenizer, train_from_files
from tokenizer.corpus import read_captions

CAPTIONS = ["a dog", "two cafés", "it's a cat"]


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(required=True))
    args = parser.parse_args(arguments)
    return args.run(args)


def tar(path: Path, members: dict[str, str | bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def test_captions_of_every_kind_of_file(tmp_path: Path) -> None:
    files = {
        "c.txt": "\n\n".join(CAPTIONS) + "\n",
        "c.csv": 'id,caption\n1,a dog\n2,"two cafés"\n3,it\'s a cat\n',
        "c.tsv": "id\ttext\n1\ta dog\n2\ttwo cafés\n3\tit's a cat\n",
        "c.jsonl": "\n".join(json.dumps({"caption": c, "id": n}) for n, c in enumerate(CAPTIONS)),
        "list.jsonl": json.dumps({"captions": CAPTIONS}) + "\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            assert [c.strip() for c in read_captions([path])] == CAPTIONS, path
    jpg = b"\xff\xd8\x00"
    shards = [
        tar(tmp_path / "txt.tar", {f"x.y/{n}.{e}": d for n, c in enumerate(CAPTIONS)
                                   for e, d in (("jpg", jpg), ("json", '{"caption": "other"}'), ("txt", c))}),
        tar(tmp_path / "json.tar.gz", {"0.json": json.dumps({"captions": CAPTIONS[:2]}), "0.jpg": jpg,
                                       "1.json": json.dumps({"caption": CAPTIONS[2]})}, "w:gz"),
    ]  # fmt: skip
    for shard in shards:
        assert list(read_captions([shard])) == CAPTIONS
    assert list(read_captions([shards[0]], field="caption")) == ["other"] * 3


def test_bad_caption_files_are_refused(tmp_path: Path) -> None:
    good = tar(tmp_path / "good.tar", {"0.txt": "a dog" * 4000})
    cases: dict[str, tuple[bytes, str]] = {
        "empty.txt": (b"\n\n", "holds no captions"),
        "latin.txt": (b"caf\xe9 au lait\n", "not UTF-8"),
        "no.csv": (b"id,url\n1,http://x\n", r"line 2: a field captions, .* is missing; there are id, url: .*--field"),
        "bad.jsonl": (b'{"caption": 3}\n', "holds 3, which is no text"),
        "broken.jsonl": (b'{"caption": \n', "line 1: not JSON"),
        "list.jsonl": (b"[1]\n", "a JSON object"),
        "x.parquet": (b"PAR1", "captions are read from"),
        "cut.tar": (good.read_bytes()[:9000], "truncated or damaged"),
        "cut.txt.gz": (gzip.compress(b"a dog\n" * 1000)[:-9], "truncated or damaged"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message) as caught:
            list(read_captions([tmp_path / name]))
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="it holds jpg"):
        list(read_captions([tar(tmp_path / "jpg.tar", {"0.jpg": b"x"})]))
    with pytest.raises(FileNotFoundError):
        list(read_captions([tmp_path / "absent.txt"]))


def test_train_encode_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(CAPTIONS * 3), encoding="utf-8")
    out = tmp_path / "new" / "vocabulary.json"
    assert run("train", str(captions), "--out", str(out), "--context-length", "8") == 0
    assert "ids and not 49,152" in capsys.readouterr().out.replace("\n", " ")
    tokenizer = BPETokenizer.load(out)
    assert (tokenizer.context_length, tokenizer.vocabulary.provenance) == (8, "Learned from captions.txt")

    assert run("encode", "--tokenizer", str(out), "--ids", "A dog") == 0
    assert capsys.readouterr().out.split() == [str(i) for i in tokenizer.encode_batch(["a dog"])[0]]
    assert run("encode", "--tokenizer", str(out), "[bold]x " * 9) == 0
    assert "cut off at the cap of 8" in capsys.readouterr().out
    assert run("inspect", str(out), "--captions", str(captions)) == 0
    assert "9 with 21 words" in capsys.readouterr().out


def test_encode_reads_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a dog\na cat\n"))
    assert run("encode", "--ids", "-") == 0
    default = BPETokenizer.default()
    expected = [" ".join(map(str, default.encode_batch([text])[0].tolist())) for text in ("a dog", "a cat")]
    assert capsys.readouterr().out.splitlines() == expected


def test_mistakes_end_with_code_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", str(tmp_path / "absent.json")) == 2
    assert run("train", str(tmp_path / "absent.txt"), "--out", str(tmp_path / "v.json")) == 2
    assert run("encode", "--tokenizer", str(tmp_path), "x") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("error: ") for line in errors)
    assert not (tmp_path / "v.json").exists()


def test_a_run_or_checkpoint_folder_is_a_tokenizer(tmp_path: Path) -> None:
    default = BPETokenizer.default()
    checkpoint = tmp_path / "run/checkpoints/latest"
    checkpoint.mkdir(parents=True)
    default.save(checkpoint / "tokenizer.json")
    for path in (checkpoint, tmp_path / "run", "default"):
        assert open_tokenizer(path).fingerprint == default.fingerprint


def test_train_from_files_warns_without_a_console(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("dog dog\n", encoding="utf-8")
    with pytest.warns(SmallVocabularyWarning):
        train_from_files([tmp_path / "c.txt"], tmp_path / "v.json")
    output = io.StringIO()
    train_from_files([tmp_path / "c.txt"], tmp_path / "v.json", console=Console(file=output))
    assert "note:" in output.getvalue()
    with pytest.raises(ValueError, match="no caption files"):
        train_from_files([], tmp_path / "v.json")


def test_imports_neither_torch_nor_clip_train() -> None:
    code = "import sys, tokenizer, tokenizer.commands; print([m for m in ('torch', 'clip_train') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
