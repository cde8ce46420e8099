"""Complexity labels: how questions are divided and compared, what is kept and redone, and a real cross-validation."""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import checkpoints
from tests.conftest import BIN, ROOT
from tests.test_pairs import answer, request
from thinkswitch_plugin import files
from thinkswitch_plugin.args import EngineKeys, PerceptionKeys
from thinkswitch_plugin.data.batch import prompt_id, read_requests
from thinkswitch_plugin.data.formats import POST, PRE, parse
from thinkswitch_plugin.demo.tokenizer import build_tokenizer
from thinkswitch_plugin.engines import servers
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.loop import check
from thinkswitch_plugin.perception import labels, training
from thinkswitch_plugin.perception.label_job import LabelJob, find_job, parse_formats
from thinkswitch_plugin.perception.label_material import Question, assign_folds, majority_references, read_material
from thinkswitch_plugin.recipe import load_recipe
from thinkswitch_plugin.run.hashes import Hashes

Write = Callable[[str, Sequence[object]], Path]
IDS = st.lists(st.text(min_size=1, max_size=4), unique=True, min_size=2, max_size=60)


def question(prompt_id: str, text: str) -> Question:
    return Question(prompt_id, [{"role": "user", "content": text}], "0")


def folds_of(ids: Sequence[str], folds: int, seed: int) -> dict[str, int]:
    """The folds of questions that differ."""
    return assign_folds([question(i, f"{i} = ?") for i in ids], folds, seed)


@given(ids=IDS, folds=st.integers(2, 7), seed=st.integers(0, 99), data=st.data())
def test_questions_are_divided_evenly_and_whatever_their_order(
    ids: list[str], folds: int, seed: int, data: st.DataObject
) -> None:
    fold = folds_of(ids, folds, seed)
    sizes = Counter(fold.values())
    assert set(fold) == set(ids) and set(sizes) <= set(range(1, folds + 1))
    assert max(sizes[n] for n in range(1, folds + 1)) - min(sizes[n] for n in range(1, folds + 1)) <= 1
    assert folds_of(data.draw(st.permutations(ids)), folds, seed) == fold


def test_another_seed_divides_otherwise() -> None:
    ids = [f"p{i}" for i in range(50)]
    assert folds_of(ids, 5, 0) != folds_of(ids, 5, 1)


def test_a_question_under_two_ids_lies_in_one_fold() -> None:
    questions = [question(f"p{i:02d}", f"{i % 10}+1") for i in range(30)]
    fold = assign_folds(questions, 5, 0)
    assert all(fold[f"p{i:02d}"] == fold[f"p{i + 10:02d}"] == fold[f"p{i + 20:02d}"] for i in range(10))
    assert Counter(fold.values()) == dict.fromkeys(range(1, 6), 6)
    assert assign_folds(questions[::-1], 5, 0) == fold
    alone = questions[:10]
    assert assign_folds(alone, 5, 0) == folds_of([q.prompt_id for q in alone], 5, 0)


def recipe_of(tmp_path: Path, **keys: Any) -> Any:
    """The demo recipe with other keys under `thinkswitch:`."""
    overlay = tmp_path / "keys.overlay.yaml"
    files.write_yaml(overlay, {"thinkswitch": keys})
    return load_recipe(Path("recipes/arithmetic.yaml"), (overlay,))


@pytest.fixture
def job(tmp_path: Path, write_jsonl: Write) -> LabelJob:
    """Six questions, three samples each: p1's answers are 1, 1 and 2; p5 has no readable answer."""
    said = {f"p{i}": ["0", str(i), str(i)] for i in range(5)} | {"p5": ["none", "at all", "x"]}
    said["p1"] = ["1", "1", "2"]
    requests, generations = [], []
    for prompt, sample in itertools.product(said, range(3)):
        requests.append(request(prompt, sample, text=f"question {prompt}"))
        generations.append(answer(f"{prompt}-s{sample}", f"step {sample}\n</think>\n\n{said[prompt][sample]}"))
    random.Random(0).shuffle(generations)
    write_jsonl("requests.jsonl", requests)
    return LabelJob(
        recipe=recipe_of(tmp_path, answers={"selection": "all"}),
        seed=0,
        engine="embedded",
        home=tmp_path / "home",
        generations=write_jsonl("generations.jsonl", generations),
        folds=2,
        formats=(POST,),
    )


