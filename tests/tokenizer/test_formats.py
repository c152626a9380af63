"""Vocabularies on disk: back as they were, understood by the peers, refused when damaged."""

from __future__ import annotations

import gzip
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from open_clip.tokenizer import SimpleTokenizer, default_bpe

from tests.tokenizer.fuzz import fuzzed_texts
from tokenizer import BPETokenizer, clean, train_bpe
from tokenizer.bpe import DEFAULT_PATH

CAPTIONS = ["a photo of a dog", "the dogs' café", "two photos of the cat", "a dog and a cat 🐶 2024"] * 5


@pytest.fixture(scope="module")
def small() -> BPETokenizer:
    return train_bpe(CAPTIONS, vocab_size=516 + 25)


@pytest.mark.parametrize("name", ["vocabulary.json", "vocabulary.json.gz"])
def test_save_and_load(small: BPETokenizer, tmp_path: Path, name: str) -> None:
    for tokenizer in (small, BPETokenizer.from_openai(default_bpe())):
        tokenizer.save(tmp_path / name)
        again = BPETokenizer.load(tmp_path / name)
        assert again.vocabulary == tokenizer.vocabulary
        assert again.fingerprint == tokenizer.fingerprint
        text = "The dogs & <end_of_text> café"
        assert again.encode(text) == tokenizer.encode(text)
    first = (tmp_path / name).read_bytes()
    again.save(tmp_path / name)
    assert (tmp_path / name).read_bytes() == first


def test_json_can_be_read_by_people(small: BPETokenizer, tmp_path: Path) -> None:
    small.save(tmp_path / "v.json")
    lines = (tmp_path / "v.json").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 25
    content = json.loads("\n".join(lines))
    assert content["vocab_size"] == 541
    assert content["specials"]["eot"] == {"id": 540, "token": "<|EOT|>"}
    assert all(len(merge.split(" ")) == 2 for merge in content["merges"])


def test_context_length_can_be_overridden(small: BPETokenizer, tmp_path: Path) -> None:
    small.save(tmp_path / "v.json")
    assert BPETokenizer.load(tmp_path / "v.json", context_length=32).context_length == 32
    with pytest.raises(ValueError, match="at least 3"):
        BPETokenizer.load(tmp_path / "v.json", context_length=2)


@pytest.mark.parametrize("plain", [True, False])
def test_openai_file_out_and_in(tmp_path: Path, plain: bool) -> None:
    openai = BPETokenizer.from_openai(default_bpe())
    path = tmp_path / ("merges.txt" if plain else "merges.txt.gz")
    openai.to_openai(path)
    assert BPETokenizer.from_openai(path).fingerprint == openai.fingerprint


def test_open_clip_reads_our_vocabulary_with_our_ids(small: BPETokenizer, tmp_path: Path) -> None:
    default = BPETokenizer.default()
    for tokenizer in (small, default):
        path = tmp_path / f"{tokenizer.vocab_size}.txt.gz"
        tokenizer.to_openai(path)
        peer = SimpleTokenizer(bpe_path=str(path))
        assert (peer.vocab_size, peer.sot_token_id) == (tokenizer.vocab_size, tokenizer.sot)
        assert peer.eot_token_id == tokenizer.eot
        for text in [*CAPTIONS, *fuzzed_texts(500, seed=2)]:
            if "_of_text>" not in text.lower():
                assert peer.encode(text) == tokenizer.encode(text), repr(text)


