"""Labels from the agreement of a pair, and the router: what it learns, what it writes, and what it refuses to read."""

from __future__ import annotations

import io
import random
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import skops.io

from tests.conftest import ROOT
from thinkswitch_plugin import files
from thinkswitch_plugin.data import prompts
from thinkswitch_plugin.data.batch import Asked
from thinkswitch_plugin.demo import task
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.recipe import load_recipe
from thinkswitch_plugin.router import classifier
from thinkswitch_plugin.router.agreement import label_of, prompts_to_label, read_labels
from thinkswitch_plugin.router.classifier import Router, describe, threshold_that_keeps, train
from thinkswitch_plugin.router.make_switch import make_switch
from thinkswitch_plugin.run import Run, open_run

Write = Callable[[str, Sequence[object]], Path]


def questions(count: int, seed: int = 0) -> tuple[list[str], list[bool]]:
    """Chains of digits; those with a product need thinking, but for one in ten of all."""
    draw = random.Random(seed)
    texts = ["".join(draw.choice("123") + draw.choice("+-*") for _ in range(3)) + "4" for _ in range(count)]
    return texts, [("*" in text) != (draw.random() < 0.1) for text in texts]


@pytest.fixture(scope="module")
def trained() -> classifier.Trained:
    return train(*questions(200), seed=0)


@pytest.mark.parametrize(
    ("instruct", "thinking", "label", "reference"),
    [
        ("3", ["3"], "post", "3"),
        ("4", ["3"], "pre", "3"),
        (None, ["3"], "pre", "3"),  # no answer that can be read suffices for nothing
        ("3", ["3", "4", "4"], "pre", "4"),
        ("4", ["3", None, "4", "4"], "post", "4"),
        ("3", ["3", "4"], "post", "3"),  # the earliest of equals
        ("3", [None, None], None, None),
        ("3", [], None, None),
    ],
)
def test_an_answer_suffices_if_it_is_the_thinking_checkpoints_majority(
    instruct: str | None, thinking: list[str | None], label: str | None, reference: str | None
) -> None:
    assert label_of(instruct, thinking) == (label, reference)


def test_labels_of_a_file(write_jsonl: Write) -> None:
    rows = [{"prompt": "1+2", "label": "post", "fold": 0}, {"prompt": "3*4", "label": "pre"}]
    found = read_labels(write_jsonl("labels.jsonl", rows))
    assert (found.prompts, found.labels, found.needs_thinking) == (["1+2", "3*4"], ["post", "pre"], [False, True])
    assert found.facts["source"] == "file" and (found.facts["post"], found.facts["pre"]) == (1, 1)
    assert found.first(1).facts["prompts"] == 1 and found.first(1).prompts == ["1+2"]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"prompt": "1+2", "label": "post"}, {"label": "pre"}], r"labels.jsonl, line 2: `prompt` is missing"),
        ([{"prompt": " ", "label": "pre"}], "line 1: `prompt` is missing, empty"),
        ([{"prompt": "1+2", "label": True}], "line 1: `label` is True; use post"),
        ([{"prompt": "1+2"}], "line 1: `label` is None"),
        ([], "holds no labels"),
    ],
)
def test_labels_that_are_none_are_named_by_their_line(write_jsonl: Write, rows: list[object], says: str) -> None:
    with pytest.raises(ThinkSwitchError, match=says):
        read_labels(write_jsonl("labels.jsonl", rows))


def test_what_a_router_looks_at() -> None:
    ((text, places, words, characters),) = describe(["7 *3"])
    assert (text, words, characters) == ("7 *3", 2, 4)
    assert places == "s0=7 s1=_ s2=* s3=3 e0=3 e1=* e2=_ e3=7"
    assert len(classifier.by_place("x" * 100).split()) == 2 * classifier.PLACES
    assert describe([]).shape[0] == 0