def test_the_majority_of_all_complete_answers_is_the_reference(job: LabelJob) -> None:
    assert majority_references(job) == {"p0": "0", "p1": "1", "p2": "2", "p3": "3", "p4": "4"}
    material = read_material(job)
    assert [question.prompt_id for question in material.questions] == ["p0", "p1", "p2", "p3", "p4"]
    assert (material.without_reference, material.repeated) == (1, 0)
    # What is learnt from is another matter: what the recipe selects.
    one = replace(job, recipe=job.recipe.__class__(job.recipe.path, job.recipe.axolotl, recipe_first(job)))
    assert read_material(one).report.kept == 6
    assert majority_references(one)["p2"] == "2"


def recipe_first(job: LabelJob) -> Any:
    kept = job.recipe.keys.answers.model_copy(update={"selection": "first"})
    return job.recipe.keys.model_copy(update={"answers": kept})


def test_gold_answers_come_from_the_field_that_the_recipe_names(
    job: LabelJob, tmp_path: Path, write_jsonl: Write
) -> None:
    rows = [{"id": f"p{i}", "prompt": f"question p{i}", "right": 9 - i} for i in range(6)]
    prompts = write_jsonl("prompts.jsonl", rows)
    keys = {"prompts": {"path": str(prompts)}, "adaptive": {"gold": "right"}}
    gold = replace(job, recipe=recipe_of(tmp_path, **keys))
    material = read_material(gold)
    assert {q.prompt_id: q.reference for q in material.questions} == {f"p{i}": str(9 - i) for i in range(6)}
    assert material.without_reference == 0  # p5 has no readable answer, and needs none

    with pytest.raises(ThinkSwitchError, match=r"line 1: the field `wrong` is missing; fields of this row: id, prompt"):
        unknown = {**keys, "adaptive": {"gold": "wrong"}}
        read_material(replace(job, recipe=recipe_of(tmp_path, **unknown)))
    write_jsonl("prompts.jsonl", rows[:4])
    with pytest.raises(ThinkSwitchError, match="has no row for the prompt 'p4'"):
        read_material(gold)
    write_jsonl("prompts.jsonl", [*rows[:5], {**rows[5], "right": "several"}])
    with pytest.raises(ThinkSwitchError, match=r"in which `thinkswitch\.answers\.kind: digit` reads no answer"):
        read_material(gold)


def test_a_fold_learns_from_all_samples_of_the_other_folds_and_asks_each_of_its_questions_once(job: LabelJob) -> None:
    material = read_material(job)
    fold_of = assign_folds(material.questions, job.folds, job.seed)
    seen = Counter[str]()
    for number in (1, 2):
        mine = [q for q in material.questions if fold_of[q.prompt_id] == number]
        fold = labels.Fold(job, number, mine, job.home, Hashes(job.home))
        fold.write(material, fold_of)
        learnt = [row for _, row in files.read_jsonl(fold.here / "rationales.jsonl")]
        asked = [row for _, row in read_requests(fold.here / "requests.jsonl")]
        assert Counter(row["prompt_id"] for row in learnt) == {p: 3 for p in fold_of if fold_of[p] != number}
        assert all(row["trace"].startswith("step ") for row in learnt)
        assert [row["custom_id"] for row in asked] == [f"{q.prompt_id}-s0" for q in mine]
        assert all(row["body"]["temperature"] == 0 and row["body"]["stop"] == ["</answer>"] for row in asked)
        seen.update(map(prompt_id, asked))
    assert seen == dict.fromkeys(fold_of, 1)


