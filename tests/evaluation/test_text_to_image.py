"""Experiment 3 in a world of coloured pictures: what the generator is, what it gives encoders, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge  # pyright: ignore
from sklearn.metrics import roc_auc_score  # pyright: ignore

from clip_train import cli
from clip_train.errors import DataError
from clip_train.evaluation.text.encoder import PooledEncoder
from clip_train.evaluation.text.our_tower import OurTower
from clip_train.evaluation.text.results import write_results
from clip_train.evaluation.text.suite import Pictures, run_suite
from clip_train.evaluation.text_to_image import stages, train
from clip_train.evaluation.text_to_image.baselines import BagOfWords, RandomFeatures
from clip_train.evaluation.text_to_image.classifier import rank_scores, recall_at
from clip_train.evaluation.text_to_image.codebook import Codebook
from clip_train.evaluation.text_to_image.colours import ASKED, CAPTIONS, WANTED, dominant_colour, named_colour
from clip_train.evaluation.text_to_image.generator import ABOUT, WEIGHTS, Generator, load_generator
from clip_train.evaluation.text_to_image.grid import picture_grid
from clip_train.evaluation.text_to_image.model import PictureModel, WordPrefix
from clip_train.evaluation.text_to_image.pictures import read_pictures
from clip_train.evaluation.text_to_image.prefix import fit_prefix, ridge
from clip_train.evaluation.text_to_image.score import BUDGETS, GRID, exp3, others
from clip_train.models.text import TextTransformer
from tokenizer import BPETokenizer

from .colours import COLOURS, captioned

TINY = stages.Settings(
    size=8, patch=4, codes=32, codebook_width=16, codebook_steps=120, codebook_batch=16, classifier_width=8,
    classifier_steps=60, classifier_batch=16, width=32, layers=1, heads=2, prefix=2, steps=250, batch=32,
)  # fmt: skip
QUICK = replace(TINY, codebook_steps=8, classifier_steps=4, steps=4)
THINGS = [f"thing{number}" for number in range(60)]


class ColourEncoder:
    """Knows the colours of a text and nothing else."""

    name = "colours"

    def features(self, texts: Sequence[str], /) -> dict[str, np.ndarray]:
        known = np.array([[float(word in text.split()) for word in COLOURS] for text in texts], np.float32)
        return {"own": np.zeros_like(known), "mean": known}  # the first pool says nothing


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """360 pictures of six colours, each with a name and a caption that says more."""
    folder = tmp_path_factory.mktemp("colours")
    names = [(colour, f"{colour} {thing}") for thing in THINGS for colour in COLOURS]
    captioned(folder / "train.tar", [(colour, [name, f"{name}: paint"]) for colour, name in names])
    return str(folder / "train.tar")


@pytest.fixture(scope="module")
def folder(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generator") / "g"
    train.train_generator(out, TINY, train=shards, test={})
    return out


@pytest.fixture
def generator(folder: Path) -> Generator:
    return load_generator(folder)


def model(seed: int = 0) -> PictureModel:
    torch.manual_seed(seed)
    made = PictureModel(codes=11, length=6, width=16, layers=2, heads=2, prefix=3)
    torch.nn.init.normal_(made.head.weight)
    torch.nn.init.normal_(made.code_embedding.weight)
    return made.eval()


def state_of(generator: Generator) -> str:
    digest = hashlib.sha256()
    for module in generator.modules().values():
        for value in module.state_dict().values():
            digest.update(value.numpy().tobytes())
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------- codebook


def test_colours_survive_the_codebook(generator: Generator, shards: str) -> None:
    pictures = read_pictures(shards, 8).images
    codes = generator.codebook.encode(pictures)
    assert codes.shape == (360, 4) and codes.dtype == torch.int64
    shown = generator.codebook.decode(codes).float()
    palette = torch.tensor(list(COLOURS.values())).float()
    assert torch.equal(torch.cdist(shown.mean((2, 3)), palette).argmin(1), torch.arange(360) % 6)
    assert torch.equal(generator.codebook.encode(pictures[7:8]), codes[7:8]), "a picture's codes are its own"


def test_the_codebook_takes_the_nearest_code() -> None:
    torch.manual_seed(0)
    book = Codebook(8, 4, codes=9, width=8, code_width=5)
    latents = torch.randn(3, 7, 5)
    slow = [
        [min(range(9), key=lambda k: float((row - book.codes[k]).square().sum())) for row in one] for one in latents
    ]
    assert book.nearest(latents).tolist() == slow


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        Codebook(30, 4)
    with pytest.raises(ValueError, match=r"\(3, 8, 8\)"):
        Codebook(8, 4).encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


# ------------------------------------------------------------------------------------------------ model


def test_later_codes_do_not_change_earlier_logits_and_the_prefix_changes_all() -> None:
    ids, offset = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(1)), torch.randn(2, 48)
    logits = model()(ids, offset)
    for place in range(6):
        changed = ids.clone()
        changed[:, place] = (changed[:, place] + 1) % 11
        difference = (model()(changed, offset) - logits).abs().amax((0, 2))
        assert (difference[: place + 1] == 0).all()
        assert (difference[place + 1 :] > 1e-4).all()
    assert ((model()(ids, -offset) - logits).abs().amax((0, 2)) > 1e-3).all()
    assert torch.equal(model()(ids), model()(ids, torch.zeros(2, 48))), "no offset is the unconditional model"


def test_bits_are_those_of_a_loop() -> None:
    ids, offset = torch.randint(11, (3, 6)), torch.randn(3, 48)
    logits, found = model()(ids, offset).double().detach(), model().bits(ids, offset).detach()
    for row in range(3):
        total = 0.0
        for place in range(6):
            weights = np.exp(logits[row, place].numpy())
            total -= np.log2(weights[ids[row, place]] / weights.sum())
        assert float(found[row]) == pytest.approx(total / 6, rel=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_samples_are_those_of_whole_passes(guidance: float) -> None:
    offset = torch.randn(4, 48)
    drawn = model().sample(offset, 4, guidance=guidance, temperature=0.7, seed=5)
    noise = torch.rand(4, 6, generator=torch.Generator().manual_seed(5))
    slow = torch.zeros(4, 6, dtype=torch.int64)
    for place in range(6):
        own, free = model()(slow, offset)[:, place], model()(slow)[:, place]
        probabilities = torch.softmax((free + guidance * (own - free)) / 0.7, -1).cumsum(-1)
        slow[:, place] = (probabilities < noise[:, place, None]).sum(1)
    assert torch.equal(drawn, slow)
    assert torch.equal(model().sample(offset[:2], 2, guidance=guidance, temperature=0.7, seed=5), drawn[:2])


def test_word_prefixes_are_sums_over_the_root() -> None:
    words = WordPrefix(["red", "green", "blue"], 8, rank=4)
    offset = words(words.bags(["Blue, red! red?", "nothing known", "green"]))
    table = words.words.weight
    assert torch.allclose(offset[0], words.out((table[0] + table[2]) / 2**0.5), atol=1e-6)
    assert (offset[1] == 0).all()
    assert torch.allclose(offset[2], words.out(table[1]), atol=1e-6)


# ----------------------------------------------------------------------------------------------- scores


def test_rank_scores_and_recall_are_scikit_learns() -> None:
    draw = torch.Generator().manual_seed(0)
    evidence, targets = torch.randn(9, 20, generator=draw).round(decimals=1), torch.rand(9, 20, generator=draw) < 0.3
    expected = [roc_auc_score(t, e) for t, e in zip(targets.numpy(), evidence.numpy(), strict=True)]
    assert rank_scores(evidence, targets).tolist() == pytest.approx(expected, abs=1e-6)
    top = np.argsort(-evidence.numpy(), 1, kind="stable")[:, :3]
    exact = torch.randn(9, 20, generator=draw)  # without ties
    top = np.argsort(-exact.numpy(), 1)[:, :3]
    hits = [targets[row].numpy()[best].sum() / targets[row].sum().item() for row, best in enumerate(top)]
    assert recall_at(exact, targets, 3).tolist() == pytest.approx(hits)


def test_ridge_is_scikit_learns() -> None:
    draw = np.random.default_rng(0)
    x, y = draw.normal(3, 2, (80, 5)).astype(np.float32), draw.normal(1, 1, (80, 7)).astype(np.float32)
    x[:, 4] = 2.0  # constant: says nothing
    held = draw.normal(3, 2, (40, 5)).astype(np.float32)
    prefix, penalty = ridge(x, torch.from_numpy(y), held, torch.randn(40, 7))
    z, w = (x[:, :4] - x[:, :4].mean(0)) / x[:, :4].std(0), (held[:, :4] - x[:, :4].mean(0)) / x[:, :4].std(0)
    peer = Ridge(alpha=penalty * 80).fit(z, y)
    assert prefix(held).numpy() == pytest.approx(peer.predict(w), abs=1e-4)


def test_the_colour_of_most_pixels_that_are_not_white() -> None:
    paints = {"red": (221, 46, 68), "yellow": (255, 204, 77), "green": (119, 178, 85), "blue": (85, 172, 238),
              "purple": (170, 142, 214), "black": (41, 47, 51)}  # fmt: skip
    pictures = torch.full((len(paints) + 1, 3, 10, 10), 250, dtype=torch.uint8)
    for row, paint in enumerate(paints.values()):
        pictures[row, :, 2:6, 2:6] = torch.tensor(paint, dtype=torch.uint8)[:, None, None]
        pictures[row, :, 8, 2:6] = 128  # fewer, and grey
    found = dominant_colour(pictures).tolist()
    assert found[:-1] == [ASKED.index(name) for name in paints]
    assert found[-1] >= len(ASKED), "an empty picture has none"
    assert [named_colour(name) for name in ("Red apple", "a red and blue flag", "redden")] == [0, None, None]
    assert all(text.split()[0] == ASKED[place] for text, place in zip(CAPTIONS, WANTED.tolist(), strict=True))


def test_what_knows_colours_beats_what_knows_nothing(generator: Generator, tmp_path: Path) -> None:
    before = state_of(generator)
    knows = {one.name: one for one in exp3(ColourEncoder(), generator, budget="small", grid=tmp_path / "g.png")}
    random = {one.name: one for one in exp3(RandomFeatures(), generator, budget="small")}
    bag = {one.name: one for one in exp3(BagOfWords(), generator, budget="small")}
    for better in (knows, bag):
        assert better["exp3/nll"].value < random["exp3/nll"].value - 0.1
        assert better["exp3/caption"].value > random["exp3/caption"].value + 0.1
        assert better["exp3/concept"].value > random["exp3/concept"].value + 0.1
        assert better["exp3/colour"].value > random["exp3/colour"].value + 0.1
    assert knows["exp3/nll"].pool == "mean", "the pool that says nothing is not chosen"
    assert knows["exp3/gain"].items[""] == pytest.approx(
        generator.unconditional.numpy() - knows["exp3/nll"].items[""], abs=1e-6
    )
    assert state_of(generator) == before, "the generator is frozen"
    assert all(p.grad is None for module in generator.modules().values() for p in module.parameters())
    with Image.open(tmp_path / "g.png") as picture:
        assert picture.width > 200

    again = {one.name: one for one in exp3(ColourEncoder(), generator, budget="small")}
    assert all(np.array_equal(one.items[""], again[name].items[""]) for name, one in knows.items())


def test_the_suite_counts_the_texts_that_a_short_tower_cuts(generator: Generator, tmp_path: Path) -> None:
    tokenizer = BPETokenizer.default(context_length=6)
    torch.manual_seed(0)
    tower = TextTransformer(tokenizer.vocab_size, 6, width=16, layers=1, heads=2, attention="bidirectional", pool="cls")
    encoder = PooledEncoder("short", OurTower(tower, tokenizer))
    found = run_suite(encoder, [], pictures=Pictures(generator, "small", tmp_path / "grid.png"))
    texts = {*generator.train.texts, *generator.dev.texts, *generator.test.texts, *GRID, *CAPTIONS}
    assert len(generator.train.texts) < BUDGETS["small"]["texts"]
    cut = sum(len(tokenizer.encode(text)) > 4 for text in texts)
    assert 0 < cut < len(texts) and {one.more["texts_cut"] for one in found} == {cut}


def test_another_caption_is_never_the_same_one() -> None:
    texts = ["a", "b", "a", "c", "a", "d", "b"]
    found = others(texts)
    assert all(texts[row] != texts[other] for row, other in enumerate(found))


# --------------------------------------------------------------------------------------------- training


def test_names_are_on_one_side(generator: Generator) -> None:
    names = {part: {texts[0] for texts in getattr(generator, part).captions} for part in ("train", "dev", "test")}
    assert all(len(part) > 3 for part in names.values())
    assert not names["train"] & names["dev"] and not names["train"] & names["test"] and not names["dev"] & names["test"]
    assert {texts for part in (generator.train,) for texts in part.sets} == {"train"}


def test_a_name_is_held_out_whatever_its_set_is_called(generator: Generator) -> None:
    test = generator.test  # of held-out names alone
    renamed = replace(generator, test=replace(test, sets=["new"] * len(test)))
    assert {one.name for one in exp3(BagOfWords(), renamed, budget="small") if "_seen" in one.name} == set()
    learned = generator.train.where(list(range(40)))
    upheld = replace(generator, test=replace(learned, sets=["upheld"] * 40), unconditional=torch.zeros(40))
    assert {one.name for one in exp3(BagOfWords(), upheld, budget="small") if "_held" in one.name} == set()


def test_training_that_was_cut_goes_on_to_the_same_bits(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    def anew(*_: object) -> None:
        raise RuntimeError("trained anew")

    whole = train.train_generator(tmp_path / "whole", QUICK, train=shards, test={})
    with monkeypatch.context() as patched:
        patched.setattr(train, "train_model", cut)
        with pytest.raises(KeyboardInterrupt):
            train.train_generator(tmp_path / "g", QUICK, train=shards, test={})
    with monkeypatch.context() as patched:
        patched.setattr(train, "train_codebook", anew)
        with pytest.raises(RuntimeError, match="anew"):  # other settings do not take what was made with these
            train.train_generator(tmp_path / "g", replace(QUICK, seed=1), train=shards, test={})
        patched.setattr(train, "train_classifier", anew)
        found = train.train_generator(tmp_path / "g", QUICK, train=shards, test={})
    assert found.fingerprint == whole.fingerprint == load_generator(tmp_path / "g").fingerprint
    assert sorted(path.name for path in (tmp_path / "g").iterdir()) == [ABOUT, WEIGHTS]


def test_commands(
    folder: Path,
    shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(stages.BUDGETS, "small", QUICK)
    out = str(tmp_path / "g")
    command = ["generator", "train", "--out", out, "--budget", "small", "--train", shards, "--test", f"again={shards}"]
    assert cli.main(command) == 0
    made = load_generator(out)
    before = (tmp_path / "g" / WEIGHTS).read_bytes()
    for other in (["--budget", "full"], ["--seed", "1"], ["--test", f"x={shards}"]):
        assert cli.main([*command, *other]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "other settings" in said and "--out" in said and other[0].removeprefix("--budget").strip("-") in said
    assert (tmp_path / "g" / WEIGHTS).read_bytes() == before, "what was probed with stays"
    assert cli.main(command) == 0, "the same again is no other"
    assert load_generator(out).fingerprint == made.fingerprint
    assert set(made.test.sets) == {"again", "again_held"}

    write_results(tmp_path / "run" / "probe", {"name": "x"}, exp3(BagOfWords(), made, budget="small"))
    grid = ["generator", "grid", str(tmp_path / "run"), "--out", str(tmp_path / "grid.png")]
    assert cli.main([*grid, "--generator", out]) == 0
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size[0] > 170
    assert cli.main([*grid, "--generator", str(folder)]) == 2, "probed with another generator"


# -------------------------------------------------------------------------------------------- bad input


def test_what_is_wrong_is_said(folder: Path, generator: Generator, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="clip-train generator train --out"):
        load_generator(tmp_path / "nothing")
    shutil.copytree(folder, tmp_path / "mixed")
    content = json.loads((folder / ABOUT).read_text())
    (tmp_path / "mixed" / ABOUT).write_text(json.dumps({**content, "fingerprint": "0" * 12}))
    with pytest.raises(DataError, match="do not belong together"):
        load_generator(tmp_path / "mixed")
    (tmp_path / "mixed" / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:500])
    with pytest.raises(DataError, match="cannot be read"):
        load_generator(tmp_path / "mixed")
    with pytest.raises(DataError, match="budget 'large' is unknown"):
        exp3(BagOfWords(), generator, budget="large")
    captioned(tmp_path / "few.tar", [("red", ["red"]), ("blue", ["blue"])])
    with pytest.raises(DataError, match="too few"):
        train.train_generator(tmp_path / "g", TINY, train=str(tmp_path / "few.tar"), test={})
    captioned(tmp_path / "blank.tar", [("red", [" "])])
    with pytest.raises(DataError, match="caption"):
        read_pictures(str(tmp_path / "blank.tar"), 8)
    with pytest.raises(DataError, match="caption"):
        picture_grid([], {"x": torch.zeros(1, 3, 8, 8)}, tmp_path / "g.png")
    with pytest.raises(DataError, match="5 pictures for 2 captions"):
        picture_grid(["a", "b"], {"x": torch.zeros(5, 3, 8, 8)}, tmp_path / "g.png")
    assert cli.main(["generator", "train", "--out", str(tmp_path / "x"), "--test", "nonsense"]) == 2


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "not finite"), (1.0, "no pool gives texts features that differ")]
)
def test_features_that_say_nothing_are_refused(generator: Generator, value: float, message: str) -> None:
    train_part, dev = generator.train, generator.dev
    features = {"own": (np.full((len(train_part), 4), value, np.float32), np.full((len(dev), 4), value, np.float32))}
    with pytest.raises(DataError, match=message):
        fit_prefix(generator, train_part, dev, features)