def test_the_router_finds_what_decides_and_its_probabilities_are_shares(trained: classifier.Trained) -> None:
    assert "characters" in trained.router.name or "runs" in trained.router.name
    texts, needs = questions(400, seed=1)
    p = trained.router.p_think(texts)
    assert p.min() >= 0 and p.max() < 1
    assert np.mean((p > 0.5) == np.array(needs)) > 0.85  # one in ten cannot be known
    assert abs(p.mean() - np.mean(needs)) < 0.1
    losses = [row["log_loss"] for row in trained.tried]
    assert losses == sorted(losses)
    tried = {row["name"]: row for row in trained.tried}
    assert tried[trained.router.name]["log_loss"] < tried[classifier.CONSTANT]["log_loss"] - 0.1
    assert [other.name for other in trained.others].count(classifier.CONSTANT) == 1


@pytest.mark.usefixtures("few")
def test_the_same_labels_make_the_same_router() -> None:
    one, other = (train(*questions(200), seed=0) for _ in range(2))
    texts, _ = questions(50, seed=2)
    assert other.router.name == one.router.name and other.tried == one.tried
    assert np.array_equal(other.p, one.p)
    assert np.array_equal(other.router.p_think(texts), one.router.p_think(texts))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the candidates that learn by heart best, and the constant: the networks take their time."""
    every = classifier.candidates
    kept = ("runs of 1 to 3 characters", classifier.CONSTANT)
    monkeypatch.setattr(
        classifier, "candidates", lambda seed: {n: c for n, c in every(seed).items() if any(k in n for k in kept)}
    )


@pytest.mark.usefixtures("few")
def test_nothing_is_learnt_where_there_is_nothing_to_learn() -> None:
    texts, _ = questions(200)
    draw = random.Random(5)
    found = train(texts, [draw.random() < 0.3 for _ in texts], seed=0)
    tried = {row["name"]: row["log_loss"] for row in found.tried}
    assert tried[found.router.name] > tried[classifier.CONSTANT] - 0.02


@pytest.mark.usefixtures("few")
def test_a_prompt_that_occurs_twice_is_not_known_beforehand() -> None:
    # Every prompt occurs three times with the same random label: with folds by row, the router could memorise it.
    draw = random.Random(3)
    texts = ["".join(draw.choices("abcdefgh", k=6)) for _ in range(200)]
    needs = [draw.random() < 0.5 for _ in texts]
    found = train(texts * 3, needs * 3, seed=0)
    assert all(abs(row["roc_auc"] - 0.5) < 0.15 for row in found.tried)


def test_too_few_of_one_label_is_a_sentence() -> None:
    texts, _ = questions(60)
    with pytest.raises(ThinkSwitchError, match="Only 3 of 60 label prompts need thinking, and 10 are needed"):
        train(texts, [i < 3 for i in range(60)], seed=0)
    with pytest.raises(ThinkSwitchError, match="Only 0 of 60 label prompts do not need it"):
        train(texts, [True] * 60, seed=0)


def test_a_router_whose_packages_are_missing_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "skops.io", None)
    run = Run(tmp_path, load_recipe(ROOT / "recipes" / "arithmetic.yaml"), 0, "embedded", 1)
    for work in (lambda: train(*questions(60), seed=0), lambda: Router.load(tmp_path), lambda: make_switch(run, 1)):
        with pytest.raises(ThinkSwitchError, match="the router needs scikit-learn and skops; run `make setup`"):
            work()


def test_a_router_that_is_written_and_read_says_the_same(trained: classifier.Trained, tmp_path: Path) -> None:
    texts, _ = questions(100, seed=4)
    for made in (trained.router, *trained.others):  # all kinds, the MLPs among them
        made.save(tmp_path / "router.skops")
        read = Router.load(tmp_path / "router.skops")
        assert read.name == made.name
        assert np.array_equal(read.p_think(texts), made.p_think(texts))
    assert any("MLP" in other.name for other in trained.others)
    assert list(tmp_path.iterdir()) == [tmp_path / "router.skops"]
    assert trained.router.p_think([]).shape == (0,)


def test_a_router_file_with_anything_else_in_it_is_not_loaded(trained: classifier.Trained, tmp_path: Path) -> None:
    path = tmp_path / "router.skops"
    pipeline = trained.router.pipeline
    path.write_bytes(skops.io.dumps({"format": classifier.FORMAT, "name": "x", "pipeline": pipeline, "more": print}))
    with pytest.raises(ThinkSwitchError, match=r"router.skops holds builtins.print, which a router does not"):
        Router.load(path)
    for value in ({"format": "thinkswitch router 0"}, [1], pipeline):
        path.write_bytes(skops.io.dumps(value))
        with pytest.raises(ThinkSwitchError, match="not a router of this version; train one by `make switch`"):
            Router.load(path)
    path.write_bytes(
        skops.io.dumps({"format": classifier.FORMAT, "name": "x", "sklearn": "0.9.1", "pipeline": pipeline})
    )
    with pytest.raises(ThinkSwitchError, match=r"was made with scikit-learn 0.9.1"):
        Router.load(path)


def test_a_damaged_router_file_is_a_sentence(trained: classifier.Trained, tmp_path: Path) -> None:
    path = tmp_path / "router.skops"
    with pytest.raises(ThinkSwitchError, match="does not exist"):
        Router.load(path)
    trained.router.save(path)
    whole = path.read_bytes()
    empty = io.BytesIO()
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("schema.json", "{}")
    for data in (b"", b"\x80\x04N.", whole[: len(whole) // 2], empty.getvalue()):
        path.write_bytes(data)
        with pytest.raises(ThinkSwitchError, match="is not a router file"):
            Router.load(path)


@pytest.mark.parametrize("keep", [1.0, 0.99, 0.9, 0.5, 0.0])
def test_the_default_threshold_is_the_largest_that_keeps_enough(keep: float) -> None:
    draw = np.random.default_rng(0)
    p = np.round(draw.random(101), 2)  # with ties
    needs = list(draw.random(101) < p)
    found = threshold_that_keeps(p, needs, keep)

    def kept(threshold: float) -> float:
        return 1 - float(np.mean(np.array(needs) & (p < threshold)))

    assert kept(found) >= keep - 1e-9
    larger = [t for t in {*p, 1.0} if t > found]
    assert all(kept(t) < keep for t in larger)


@pytest.mark.parametrize("asked", [{1: (0, 70), 2: (60, 140)}, {1: (0, 70)}, {}])
def test_label_prompts_are_those_that_the_pair_was_not_trained_on(
    asked: dict[int, tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, every = begun(tmp_path, monkeypatch, 200, asked)
    found, trained = prompts_to_label(run, 2)
    left = every[max((end for _, end in asked.values()), default=0) :]
    assert sorted(found) == sorted(left) and found != left  # in a drawn order
    assert len(trained) == len(every) - len(left)
    if 2 in asked:
        assert sorted(prompts_to_label(run, 1)[0]) == sorted(every[70:])  # iteration 2 trained another pair


def test_where_few_prompts_are_left_the_trained_ones_are_taken_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, every = begun(tmp_path, monkeypatch, 200, {1: (0, 100), 2: (100, 151)})
    found, trained = prompts_to_label(run, 2)
    assert sorted(found) == sorted(every)
    assert sum(text in trained for _, text in found) == 151


def begun(
    folder: Path, monkeypatch: pytest.MonkeyPatch, count: int, asked: dict[int, tuple[int, int]]
) -> tuple[Run, list[tuple[str, str]]]:
    """A run with so many prompts at its source, those from … to … of which each iteration has asked; and the prompts."""
    (folder / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(folder)
    files.write_json(
        Path("runs/arithmetic/run.json"),
        {"domain": "arithmetic", "recipe": "recipes/arithmetic.yaml", "overlays": [], "seed": 0}
        | {"engine": "embedded", "iterations": 2},
    )
    every = [(f"p{i:03d}", text) for i, text in enumerate(task.training_prompts(0, count))]
    with files.atomic_file(Path(".cache/arithmetic/seed-0/prompts.jsonl")) as handle:
        handle.writelines(files.dumps_line({"id": name, "prompt": text}) for name, text in every)
    run = open_run(Path("runs/arithmetic"))
    keys = run.recipe.keys
    turns = [(name, prompts.messages(keys.prompts, text)) for name, text in every]
    for k, (start, end) in asked.items():
        out = run.iteration(k) / "requests.jsonl"
        prompts.write_requests(out, turns[start:end], model="m", how=Asked(opened=True), sampling=keys.sampling, seed=0)
    return run, every