@pytest.mark.parametrize(
    ("text", "cut", "form", "right"),
    [
        ("<answer>7", False, POST, True),
        ("<answer>7</answer>", False, POST, True),
        ("<answer>8</answer>", False, POST, False),
        ("<answer>7", True, POST, False),  # cut before its end
        ("<think>\nt\n</think>\n\n7", False, POST, False),  # right, but not before thinking
        ("<think>\nt\n</think>\n\n7", False, PRE, True),
        ("<think>\nt\n", True, PRE, False),
        ("7", False, POST, False),
        ("", False, POST, False),
    ],
)
def test_a_baseline_is_right_if_its_whole_answer_in_its_format_is_the_reference(
    text: str, cut: bool, form: Any, right: bool
) -> None:
    assert labels.is_right(parse(text, cut=cut), form, "7", "digit") is right


@pytest.mark.parametrize(
    ("right", "label", "pre"),
    [
        ({POST: True}, POST, None),
        ({POST: False}, PRE, None),
        ({POST: False, PRE: False}, PRE, False),
        ({POST: True, PRE: False}, POST, False),
    ],
)
def test_the_label_is_post_where_the_post_baseline_is_right(right: Any, label: str, pre: bool | None) -> None:
    shares = {form: float(verdict) for form, verdict in right.items()}
    row = labels.row_of(Question("p0", [{"role": "user", "content": "1+1"}], "2"), 3, shares, "gold", 0.5)
    assert row == {
        "prompt_id": "p0",
        "prompt": "1+1",
        "fold": 3,
        "post_correct": right[POST],
        "pre_correct": pre,
        "post_share": float(right[POST]),
        "pre_share": shares.get(PRE),
        "label": label,
        "reference": "2",
        "reference_from": "gold",
    }


@pytest.mark.parametrize(("share", "label"), [(0.0, PRE), (0.49, PRE), (0.5, POST), (1.0, POST)])
def test_of_several_answers_a_share_has_to_be_right(share: float, label: str) -> None:
    question = Question("p0", [{"role": "user", "content": "1+1"}], "2")
    assert labels.row_of(question, 1, {POST: share}, "majority", 0.5)["label"] == label


def test_several_answers_are_drawn_and_numbered(job: LabelJob, tmp_path: Path) -> None:
    several = replace(job, recipe=recipe_of(tmp_path, answers={"selection": "all"}, adaptive={"samples": 3}))
    material = read_material(several)
    fold = labels.Fold(several, 1, material.questions[:1], job.home, Hashes(job.home))
    fold.write(material, {question.prompt_id: 2 for question in material.questions})
    rows = [row for _, row in files.read_jsonl(fold.here / "requests.jsonl")]
    assert [row["custom_id"] for row in rows] == ["p0-s0", "p0-s1", "p0-s2"]
    assert {row["body"]["temperature"] for row in rows} == {1.0}
    assert len({row["body"]["seed"] for row in rows}) == 3


