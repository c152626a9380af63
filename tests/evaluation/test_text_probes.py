"""Probes of text encoders: pairs, pools, bags of words, splits, toy encoders whose result is known."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clip_train.cli import main
from clip_train.errors import DataError
from clip_train.evaluation import statistics
from clip_train.evaluation.text import bag_of_words, metrics, suite
from clip_train.evaluation.text.compare import compare, kind_of
from clip_train.evaluation.text.encoder import PooledEncoder, Vectors, acting_pools, joined
from clip_train.evaluation.text.finetune import Settings
from clip_train.evaluation.text.our_tower import OurTower
from clip_train.evaluation.text.results import TaskResult, write_results
from clip_train.evaluation.text.suite import choose
from clip_train.evaluation.text.synesthesia import compare_task
from clip_train.evaluation.text.tasks import EMBEDDED, TextTask, check_task, load_embedded, split_of
from clip_train.evaluation.text.understanding import probe_task
from clip_train.models.text import TextTransformer
from tokenizer import BPETokenizer


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.default(context_length=24)


def encoder_of(tokenizer: BPETokenizer, attention: str, pool: str) -> PooledEncoder:
    torch.manual_seed(0)
    tower = TextTransformer(
        tokenizer.vocab_size, tokenizer.context_length, width=32, layers=2, heads=2, attention=attention, pool=pool,
        eot_id=tokenizer.eot,
    )  # fmt: skip
    return PooledEncoder("tiny", OurTower(tower, tokenizer))


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_the_second_sentence_acts_but_for_a_causal_first_eot(tokenizer: BPETokenizer, attention: str) -> None:
    encoder = encoder_of(tokenizer, attention, "eot")
    first = ["a man plays the guitar"]
    one, two = (encoder.features(first, [second]) for second in ("a dog sleeps", "rain falls on the sea"))
    for pool in ("last", "mean", "max"):
        assert np.abs(one[pool] - two[pool]).max() > 1e-3
    blind = ("own", "eot", "cls") if attention == "causal" else ()
    for pool in ("own", "eot", "cls"):
        assert np.allclose(one[pool], two[pool], atol=1e-6) == (pool in blind)
    assert set(acting_pools(encoder, pairs=True)) == set(encoder.pools) - set(blind)
    assert ("cls" in acting_pools(encoder, pairs=False)) == (attention == "bidirectional")


def test_features_are_the_towers_whatever_the_batch(tokenizer: BPETokenizer) -> None:
    encoder = encoder_of(tokenizer, "bidirectional", "mean")
    texts = ["a cat", "the quick brown fox jumps over the lazy dog", "a cat", "two"]
    together = encoder.features(texts)
    for row, text in enumerate(texts):
        ids, lengths = tokenizer.encode_batch([text])
        output = encoder.tower.module(torch.from_numpy(ids)[None].long(), torch.from_numpy(lengths).long())
        tokens = output.tokens[0].detach().numpy()
        for pool, want in (("own", tokens.mean(0)), ("mean", tokens.mean(0)), ("cls", tokens[0]), ("last", tokens[-1]),
                           ("eot", tokens[-1]), ("max", tokens.max(0))):  # fmt: skip
            np.testing.assert_allclose(together[pool][row], want, atol=2e-6)
    with pytest.raises(DataError, match="no text"):
        encoder.features([])
    with pytest.raises(DataError, match="pair up"):
        encoder.features(["a"], ["b", "c"])
    with pytest.raises(DataError, match="pool='map'"):
        encoder.encode(["a"], "map")


def test_a_pair_is_sot_a_eot_b_eot_and_the_longer_one_is_cut(tokenizer: BPETokenizer) -> None:
    tower = encoder_of(tokenizer, "causal", "eot").tower
    (row,) = tower.tokenise(["a red apple"], ["a cat"]).ids
    sot, eot = tokenizer.sot, tokenizer.eot
    assert row == [sot, *tokenizer.encode("a red apple"), eot, *tokenizer.encode("a cat"), eot]
    long = " ".join(["cat"] * 60)
    found = tower.tokenise([long, "a", long], ["a dog", long, long])
    assert found.cut == 3 and {len(row) for row in found.ids} == {24}
    assert found.ids[0][-3:] == [*tokenizer.encode("a dog"), eot]
    assert found.ids[1][1:3] == [*tokenizer.encode("a"), eot]


def test_cutting_is_fair() -> None:
    ten, three, twenty = list(range(10)), list(range(3)), list(range(20))
    for a, b, sizes in (
        (ten, three, (9, 3)), (three, ten, (3, 9)), (ten, twenty, (6, 6)), (twenty, ten, (6, 6)), (three, three, (3, 3))
    ):  # fmt: skip
        first, second, cut = joined(a, b, 12)
        assert second is not None
        assert (len(first), len(second)) == sizes and cut == (len(a) + len(b) > 12)


def test_naive_bayes_by_hand() -> None:
    train = split_of([["good film", 1], ["good", 1], ["bad film", 0], ["bad bad", 0]])
    # Words good, film, bad. Class 1: counts 2+1, 1+1, 0+1 of 6; class 0: 0+1, 1+1, 2+1 of 6; equal priors.
    test = split_of([["good bad good", 0], ["film good", 1], ["film", 0], ["bad unknown", 0]])
    got = bag_of_words.naive_bayes(train, test, 2)
    # "good bad": 3/6 * 1/6 both ways, a tie, which goes to class 0; "film" ties as well.
    assert got.tolist() == [0, 1, 0, 0]


def test_bag_cosines_by_hand() -> None:
    split = split_of([["red apple", "green apple", 1], ["a a b", "a", 0], ["!", "x", 0]])
    np.testing.assert_allclose(bag_of_words.cosines(split), [0.5, 2 / 5**0.5, 0])


def test_bag_ridge_is_the_primal_solution() -> None:
    rows = [["a b", 1.0], ["a", 3.0], ["b c", -1.0], ["c c d", 0.5]]
    train, test = split_of(rows), split_of([["a d", 0.0], ["b", 0.0]])
    x = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]) / np.array(
        [[2**0.5], [1], [2**0.5], [2**0.5]]
    )
    y = train.answers - train.answers.mean()
    w = np.linalg.solve(x.T @ x + 0.7 * np.eye(4), x.T @ y)
    want = train.answers.mean() + np.array([(w[0] + w[3]) / 2**0.5, w[1]])
    np.testing.assert_allclose(bag_of_words.ridge(train, test, 0.7), want, rtol=1e-5)


def test_metrics_are_sklearns() -> None:
    from sklearn.metrics import f1_score, matthews_corrcoef

    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, 60).astype(float), rng.integers(0, 2, 60).astype(float)
    assert metrics.matthews(p, y) == pytest.approx(matthews_corrcoef(y, p))
    assert metrics.f1(p, y) == pytest.approx(f1_score(y, p))
    assert metrics.matthews(np.ones(60), y) == 0


class Toy:
    """Knows the answer in one pool (`knows`), noise in the other."""

    name, width, pools = "toy", 8, ("own", "mean")

    def __init__(self, answer: dict[str, float], knows: str) -> None:
        self.answer, self.knows = answer, knows

    def features(self, first: Sequence[str], second: Sequence[str] | None = None) -> dict[str, Vectors]:
        keys = [a if second is None else f"{a}|{b}" for a, b in zip(first, second or first, strict=True)]
        noise = np.stack([np.random.default_rng(zlib.crc32(key.encode())).normal(size=8) for key in keys])
        wise = noise.copy()
        for row, key in zip(wise, keys, strict=True):
            row[3] += 40 * self.answer.get(key, 0.0)
        return {pool: (wise if pool == self.knows else noise).astype(np.float32) for pool in self.pools}

    def joint(self, texts: Sequence[str]) -> None:
        return None


def toy_task(n: int = 300) -> tuple[TextTask, dict[str, float]]:
    rows = [[f"text {i}", i % 2] for i in range(n)]
    third = n // 3
    splits = {name: split_of(rows[k * third : (k + 1) * third]) for k, name in enumerate(("train", "dev", "test"))}
    return TextTask("toy", "labels", splits, ("even", "odd")), {row[0]: row[1] for row in rows}


def test_a_probe_finds_the_pool_that_knows_and_chance_without() -> None:
    task, answer = toy_task()
    (result,) = probe_task(Toy(answer, "mean"), task)
    assert (result.value, result.pool, result.n) == (1.0, "mean", 100)
    assert result.items[""].mean() == result.value and result.items[""].shape == (100,)
    (blind,) = probe_task(Toy({}, "mean"), task)
    assert 0.3 < blind.value < 0.7 and blind.chance == 0.5


def test_same_picture_of_a_perfect_and_a_blind_encoder() -> None:
    rows = [[f"name {i}", f"words {i if i % 2 else i + 1}", i % 2] for i in range(80)]
    task = TextTask("toy", "same", {"dev": split_of(rows[:40]), "test": split_of(rows[40:])}, metric="auc")

    class Pictures(Toy):
        def features(self, first: Sequence[str], second: Sequence[str] | None = None) -> dict[str, Vectors]:
            own = [np.random.default_rng(int(text.split()[-1])).normal(size=8) if text[-1].isdigit() else np.ones(8)
                   for text in first]  # fmt: skip
            own = np.stack([v + (text[0] == "t") * len(text) for v, text in zip(own, first, strict=True)])
            blind = np.array([[zlib.crc32(text.encode()) % 97 for _ in range(8)] for text in first]) + np.arange(8)
            return {"own": own.astype(np.float32), "mean": blind.astype(np.float32)}

    results = compare_task(Pictures({}, "own"), task)
    assert [one.name for one in results] == ["exp2/toy", "exp2/toy/centred"]
    assert results[0].pool == "own" and results[0].value == 1.0
    assert set(results[0].items) == {":score", ":label"} and "point_biserial" in results[0].more


def test_texts_cut_are_the_tasks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cap so short that even the sentences by which pools are tried are cut."""
    tokenizer = BPETokenizer.default(context_length=8)
    encoder = encoder_of(tokenizer, "bidirectional", "mean")
    texts = [" ".join(["cat"] * (1 + i % 9)) + f" {'no' if i % 2 else 'yes'}" for i in range(60)]
    rows = [[text, texts[(7 * i + 3) % 60], i % 2] for i, text in enumerate(texts)]

    def task(name: str, rows: list[list[Any]], **more: Any) -> TextTask:
        splits = {split: split_of(rows[k * 20 : k * 20 + 20]) for k, split in enumerate(("train", "dev", "test"))}
        return TextTask(name, splits=splits, **more)

    single = task("single", [[text, label] for text, _, label in rows], kind="labels", classes=("no", "yes"))
    pair = task("pair", rows, kind="labels", classes=("no", "yes"))
    same = TextTask("same", "same", {name: pair.splits[name] for name in ("dev", "test")}, metric="auc")

    def tuned(_: PooledEncoder, task: TextTask, __: Settings) -> TaskResult:
        return TaskResult(f"exp1/{task.name}/finetuned", "accuracy", 1.0, 0.5, "own", 20, 0.0, {})

    monkeypatch.setattr(suite, "finetune_task", tuned)
    found = suite.run_suite(encoder, [("exp1", single), ("exp1", pair), ("exp2", same)], finetune=Settings())
    length = {text: len(tokenizer.encode(text)) for text in texts}
    alone = sum(length[text] > 6 for text in set(texts))
    together = sum(length[a] + length[b] > 5 for a, b in {(a, b) for a, b, _ in rows})
    compared = sum(length[text] > 6 for text in {text for a, b, _ in rows[20:] for text in (a, b)})
    cut = {one.name: one.more["texts_cut"] for one in found}
    assert 0 < alone < len(set(texts)) and alone != together
    assert cut == {
        "exp1/single": alone, "exp1/single/finetuned": alone, "exp1/pair": together, "exp1/pair/apart": alone,
        "exp1/pair/finetuned": together, "exp2/same": compared, "exp2/same/centred": compared,
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for names in EMBEDDED.values() for name in names])
def test_embedded_tasks_are_balanced_and_leak_nothing(name: str) -> None:
    task = load_embedded(name)
    sides = {split: {*part.first, *(part.second or [])} for split, part in task.splits.items()}
    one_sided = {split: set(part.first) for split, part in task.splits.items()}
    names = list(sides)
    for a in names:
        for b in names[names.index(a) + 1 :]:
            assert not one_sided[a] & one_sided[b]
            if not name.startswith("same_picture"):  # keywords such as "fruit" recur
                assert not sides[a] & sides[b]
    if task.kind != "ratings":
        for part in task.splits.values():
            _, counts = np.unique(part.answers, return_counts=True)
            assert counts.min() == counts.max()
    if name != "topic" and task.kind == "labels":  # words alone do not tell
        guess = bag_of_words.naive_bayes(task.splits["train"], task.splits["test"], 2)
        assert abs((guess == task.splits["test"].answers).mean() - 0.5) < 0.04
    if task.kind == "same":
        scores = bag_of_words.cosines(task.splits["test"])
        assert abs(metrics.measure("auc", scores, task.splits["test"].answers) - 0.5) < 0.02