def test_transformers_gives_our_ids(small: BPETokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for tokenizer in (small, BPETokenizer.default()):
        folder = tmp_path / str(tokenizer.vocab_size)
        tokenizer.to_transformers(folder)
        peer: Any = AutoTokenizer.from_pretrained(folder)
        assert (peer.bos_token_id, peer.eos_token_id) == (tokenizer.sot, tokenizer.eot)
        assert (peer.pad_token_id, peer.mask_token_id) == (tokenizer.pad, tokenizer.mask)
        assert len(peer) == tokenizer.vocab_size
        for text in [*CAPTIONS, *fuzzed_texts(3000, seed=3)]:
            cleaned = clean(text)
            if not unicodedata.is_normalized("NFC", cleaned) or not _old_letters(cleaned):
                continue
            ids, _ = tokenizer.encode_batch([text])
            assert peer(cleaned, truncation=True)["input_ids"] == ids.tolist(), repr(text)
        raw = "  The Dogs' cafe\u0301\n<|eot|> "  # the plain cases need no cleaning before
        assert peer(raw)["input_ids"] == tokenizer.encode_batch([raw])[0].tolist()
        assert peer.decode(tokenizer.encode("the dogs' café 🐶")).strip() == "the dogs ' café 🐶"
        rows = peer(["a dog", "a photo of a dog"], padding=True)["input_ids"]
        assert rows == tokenizer.padded(*tokenizer.encode_batch(["a dog", "a photo of a dog"])).tolist()


def test_transformers_export_of_openai_equals_its_own(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    openai = BPETokenizer.from_openai(default_bpe())
    openai.to_transformers(tmp_path)
    peer: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id) == (49406, 49407, 49407)
    for text in ("a diagram", "wow! it's 2024", "hello world"):
        assert peer(text)["input_ids"] == openai.encode_batch([text])[0].tolist()


def test_open_clip_hf_tokenizer_gives_our_ids_on_raw_text(tmp_path: Path) -> None:
    from open_clip.tokenizer import HFTokenizer

    tokenizer = BPETokenizer.default()
    tokenizer.to_transformers(tmp_path)
    texts = ["Caf&eacute; “quotes”", "a dog", "cafÃ© & bar " * 40]
    rows = HFTokenizer(str(tmp_path), context_length=76)(texts)
    assert rows.tolist() == tokenizer.padded(*tokenizer.encode_batch(texts), width=76).tolist()


def test_default_file_is_what_its_readme_says() -> None:
    readme = (DEFAULT_PATH.parent / "README.md").read_text(encoding="utf-8")
    import hashlib

    assert hashlib.sha256(DEFAULT_PATH.read_bytes()).hexdigest() in readme
    assert "WordNet" in BPETokenizer.default().vocabulary.provenance


# -- bad files ---------------------------------------------------------------------------------------------------


def _changed(small: BPETokenizer, path: Path, **changes: Any) -> Path:
    small.save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not a vocabulary of this project"),
        ({"version": 99}, "update clip-train"),
        ({"merges": None}, "'merges' is missing"),
        ({"merges": [1, 2]}, "merge 1 is 1"),
        ({"merges": ["a b", "a b"]}, "merge 2 .* a second time"),
        ({"merges": ["a bc", "b c"]}, "merge 1 .* uses 'bc'"),
        ({"merges": ["a</w> b"]}, "behind the end of a word"),
        ({"merges": ["a b c"]}, "not two tokens"),
        ({"specials": {"sot": {"id": 1, "token": "x"}}}, "no 'eot' special"),
        ({"specials": 3}, "wrong type"),
        ({"context_length": 77}, "fingerprint"),
        ({"context_length": 1}, "at least 3"),
    ],
)
def test_a_wrong_json_is_refused(small: BPETokenizer, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = _changed(small, tmp_path / "v.json", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        BPETokenizer.load(path)
    assert str(path) in str(caught.value)


def test_specials_outside_or_twice_are_refused(small: BPETokenizer, tmp_path: Path) -> None:
    specials = {role: {"id": 537, "token": "x"} for role in ("pad", "mask", "sot", "eot")}
    with pytest.raises(ValueError, match="share an id"):
        BPETokenizer.load(_changed(small, tmp_path / "v.json", specials=specials))
    specials["eot"] = {"id": 9999, "token": "x"}
    with pytest.raises(ValueError, match="outside the vocabulary"):
        BPETokenizer.load(_changed(small, tmp_path / "v.json", specials=specials))


def test_damaged_files_are_refused(small: BPETokenizer, tmp_path: Path) -> None:
    good = tmp_path / "v.json.gz"
    small.save(good)
    cases = {
        "truncated.json.gz": (good.read_bytes()[:-40], "truncated or damaged gzip"),
        "flipped.json.gz": (good.read_bytes()[:60] + b"\0\0\0\0" + good.read_bytes()[64:], "damaged gzip|not UTF-8"),
        "empty.json": (b"", "not JSON"),
        "binary.json": (b"\xff\xfe\x00", "not UTF-8"),
        "list.json": (b"[1, 2]", "not a vocabulary of this project"),
        "merges.json": (b"#version: 0.2\na b\n", "from_openai"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message) as caught:
            BPETokenizer.load(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(FileNotFoundError):
        BPETokenizer.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b\nab c\n", "not a header"),
        ("#version: 0.2\na b\na b\n", "a second time"),
        ("#version: 0.2\na bc\n", "uses 'bc'"),
        ("#version: 0.2\na b c\n", "not two tokens"),
        ("#version: 0.2\nab\n", "not two tokens"),
        ("", "not a header"),
    ],
)
def test_a_wrong_merges_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "merges.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        BPETokenizer.from_openai(path)
    (tmp_path / "merges.txt.gz").write_bytes(gzip.compress(text.encode() + b"x" * 100)[:-12])
    with pytest.raises(ValueError, match="truncated or damaged"):
        BPETokenizer.from_openai(tmp_path / "merges.txt.gz")


def test_too_many_merges_for_open_clip_are_refused(tmp_path: Path) -> None:
    parts = [chr(code) for code in range(ord("!"), ord("!") + 94)]
    pairs = [(a, b) for a in parts for b in parts]
    merges = [*pairs, *((a + b, c) for a, b in pairs for c in parts)][:48_893]
    from tokenizer.vocabulary import own_vocabulary

    with pytest.raises(ValueError, match="to_transformers"):
        BPETokenizer(own_vocabulary(tuple(merges))).to_openai(tmp_path / "m.txt")


def _old_letters(text: str) -> bool:
    """Assigned in Python's Unicode; which characters are letters depends on a library's Unicode version otherwise."""
    return all(unicodedata.category(char) != "Cn" for char in text)
