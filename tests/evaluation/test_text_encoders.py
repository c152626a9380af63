"""Encoders of three libraries, tiny and made here: our checkpoints, transformers' and open_clip's directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import clip_train
from clip_train.cli import main
from clip_train.errors import CheckpointError
from clip_train.evaluation.text.encoder import acting_pools, open_encoder
from clip_train.export.run import export

TEXTS = ["a red apple", "two dogs run on the beach and a cat sleeps", "rain"]
PAIRS = ["a dog sleeps", "the sea", "it is raining and people stay inside"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("encoders") / "run"
    steps = ["--set", "training.steps=1", "--set", "schedule.warmup_steps=0", "--set", "evaluation.tasks={}"]
    assert main(["train", "debug", "--run-dir", str(run_dir), *steps]) == 0
    return run_dir


def test_our_run_gives_the_towers_output_and_the_joint_space(run: Path) -> None:
    encoder, loaded = open_encoder(run), clip_train.load(run)
    np.testing.assert_allclose(encoder.joint(TEXTS), loaded.encode_text(TEXTS).numpy(), atol=1e-5)
    ids, lengths = loaded.tokenizer.encode_batch(TEXTS)
    padded = torch.from_numpy(loaded.tokenizer.padded(ids, lengths)).long()
    want = loaded.model.text(padded, torch.from_numpy(lengths).long()).pooled.detach().numpy()
    np.testing.assert_allclose(encoder.encode(TEXTS), want, atol=1e-5)


def test_the_average_is_read_where_the_recipe_or_the_command_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    sets = ["training.steps=3", "schedule.warmup_steps=0", "evaluation.tasks={}", "training.ema={decay=0.5}",
            "evaluation.weights=ema"]  # fmt: skip
    averaged = tmp_path / "averaged"
    assert main(["train", "debug", "--run-dir", str(averaged), *[part for one in sets for part in ("--set", one)]]) == 0
    joint = {
        weights: clip_train.load(averaged, weights=weights).encode_text(TEXTS).numpy() for weights in ("raw", "ema")
    }
    assert np.abs(joint["raw"] - joint["ema"]).max() > 1e-3
    for asked, read in ((None, "ema"), ("raw", "raw"), ("ema", "ema")):
        np.testing.assert_allclose(open_encoder(averaged, weights=asked).joint(TEXTS), joint[read], atol=1e-5)
        flags = [] if asked is None else ["--weights", asked]
        assert main(["probe", str(averaged), "--tasks", "exp2/same_picture_clipart", *flags]) == 0
        assert json.loads((averaged / "probe/text.json").read_text())["encoder"]["weights"] == read
    np.testing.assert_array_equal(open_encoder(run).joint(TEXTS), open_encoder(run, weights="raw").joint(TEXTS))
    capsys.readouterr()
    assert main(["probe", str(run), "--weights", "ema"]) == 2
    assert "no averaged weights" in capsys.readouterr().err


def test_weights_are_a_choice_of_our_checkpoints_alone(bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", str(bert), "--weights", "raw"]) == 2
    assert "no path is one" in capsys.readouterr().err


def test_an_open_clip_directory_gives_open_clips_vectors(run: Path, tmp_path: Path) -> None:
    import open_clip

    export(clip_train.load(run), "open_clip", tmp_path / "out", source=run)
    name = f"local-dir:{tmp_path / 'out'}"
    model, _, _ = open_clip.create_model_and_transforms(name)
    with torch.no_grad():
        want = model.eval().encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=True).numpy()
    encoder = open_encoder(tmp_path / "out")
    np.testing.assert_allclose(encoder.joint(TEXTS), want, atol=1e-5)
    assert "own" not in acting_pools(encoder, pairs=True) and "last" in acting_pools(encoder, pairs=True)


def word_tokenizer(folder: Path, special: tuple[str, ...], **roles: str) -> Any:
    """A word-level tokenizer with BERT's pairs, saved as transformers save theirs."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in TEXTS + PAIRS for word in text.split()})
    words += ["table", "home", "birds", "sing", "at", "dawn", "runs"]
    vocabulary = {token: i for i, token in enumerate([*special, *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=special[1]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if "cls_token" in roles:
        cls, sep = roles["cls_token"], roles["sep_token"]
        made.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(token, made.token_to_id(token)) for token in (cls, sep)],
        )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, **roles)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = word_tokenizer(folder, tuple(roles.values()), **roles)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=32, initializer_range=0.3)  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def test_a_bert_directory_gives_its_hidden_states_of_texts_and_pairs(bert: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    encoder = open_encoder(bert)
    for second in (None, PAIRS):
        batch = tokenizer(*(TEXTS,) if second is None else (TEXTS, second), padding=True, return_tensors="pt",
                          return_token_type_ids=True)  # fmt: skip
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        found = encoder.features(TEXTS, second)
        want = {
            "own": hidden[:, 0], "cls": hidden[:, 0], "mean": (hidden * mask).sum(1) / mask.sum(1),
            "last": hidden[torch.arange(3), mask[..., 0].sum(1) - 1],
            "max": hidden.masked_fill(mask == 0, -torch.inf).amax(1),
            "eot": hidden[torch.arange(3), (batch["input_ids"] == tokenizer.sep_token_id).int().argmax(1)],
        }  # fmt: skip
        assert set(want) == set(found)
        for pool, vectors in want.items():
            np.testing.assert_allclose(found[pool], vectors.numpy(), atol=1e-5)
    assert set(acting_pools(encoder, pairs=True)) == set(encoder.pools)
    assert encoder.joint(TEXTS) is None


def test_a_transformers_clip_directory_gives_its_text_embeds(run: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    export(clip_train.load(run), "transformers", tmp_path / "out", source=run)
    model = CLIPTextModelWithProjection.from_pretrained(tmp_path / "out").eval()
    batch = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        want = normalize(model(**batch).text_embeds, dim=-1).numpy()
    np.testing.assert_allclose(open_encoder(tmp_path / "out").joint(TEXTS), want, atol=1e-5)


@pytest.mark.parametrize(("kind", "own"), [("gpt2", "last"), ("t5", "mean")])
def test_decoders_and_t5_get_the_usual_pool_of_their_kind(kind: str, own: str, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2Model, T5Config, T5Model

    tokenizer = word_tokenizer(
        tmp_path, ("<pad>", "<unk>", "</s>"), pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    torch.manual_seed(0)
    if kind == "gpt2":
        GPT2Model(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32,
                             initializer_range=0.3)).save_pretrained(tmp_path)  # fmt: skip
    else:
        T5Model(T5Config(vocab_size=len(tokenizer), d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2,
                         pad_token_id=0, decoder_start_token_id=0)).save_pretrained(tmp_path)  # fmt: skip
    encoder = open_encoder(tmp_path)
    found = encoder.features(TEXTS)
    np.testing.assert_array_equal(found["own"], found[own])
    assert encoder.width == 16 and not np.allclose(found["last"], found["mean"])
    one_by_one = np.concatenate([encoder.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(found["own"], one_by_one, atol=1e-5)  # padding does not act


def encoder_alone(kind: str, folder: Path) -> Any:
    """A T5EncoderModel or a CLIPTextModel, saved with a tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    roles = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    if kind == "t5":
        del roles["cls_token"], roles["sep_token"]
    tokenizer = word_tokenizer(
        folder, (*roles.values(), *(["</s>"] if kind == "t5" else [])), **roles, eos_token="</s>"
    )
    torch.manual_seed(0)
    if kind == "t5":
        model = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=16, d_ff=32, d_kv=8, num_layers=2,
                                        num_heads=2, pad_token_id=0))  # fmt: skip
    else:
        model = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32,
                                             num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32,
                                             pad_token_id=0, bos_token_id=2, eos_token_id=3,
                                             initializer_range=0.3))  # fmt: skip
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_an_encoder_saved_alone_gives_its_own_output(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    model = encoder_alone(kind, tmp_path)
    batch = AutoTokenizer.from_pretrained(tmp_path)(TEXTS, padding=True, return_tensors="pt")
    mask = batch["attention_mask"]
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], attention_mask=mask)
    hidden = output.last_hidden_state
    own = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) if kind == "t5" else output.pooler_output
    encoder = open_encoder(tmp_path)
    np.testing.assert_allclose(encoder.encode(TEXTS), own.numpy(), atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS, "cls"), hidden[:, 0].numpy(), atol=1e-5)
    assert encoder.joint(TEXTS) is None  # CLIP's projection was not saved

    weights = load_file(tmp_path / "model.safetensors")
    lacking = {name: tensor for name, tensor in weights.items() if "final_layer_norm" not in name}
    save_file(lacking, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weights are missing: .*final_layer_norm"):
        open_encoder(tmp_path)


def test_a_projection_that_was_promised_is_missed(tmp_path: Path) -> None:
    import json

    encoder_alone("clip", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["CLIPTextModelWithProjection"]}))
    with pytest.raises(CheckpointError, match="weights are missing: text_projection"):
        open_encoder(tmp_path)


def test_what_was_saved_in_half_precision_is_probed_in_single(tmp_path: Path) -> None:
    """bf16 keeps fp32's exponent, so the weights are the same numbers in both: so must the features be."""
    from transformers import AutoModel, AutoTokenizer

    encoder_alone("clip", tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    batch = AutoTokenizer.from_pretrained(tmp_path)(TEXTS, padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        want = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
    encoder = open_encoder(tmp_path)
    assert {parameter.dtype for parameter in encoder.tower.module.parameters()} == {torch.float32}
    np.testing.assert_allclose(encoder.encode(TEXTS), want.numpy(), atol=1e-5)


def test_what_a_directory_lacks_is_said(bert: Path, tmp_path: Path) -> None:
    import json
    import shutil

    for number, (spoil, message) in enumerate(
        [
            (
                lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
                "there is no tokenizer",
            ),
            (lambda f: (f / "model.safetensors").unlink(), "cannot read it"),
            (lambda f: (f / "config.json").write_text(json.dumps({"model_type": "nonsense"})), "cannot read it"),
        ]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(bert, folder)
        spoil(folder)
        with pytest.raises(CheckpointError, match=message):
            open_encoder(folder)
    with pytest.raises(CheckpointError, match="no such file"):
        open_encoder(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        open_encoder(tmp_path / "empty")


def test_missing_weights_are_refused_and_a_missing_pooler_is_not(bert: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    whole = load_file(bert / "model.safetensors")
    for left_out, refused in (("pooler", False), ("layer.1.output", True)):
        folder = tmp_path / left_out
        shutil.copytree(bert, folder)
        kept = {name: tensor for name, tensor in whole.items() if left_out not in name}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        if refused:
            with pytest.raises(CheckpointError, match="weights are missing"):
                open_encoder(folder)
        else:
            np.testing.assert_array_equal(open_encoder(folder).encode(TEXTS), open_encoder(bert).encode(TEXTS))


def test_a_language_model_of_ours_gives_its_towers_output(tmp_path: Path) -> None:
    from clip_train.loading import load_text

    alone = ["loss.kind=mlm", "image=none", "model=none", "evaluation.tasks=none", "text.attention=bidirectional"]
    steps = ["training.steps=1", "schedule.warmup_steps=0", "data.sources.pictograms.image=none"]
    sets = [part for one in [*alone, *steps] for part in ("--set", one)]
    assert main(["train", "debug", "--run-dir", str(tmp_path / "mlm"), *sets]) == 0
    encoder, loaded = open_encoder(tmp_path / "mlm"), load_text(tmp_path / "mlm")
    ids, lengths = loaded.tokenizer.encode_batch(TEXTS)
    padded = torch.from_numpy(loaded.tokenizer.padded(ids, lengths)).long()
    with torch.no_grad():
        output = loaded.tower(padded, torch.from_numpy(lengths).long())
    np.testing.assert_allclose(encoder.encode(TEXTS), output.pooled.numpy(), atol=1e-5)
    assert encoder.joint(TEXTS) is None
    assert set(acting_pools(encoder, pairs=True)) == set(encoder.pools)  # nothing is causal here


def test_an_open_clip_directory_with_a_tower_of_transformers(bert: Path, tmp_path: Path) -> None:
    import json

    import open_clip
    from safetensors.torch import save_file

    vision = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8}
    text = {"hf_model_name": str(bert), "hf_tokenizer_name": str(bert), "hf_pooler_type": "mean_pooler",
            "hf_proj_type": "mlp", "hf_model_pretrained": False, "context_length": 32}  # fmt: skip
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text, "custom_text": True},
              "preprocess_cfg": {}}  # fmt: skip
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    made = open_clip.CustomTextCLIP(8, vision, text)
    save_file({name: tensor.contiguous() for name, tensor in made.state_dict().items()},
              tmp_path / "open_clip_model.safetensors")  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((bert / name).read_bytes())
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    with torch.no_grad():
        want = made.eval().encode_text(tokenizer(TEXTS), normalize=True).numpy()
    encoder = open_encoder(tmp_path)
    np.testing.assert_allclose(encoder.joint(TEXTS), want, atol=1e-5)
    assert set(acting_pools(encoder, pairs=True)) == set(encoder.pools)