def test_tasks_that_cannot_be_asked() -> None:
    good = {"train": split_of([["a", 0], ["b", 1]]), "dev": split_of([["c", 0], ["d", 1]])}
    one_class = split_of([["e", 1], ["f", 1]])
    with pytest.raises(DataError, match="one class"):
        check_task(TextTask("t", "labels", {**good, "test": one_class}, ("no", "yes")))
    with pytest.raises(DataError, match="empty"):
        check_task(TextTask("t", "labels", {**good, "test": split_of([])}, ("no", "yes")))
    with pytest.raises(DataError, match="ratings"):
        check_task(TextTask("t", "ratings", {"dev": split_of([["a", "b", 1]]), "test": split_of([["a", "b", 1]])}))
    with pytest.raises(DataError, match="nearest: exp1/topic"):
        choose(["exp1/topics"])
    assert [f"{experiment}/{task.name}" for experiment, task in choose(["exp2/keywords", "exp1/topic"])] == [
        "exp1/topic", "exp2/keywords"
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("probe") / "run"
    steps = ["--set", "training.steps=2", "--set", "schedule.warmup_steps=1", "--set", "evaluation.tasks={}"]
    assert main(["train", "debug", "--run-dir", str(run_dir), *steps]) == 0
    return run_dir


def test_the_command_writes_what_pairs_up(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = "exp1/entailment,exp2/keywords,exp2/same_picture_clipart"
    assert main(["probe", str(run), str(run / "checkpoints/latest"), "--tasks", tasks, "--out", str(tmp_path)]) == 0
    assert "against run" in capsys.readouterr().out
    found = json.loads((tmp_path / "run/text.json").read_text())["tasks"]
    assert {"exp1/entailment", "exp1/entailment/apart", "exp2/keywords/joint", "exp2/keywords/centred",
            "exp2/same_picture_clipart/joint_centred"} <= found.keys()  # fmt: skip
    with np.load(tmp_path / "run/text.npz") as one, np.load(tmp_path / "latest/text.npz") as other:
        assert one["exp1/entailment"].mean() == pytest.approx(found["exp1/entailment"]["value"])
        assert one["exp2/keywords:score"].shape == one["exp2/keywords:label"].shape == (1000,)
        for key in one.files:
            np.testing.assert_array_equal(one[key], other[key])
    assert found["exp1/entailment"]["pool"] not in ("own", "eot", "cls")  # they do not see the second sentence
    differences = json.loads((tmp_path / "comparison.json").read_text())["differences"]
    assert len(differences) > 5 and all(row["value"] == row["reference"] for row in differences)


def test_differences_of_encoders_are_those_of_their_items() -> None:
    rng = np.random.default_rng(1)

    def result(name: str, metric: str, value: float, **items: Any) -> TaskResult:
        named = {key.replace("_", ":") if key != "plain" else "": one for key, one in items.items()}
        return TaskResult(name, metric, value, 0.5, "mean", 200, 0.0, named)

    ratings = rng.normal(size=200)
    encoders: dict[str, list[TaskResult]] = {}
    for name, noise in (("first", 3.0), ("second", 0.5)):
        hits = rng.uniform(size=(2, 200)) < (0.5 if name == "first" else 0.8)
        scores = ratings + noise * rng.normal(size=200)
        encoders[name] = [
            result("exp1/mood/finetuned", "accuracy", float(hits.mean()), plain=hits.astype(np.float64)),
            result("exp2/heat", "pearson", statistics.pearson(scores, ratings).r, _score=scores, _label=ratings),
            result("exp1/pairs", "f1", 0.7, _score=scores, _label=ratings),
            result("exp3/nll_seen", "bits", 1.0, plain=scores),
        ]
    found = compare(encoders)
    assert [one.task for one in found] == ["exp1/mood/finetuned", "exp2/heat"]
    assert kind_of(encoders["first"][2]) is None
    for one in found:
        assert one.value - one.reference > 0.15
        assert one.low < one.value - one.reference < one.high and one.p < 0.01
    assert found[0].williams_p is None
    first, second = (encoders[name][1].items[":score"] for name in ("first", "second"))
    between = statistics.pearson(first, second).r
    expected = statistics.williams(found[1].value, found[1].reference, between, 200).p
    assert found[1].williams_p == pytest.approx(expected)


def test_figures_of_one_step_come_together_and_of_another_go(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "run"
    shutil.copytree(run, own, symlinks=True)

    def probe(tasks: str) -> tuple[dict[str, Any], dict[str, Any], str]:
        assert main(["probe", str(own), "--tasks", tasks]) == 0
        content = json.loads((own / "probe/text.json").read_text())
        with np.load(own / "probe/text.npz") as file:
            arrays = {name: file[name] for name in file.files}
        assert {name.partition(":")[0] for name in arrays} == content["tasks"].keys()
        return content, arrays, capsys.readouterr().out

    first, items, said = probe("exp2/keywords,exp1/entailment")
    assert first["encoder"]["step"] == 2 and "replaced" not in said
    first["tasks"]["exp2/keywords"]["value"] = 9.0  # as another time would have found it
    (own / "probe/text.json").write_text(json.dumps(first))
    second, more, said = probe("exp2/keywords,exp2/same_picture_clipart")
    assert second["tasks"].keys() > first["tasks"].keys() and "replaced" not in said
    assert second["tasks"]["exp2/keywords"]["value"] < 1
    assert second["tasks"]["exp1/entailment"] == first["tasks"]["exp1/entailment"]
    np.testing.assert_array_equal(more["exp1/entailment"], items["exp1/entailment"])

    state = own / "checkpoints/latest/state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"step": 3}))
    third, _, said = probe("exp2/keywords")
    assert third["encoder"]["step"] == 3
    assert {name.split("/")[1] for name in third["tasks"]} == {"keywords"}
    assert "step 2, weights raw: replaced" in " ".join(said.split())


def test_another_generators_figures_do_not_stay(tmp_path: Path) -> None:
    def of(*names: str) -> list[TaskResult]:
        return [TaskResult(name, "rank", 0.5, 0.5, "mean", 3, 0.0, {"": np.ones(3)}) for name in names]

    about = {"path": "x", "step": 1}
    assert write_results(tmp_path, about, of("exp1/topic", "exp3/nll", "exp3/nll_held")) == ""
    assert write_results(tmp_path, about, of("exp3/nll")) == ""
    assert json.loads((tmp_path / "text.json").read_text())["tasks"].keys() == {"exp1/topic", "exp3/nll"}
    (tmp_path / "text.npz").write_bytes(b"PK damaged")
    assert "read" in write_results(tmp_path, about, of("exp2/keywords"))
    with np.load(tmp_path / "text.npz") as file:
        assert file.files == ["exp2/keywords"]


def test_a_generator_that_is_not_finished_is_none(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/generator/stages").mkdir(parents=True)  # a training that was cut
    monkeypatch.setattr(
        "clip_train.evaluation.text.suite.run_suite", lambda *_, pictures, **__: [] if pictures is None else 1
    )
    assert main(["probe", str(run), "--out", "out"]) == 0
    assert main(["probe", str(run), "--out", "out", "--tasks", "exp3"]) == 2
    assert "no generator here" in capsys.readouterr().err


def test_the_command_names_the_mistake(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", str(run), "--tasks", "exp2/keyword"]) == 2
    assert "nearest: exp2/keywords" in capsys.readouterr().err
    assert main(["probe", str(tmp_path / "absent")]) == 2
    assert "no such" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["absent"], "no such"),
        (["folder"], "no checkpoint"),
        (["--finetune", "--epochs", "0"], "epochs = 0"),
        (["--finetune", "--seeds", "0"], "seeds = 0"),
        (["--finetune", "--lr", "nan"], "lr = nan"),
    ],
)
def test_a_mistake_is_named_before_anything_is_probed(
    arguments: list[str], says: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "probe_task", lambda *_: pytest.fail("it was probed"))
    assert main(["probe", str(run), *arguments, "--tasks", "exp1/topic", "--out", "out"]) == 2
    assert says in capsys.readouterr().err
