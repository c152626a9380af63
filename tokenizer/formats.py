"""Vocabularies on disk: this project's JSON, OpenAI's merges file, transformers' `tokenizer.json`.

The JSON, one merge a line so that `diff` and `less` are of use:

    {"format": "clip-train-bpe", "version": 1, "vocab_size": 49152, "context_length": 76,
     "specials": {"pad": {"id": 49148, "token": "<|PAD|>"}, ...}, "literal_specials": false,
     "provenance": "...", "fingerprint": "sha256 ...", "merges": ["i n", "t h", ...]}
"""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any, cast

from tokenizer.vocabulary import (
    BASE,
    OPENAI_CONTEXT,
    OPENAI_MERGES,
    Merge,
    Vocabulary,
    openai_vocabulary,
)

FORMAT, VERSION = "clip-train-bpe", 1
_HEADER = "#version: 0.2"
# The clitics and runs of `cleaning.PIECES`. There the pattern ignores case, which on lower-case text adds only ſ.
_HF_PIECES = r"'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def read_json(path: Path) -> Vocabulary:
    """Reads this project's JSON, plain or gzipped (told by its first bytes, not its name).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, not such a file, of a later version, or its fingerprint does not fit.
    """
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not JSON ({error}). A vocabulary is made by `clip-train tokenizer train`; OpenAI's merges file"
            " is read by BPETokenizer.from_openai"
        ) from None
    if not isinstance(content, dict) or cast("dict[str, Any]", content).get("format") != FORMAT:
        raise ValueError(
            f'{path}: not a vocabulary of this project (no "format": "{FORMAT}"): make one with'
            " `clip-train tokenizer train`"
        )
    data = cast("dict[str, Any]", content)
    if data.get("version") != VERSION:
        raise ValueError(f"{path}: version {data.get('version')!r}, this program reads {VERSION}: update clip-train")
    try:
        merges = tuple(_merge(line, number) for number, line in enumerate(data["merges"], 1))
        vocabulary = Vocabulary(
            merges=merges,
            specials={str(role): str(special["token"]) for role, special in data["specials"].items()},
            special_ids={str(role): int(special["id"]) for role, special in data["specials"].items()},
            context_length=int(data["context_length"]),
            literal_specials=bool(data["literal_specials"]),
            provenance=str(data.get("provenance", "")),
        )
    except KeyError as error:
        raise ValueError(f"{path}: the key {error} is missing: get or train the vocabulary again") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path}: a value has the wrong type ({error}): get or train the vocabulary again") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if data.get("fingerprint", vocabulary.fingerprint) != vocabulary.fingerprint:
        raise ValueError(
            f"{path}: its content does not have the fingerprint it states, so it was changed or damaged: get it again,"
            ' or delete the "fingerprint" line if you changed it on purpose'
        )
    return vocabulary