def test_a_conditions_config_is_the_recipes_with_its_rows_its_template_and_no_module_it_does_not_have(
    tmp_path: Path,
) -> None:
    recipe = recipe_of(tmp_path, perception={"tokens": 2})
    recipe.axolotl.update(
        chat_template="chatml",
        lora_modules_to_save=["perception", "lm_head"],
        lr_groups=[{"name": "p", "modules": ["perception"], "lr": 0.003}],
    )
    data = ((tmp_path / "a.jsonl", training.TYPES[PRE]), (tmp_path / "b.jsonl", training.TYPES[POST]))
    plain = training.Condition(tmp_path / "student", data, seed=5, axolotl={"num_epochs": 2})
    config = training.condition_config(recipe, plain, tmp_path)
    assert [(Path(d["path"]).name, d["type"]) for d in config["datasets"]] == [
        ("a.jsonl", "thinkswitch_plugin.pre_thinking"),
        ("b.jsonl", "thinkswitch_plugin.post_thinking"),
    ]
    assert (config["num_epochs"], config["seed"], config["chat_template"]) == (2, 5, "tokenizer_default")
    assert config["lora_modules_to_save"] == ["lm_head"] and "lr_groups" not in config
    assert "perception" not in config["thinkswitch"] and config["thinkswitch"]["answers"] == {"kind": "digit"}
    check.validate(config, "the config")

    keys = PerceptionKeys.model_validate({"static": True})
    whole = training.condition_config(recipe, replace(plain, perception=keys), tmp_path)
    assert whole["lora_modules_to_save"] == ["perception", "lm_head"] and len(whole["lr_groups"]) == 1
    assert whole["thinkswitch"]["perception"] == {"static": True}
    check.validate(whole, "the config")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An engine on a checkpoint of random weights."""
    from thinkswitch_plugin.engines.embedded import EmbeddedEngine

    folder = checkpoints.write(tmp_path_factory.mktemp("tiny") / "checkpoint", checkpoints.qwen3(0))
    build_tokenizer("instruct").save_pretrained(folder)
    return EmbeddedEngine(folder)


def asked(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 24, **more}


def test_the_embedded_engine_stops_at_a_stop_string_each_row_by_itself(tiny: Any) -> None:
    questions = ["1+1", "7*3+4", "abc", "9-5*2+1"]
    plain = [body["choices"][0]["message"]["content"] for body in tiny.answer([asked(q) for q in questions])]
    stop = [plain[1][3:5], "never written"]  # what the second row writes, and perhaps not the others
    stopped = tiny.answer([asked(q, stop=stop) for q in questions])
    assert plain[1].find(stop[0]) >= 0 and stopped[1]["choices"][0]["finish_reason"] == "stop"
    for text, body in zip(plain, stopped, strict=True):
        choice = body["choices"][0]
        assert choice["message"]["content"] == text.partition(stop[0])[0]
        assert (choice["finish_reason"] == "stop") is (stop[0] in text)
        assert body["usage"]["completion_tokens"] <= 24
    alone = tiny.answer([asked(questions[1], stop=stop[0])])[0]
    assert alone["choices"] == stopped[1]["choices"] and alone["usage"] == stopped[1]["usage"]


def test_requests_with_other_stop_strings_are_not_answered_together(tiny: Any) -> None:
    rows = [{"custom_id": str(i), "body": asked("1+1", **more)} for i, more in enumerate(({}, {"stop": ["0"]}, {}))]
    texts = [body["choices"][0]["message"]["content"] for _, body in tiny.stream(rows, 8)]
    assert texts[0] == texts[2] and "0" not in texts[1]


def test_words_that_are_no_setting_are_refused() -> None:
    assert parse_formats("") == parse_formats("post") == (POST,)
    assert parse_formats("pre, post") == parse_formats("pre") == (POST, PRE)
    with pytest.raises(ThinkSwitchError, match="'before' is not a format; use post, or post and pre"):
        parse_formats("post before")


GOOD = [request(f"p{i}", text=f"{i}+1") for i in range(3)]
ANSWERS = [answer(f"p{i}-s0", f"t\n</think>\n\n{i + 1}") for i in range(3)]


@pytest.mark.parametrize(
    ("options", "requests", "generations", "message"),
    [
        ({"folds": 1}, GOOD, ANSWERS, "FOLDS=1: give 2 or more"),
        ({"folds": 4}, GOOD, ANSWERS, "FOLDS=4, but .* has only 3 questions with a reference answer"),
        ({}, GOOD, [], "holds no complete answer"),
        ({}, [], ANSWERS, "holds no requests"),
        ({}, None, ANSWERS, r"requests\.jsonl does not exist; labels need"),
        ({}, GOOD, [answer("p0-s0", "t", finish="length")], "holds no complete answer"),
        ({}, GOOD, [answer("p0-s0", "</think>5")], "holds no complete answer .*1 no_trace"),
        ({}, GOOD, [{"no": "id"}], r"generations\.jsonl, line 1: `custom_id` is missing"),
        ({"formats": "both"}, GOOD, ANSWERS, "'both' is not a format; use post"),
        ({"engine": "http://127.0.0.1:1/v1"}, GOOD, ANSWERS, "does not have the adapters"),
        ({"generations": "none.jsonl"}, GOOD, ANSWERS, r"none\.jsonl does not exist"),
        ({"generations": ""}, GOOD, ANSWERS, "is not a run folder, so there are no generations .* `make iterate"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, write_jsonl: Write, options: dict[str, Any], requests: Any, generations: Any, message: str
) -> None:
    if requests is not None:
        write_jsonl("requests.jsonl", requests)
    given = {"folds": 2, "engine": "embedded", "generations": str(write_jsonl("generations.jsonl", generations))}
    # Without `demo` nothing has to be trained before the files are read.
    files.write_yaml(tmp_path / "plain.yaml", {"thinkswitch": {"pair": {"demo": False}}})
    overlays = [str(tmp_path / "plain.yaml")]
    with pytest.raises(ThinkSwitchError, match=message) as refused:
        formats = parse_formats(options.get("formats", ""))
        rest = {name: value for name, value in options.items() if name != "formats"}
        job = find_job("arithmetic", tmp_path / "runs", seed=0, overlays=overlays, **{**given, **rest})
        labels.make_labels(replace(job, formats=formats))
    assert "\n" not in str(refused.value)


def test_the_command_takes_the_settings_of_make(command: Any, tmp_path: Path) -> None:
    settings = ("FOLDS=1", "FORMATS=post pre", "GENERATIONS=mine.jsonl")
    shown = command("make", "--eval", "show: ; @env", "show", "DOMAIN=arithmetic", *settings).stdout.splitlines()
    assert {f"THINKSWITCH_{setting}" for setting in settings} <= set(shown)
    words = (BIN / "thinkswitch", "labels", "--domain", "arithmetic", "--runs", tmp_path)
    done = command(*words, THINKSWITCH_FOLDS="1", THINKSWITCH_GENERATIONS="")
    assert done.returncode == 1 and done.stderr.startswith("thinkswitch: FOLDS=1: give 2 or more")
    assert len(done.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_a_run_without_generations_or_with_another_seed_says_what_to_do(tmp_path: Path) -> None:
    values = {"domain": "arithmetic", "recipe": "recipes/arithmetic.yaml", "overlays": [], "seed": 3}
    files.write_json(tmp_path / "arithmetic" / "run.json", {**values, "engine": "embedded", "iterations": 1})
    with pytest.raises(ThinkSwitchError, match="was begun with SEED=3; give SEED=3"):
        find_job("arithmetic", tmp_path, seed=0, engine="embedded")
    with pytest.raises(ThinkSwitchError, match="has not finished the generations of iteration 1"):
        find_job("arithmetic", tmp_path, seed=3, engine="embedded")


# ---- real axolotl ----

QUESTIONS = 100


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 100 generations of the mixed domain, and an overlay that trains on them for one epoch."""
    from thinkswitch_plugin.demo import cache, mixed

    cache.ensure_pair(0, *(Path(f".cache/arithmetic/seed-0/{mode}") for mode in ("instruct", "thinking")))
    folder = tmp_path_factory.mktemp("material")
    mixed.write_training_files(folder, 0, count=QUESTIONS)
    one_answer = {"adaptive": {"samples": 1}}  # greedy, so that engines and repetitions can be compared
    files.write_yaml(folder / "short.overlay.yaml", {"num_epochs": 1, "thinkswitch": one_answer})
    return folder


def words(material: Path, runs: Path, *more: str) -> list[str | Path]:
    return [
        *(BIN / "thinkswitch", "labels", "--domain", "arithmetic-mixed", "--runs", runs, "--engine", "embedded"),
        *("--folds", "2", "--generations", material / "generations.jsonl"),
        *("--overlay", material / "short.overlay.yaml", *more),
    ]


@pytest.fixture(scope="module")
def labelled(
    material: Path, tmp_path_factory: pytest.TempPathFactory, forked: Any
) -> tuple[Path, dict[str, tuple[int, bytes]]]:
    """The folder of a labelling that was killed in the second fold and resumed; the state of the first fold at that time."""
    runs = tmp_path_factory.mktemp("runs")
    work = runs / "arithmetic-mixed" / "adaptive" / "seed-0" / "labels"
    first = subprocess.Popen(words(material, runs), cwd=ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 600
    while not (work / "fold-2" / "post" / "logs" / "train.log").is_file():
        assert first.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    first.kill()
    first.wait()
    before = state(work / "fold-1" / "post")
    assert not (work / "fold-2" / "post" / "adapter").exists() and not (work / "labels.jsonl").exists()
    again = forked(*words(material, runs))
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("$ ") == 1  # one training: that of the second fold
    return work, before


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file's time and content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_a_killed_cross_validation_goes_on_with_the_fold_it_was_killed_in(labelled: Any) -> None:
    work, before = labelled
    assert state(work / "fold-1" / "post") == before
    rows = [row for _, row in files.read_jsonl(work / "labels.jsonl")]
    asked_in = {
        prompt_id(row): number
        for number in (1, 2)
        for _, row in read_requests(work / f"fold-{number}" / "requests.jsonl")
    }
    assert {row["prompt_id"]: row["fold"] for row in rows} == asked_in and len(rows) == QUESTIONS
    for row in rows:
        assert row["label"] == (POST if row["post_correct"] else PRE) and row["reference_from"] == "majority"
        assert row["pre_correct"] is None
    result = files.read_json(work / "labels.json")
    assert result["labels"] == dict(Counter(row["label"] for row in rows)) | {
        form: sum(row["label"] == form for row in rows) for form in (POST, PRE)
    }
    assert [fold["post"]["right"] for fold in result["folds"]] == [
        sum(row["post_correct"] for row in rows if row["fold"] == number) for number in (1, 2)
    ]
    config = files.read_yaml(work / "fold-1" / "post" / "axolotl.yaml")
    assert config["datasets"][0]["type"] == "thinkswitch_plugin.post_thinking" and config["num_epochs"] == 1


@pytest.mark.slow
def test_only_the_folds_that_learnt_from_a_changed_rationale_are_trained_again(
    labelled: Any, material: Path, tmp_path: Path, forked: Any
) -> None:
    work, _ = labelled
    runs = tmp_path / "moved"
    shutil.copytree(work.parents[3], runs, symlinks=True)
    here = runs / work.relative_to(work.parents[3])
    changed = tmp_path / "material"
    shutil.copytree(material, changed)
    unchanged = forked(*words(changed, runs))
    assert unchanged.returncode == 0 and "$ " not in unchanged.stdout  # nothing is trained, also after a move

    of_fold_1 = prompt_id(next(row for _, row in read_requests(here / "fold-1" / "requests.jsonl")))
    rows = [row for _, row in files.read_jsonl(changed / "generations.jsonl")]
    for row in rows:
        if row["custom_id"] == f"{of_fold_1}-s0":
            message = row["response"]["body"]["choices"][0]["message"]
            message["content"] = message["content"].replace("</think>", "0=0\n</think>")
    (changed / "generations.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    before = {number: state(here / f"fold-{number}" / "post" / "adapter") for number in (1, 2)}
    again = forked(*words(changed, runs))
    assert again.returncode == 0 and again.stdout.count("$ ") == 1, again.stdout
    after = {number: state(here / f"fold-{number}" / "post" / "adapter") for number in (1, 2)}
    assert after[1] == before[1] and after[2] != before[2]


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(servers.vllm_python() is None, reason="vLLM is not installed: make setup-vllm")
def test_vllm_with_the_adapter_answers_as_transformers_does(labelled: Any, tmp_path: Path) -> None:
    work, _ = labelled
    fold = work / "fold-1"
    out = tmp_path / "generations.jsonl"
    keys = EngineKeys.model_validate({})
    here = Hashes(tmp_path)
    adapter = fold / "post" / "adapter"
    trained = training.Trained(work.parent / "student", adapter)
    training.answer(trained, fold / "requests.jsonl", out, engine="vllm", keys=keys, hashes=here)
    served, embedded = (dict(labels.completions(path)) for path in (out, fold / "post" / "generations.jsonl"))
    assert served == embedded and len(served) == QUESTIONS // 2