def write_json(vocabulary: Vocabulary, path: Path) -> None:
    """Writes this project's JSON, gzipped where the name ends in `.gz`; without a date, so reproducible."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "vocab_size": vocabulary.size,
        "context_length": vocabulary.context_length,
        "specials": {
            role: {"id": token_id, "token": vocabulary.specials[role]}
            for role, token_id in sorted(vocabulary.special_ids.items())
        },
        "literal_specials": vocabulary.literal_specials,
        "provenance": vocabulary.provenance,
        "fingerprint": vocabulary.fingerprint,
        "merges": [f"{first} {second}" for first, second in vocabulary.merges],
    }
    _write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", path)


def read_openai(path: Path, context_length: int = OPENAI_CONTEXT) -> Vocabulary:
    """Reads OpenAI's merges file, `.txt` or `.gz`: a header line, then a merge a line, of which 48,894 count.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: damaged, without its header line, or with merges that cannot be (duplicates, unknown parts).
    """
    lines = _read_text(path).split("\n")
    if "version" not in lines[0]:
        raise ValueError(
            f"{path}: the first line is {lines[0]!r:.60}, not a header with a version. Every reader drops the"
            f" first line, so put {_HEADER!r} before the first merge"
        )
    body = [line for line in lines[1 : OPENAI_MERGES + 1] if line.strip()]
    try:
        merges = tuple(_merge(line, number) for number, line in enumerate(body, 1))
        return openai_vocabulary(merges, context_length, provenance=f"OpenAI merges file {path.name}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_openai(vocabulary: Vocabulary, path: Path) -> None:
    """Writes a merges file for open_clip's SimpleTokenizer, whose vocabulary is bytes, lines, SOT, EOT.

    A vocabulary of ours has pad and mask between merges and SOT: two lines that can never apply hold their places.
    There is no newline at the end, because SimpleTokenizer would take the empty line after it for a merge.

    Raises:
        ValueError: SimpleTokenizer reads only 48,894 lines, and the vocabulary needs more.
    """
    roles = [role for role in vocabulary.own_specials if role not in ("sot", "eot")]
    if vocabulary.special_ids["eot"] != vocabulary.size - 1 or vocabulary.special_ids["sot"] != vocabulary.size - 2:
        raise ValueError("SOT and EOT must be the two largest ids, in this order, for an OpenAI merges file")
    places = [f"{vocabulary.specials[role]} {vocabulary.specials[role]}" for role in roles]
    lines = [*(f"{first} {second}" for first, second in vocabulary.merges), *places]
    if len(lines) > OPENAI_MERGES:
        raise ValueError(
            f"{len(lines)} lines are needed and open_clip's SimpleTokenizer reads {OPENAI_MERGES}: export with"
            " to_transformers instead"
        )
    _write_text("\n".join([_HEADER, *lines]), path)


def write_transformers(vocabulary: Vocabulary, directory: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, which transformers' AutoTokenizer loads.

    Ids are the same for every cleaned text in NFC. Not the same is what `tokenizer.json` cannot say: ftfy's repairs and
    html unescaping (clean first where the text may need it; open_clip's HFTokenizer does), and lowering character by
    character (a capital sigma at the end of a word). With OpenAI's merges the pad token is EOT, as transformers has
    it, and `<start_of_text>` in a text is text; the specials in a text are `<|startoftext|>` and `<|endoftext|>`.
    """
    special_ids = dict(vocabulary.special_ids)
    if special_ids["pad"] < BASE:  # an ordinary token cannot be declared special without cutting texts at it
        special_ids["pad"] = special_ids["eot"]
    tokens = {role: vocabulary.tokens[token_id] for role, token_id in special_ids.items()}
    added = [
        {
            "id": token_id,
            "content": vocabulary.tokens[token_id],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token_id in sorted(set(special_ids.values()))
    ]
    space = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    pieces = {"type": "Split", "pattern": {"Regex": _HF_PIECES}, "behavior": "Removed", "invert": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    around = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": tokens["sot"], "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": tokens["eot"], "type_id": 0}},
        ],
        "pair": [
            {"SpecialToken": {"id": tokens["sot"], "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": tokens["eot"], "type_id": 0}},
            {"SpecialToken": {"id": tokens["sot"], "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}},
            {"SpecialToken": {"id": tokens["eot"], "type_id": 0}},
        ],
        "special_tokens": {
            tokens[role]: {"id": tokens[role], "ids": [special_ids[role]], "tokens": [tokens[role]]}
            for role in ("sot", "eot")
        },
    }
    end_of_word = {"type": "Replace", "pattern": {"String": "</w>"}, "content": "Ġ"}  # Ġ is the byte of a space
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, space, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [pieces, byte_level]},
        "post_processor": around,
        "decoder": {"type": "Sequence", "decoders": [end_of_word, byte_level]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: token_id for token_id, token in enumerate(vocabulary.tokens)},
            "merges": [list(merge) for merge in vocabulary.merges],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": vocabulary.context_length,
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens["sot"],
        "eos_token": tokens["eot"],
        "pad_token": tokens["pad"],
        **({"mask_token": tokens["mask"]} if "mask" in tokens else {}),
    }
    directory.mkdir(parents=True, exist_ok=True)
    _write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1), directory / "tokenizer.json")
    _write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", directory / "tokenizer_config.json")


def read_transformers(directory: Path) -> Vocabulary:
    """Reads what `write_transformers` writes, and CLIP tokenizers of the same kind from elsewhere.

    Raises:
        FileNotFoundError: there is no `tokenizer.json` or `tokenizer_config.json`.
        ValueError: another kind of tokenizer than CLIP's byte-level BPE with `</w>`, or ids in another order.
    """
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE" or model.get("end_of_word_suffix") != "</w>":
        kind = f"{model.get('type')} with end_of_word_suffix {model.get('end_of_word_suffix')!r}"
        raise ValueError(f"{directory}/tokenizer.json is {kind}: only CLIP's byte-level BPE with '</w>' can be read")
    lines = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    merges = tuple(_merge(line, number) for number, line in enumerate(lines, 1))
    ids: dict[str, int] = {**model["vocab"], **{one["content"]: one["id"] for one in content["added_tokens"]}}
    cap = min(int(config.get("model_max_length") or OPENAI_CONTEXT), 1 << 20)
    roles = {"sot": "bos_token", "eot": "eos_token", "pad": "pad_token", "mask": "mask_token"}
    named = {role: config[key] for role, key in roles.items() if config.get(key)}
    specials = {role: one if isinstance(one, str) else str(one["content"]) for role, one in named.items()}
    special_ids = {role: ids[token] for role, token in specials.items()}
    if special_ids.get("pad") == special_ids["eot"]:  # OpenAI's, as transformers has them
        vocabulary = openai_vocabulary(merges, cap, provenance=f"transformers tokenizer {directory.name}")
    else:
        vocabulary = Vocabulary(
            merges, specials, special_ids, cap, provenance=f"transformers tokenizer {directory.name}"
        )
    if {token: number for number, token in enumerate(vocabulary.tokens)} != ids:
        raise ValueError(f"{directory}/tokenizer.json numbers its tokens in another order than bytes, merges, specials")
    return vocabulary


def _merge(line: Any, number: int) -> Merge:
    parts = line.split(" ") if isinstance(line, str) else []
    if len(parts) != 2 or not all(parts):
        raise ValueError(f"merge {number} is {line!r:.60}, not two tokens with one space between: get the file again")
    return parts[0], parts[1]


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: a truncated or damaged gzip file ({error}): get it again") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}), so not a vocabulary") from None


def _write_text(text: str, path: Path) -> None:
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data, 9, mtime=0) if path.name.endswith(".gz") else data)
