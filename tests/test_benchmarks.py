"""The tasks for AIME 2025, GPQA Diamond and IFEval: rows, grading, and what is refused before anything is generated."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from thinkswitch_plugin import files
from thinkswitch_plugin.args import EvaluationKeys
from thinkswitch_plugin.data import answers, benchmarks
from thinkswitch_plugin.data.traces import split
from thinkswitch_plugin.errors import ThinkSwitchError, not_fetched
from thinkswitch_plugin.judging.evaluation import Sampling, load_task
from thinkswitch_plugin.judging.samples import read_rows
from thinkswitch_plugin.judging.verdict import verdict_on

GPQA = {"Question": "Which?", "Correct Answer": "helium", **{f"Incorrect Answer {n}": f"gas {n}" for n in (1, 2, 3)}}
IFEVAL: dict[str, Any] = {
    "key": 1,
    "prompt": "Name a gas, without commas.",
    "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
    "kwargs": [{"keywords": None}, {"keywords": ["helium"]}],
}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The functions beside the task files, with local data."""
    monkeypatch.setenv("LOCAL_RANK", "1")  # lm-eval downloads nothing for NLTK
    monkeypatch.setenv("THINKSWITCH_DATA", str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT / "lm_eval_tasks"))
    import thinkswitch_tasks

    yield thinkswitch_tasks
    sys.modules.pop("thinkswitch_tasks", None)


def write(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    (folder / f"{name}.jsonl").write_bytes(b"".join(files.dumps_line(row) for row in rows))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"So it is \boxed{C}.", "C"),
        (r"So it is \boxed{\text{(B)}}", "B"),
        ("Helium is lighter.\n\n**Answer: D. helium**", "D"),
        ("The correct answer is (A), because it is inert.", "A"),
        ("The answer is no.", None),
        ("A gas is lighter than air", None),
        ("", None),
    ],
)
def test_the_letter_of_an_option_is_read(text: str, letter: str | None) -> None:
    assert answers.extract("choice", text) == letter


def test_the_options_of_a_gpqa_question_have_one_order_and_the_right_letter(tasks: Any, tmp_path: Path) -> None:
    others = [{**GPQA, "Question": f"Which of these is number {n}?"} for n in range(40)]
    write(tmp_path, "gpqa_diamond", GPQA, *others)
    docs = tasks.gpqa_diamond_dataset()["test"]
    assert all(doc["choices"]["ABCD".index(doc["answer"])] == "helium" for doc in docs)
    assert set(docs["answer"]) == set("ABCD")
    assert docs[0] == tasks.gpqa_diamond_dataset()["test"][0]
    reported = tasks.grade_choice(docs[0], [f"<think>\\boxed{{X}}</think>\\boxed{{{docs[0]['answer']}}}", r"\boxed{X}"])
    assert (reported["mean@k"], reported["pass@k"], reported["think_ratio"]) == (0.5, 1.0, [1, 2])


def test_ifeval_is_graded_on_the_answer_without_its_trace(tasks: Any, tmp_path: Path) -> None:
    write(tmp_path, "ifeval", IFEVAL)
    doc = tasks.ifeval_dataset()["test"][0]
    texts = ["<think>Well, neon, or …</think>helium", "helium, or neon", "<think>helium", "neon"]
    assert tasks.grade_instructions(doc, texts)["mean@k"] == 0.25
    gold = answers.gold("instructions", doc["answer"])
    assert gold and [verdict_on("instructions", split(text), gold).correct for text in texts] == [
        True,
        False,
        False,
        False,
    ]
    assert answers.gold("instructions", "helium") is None


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("aime25", {"problem": "p", "answer": "many"}, r"aime25\.jsonl, line 1: `answer` cannot be used"),
        ("gpqa_diamond", {"Question": "q"}, r"line 1: `Correct Answer` is missing"),
        ("ifeval", {**IFEVAL, "kwargs": [{}]}, r"row 1: `kwargs` must have one entry for each"),
        (
            "ifeval",
            {**IFEVAL, "instruction_id_list": ["a:b", "c:d"]},
            r"row 1: lm-eval does not know the instruction 'a:b'",
        ),
    ],
)
def test_a_row_that_cannot_be_graded_is_named_before_anything_is_generated(
    name: str, row: dict[str, Any], message: str, tasks: Any, tmp_path: Path
) -> None:
    write(tmp_path, name, row)
    with pytest.raises(ThinkSwitchError, match=message):
        load_task(EvaluationKeys(task=f"thinkswitch_{name}"), Sampling())


def test_missing_libraries_of_ifeval_and_of_nltk_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    def nothing(name: str) -> None:
        raise LookupError(name)

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(nltk.data, "find", nothing)
    sentences = {**IFEVAL, "instruction_id_list": ["length_constraints:number_sentences"], "kwargs": [{}]}
    with pytest.raises(ThinkSwitchError, match=r"python -m nltk\.downloader punkt_tab"):
        benchmarks.require_checkable([("row 1", sentences)])
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.ifeval.instructions_registry", None)
    with pytest.raises(ThinkSwitchError, match=r"pip install 'lm_eval\[ifeval\]'"):
        benchmarks.require_checkable([])


def test_a_gated_set_says_how_to_get_access() -> None:
    error = ValueError(
        "Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub. You must be authenticated to access it."
    )
    assert "accept its terms on its page at huggingface.co" in str(not_fetched("The dataset Idavidrein/gpqa", error))


def test_a_task_that_cannot_be_loaded_or_is_a_group_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "lm_eval_tasks"
    folder.mkdir()
    text = (ROOT / "lm_eval_tasks" / "thinkswitch_template.yaml").read_text(encoding="utf-8")
    (folder / "thinkswitch_tasks.py").symlink_to(ROOT / "lm_eval_tasks" / "thinkswitch_tasks.py")
    (folder / "mine.yaml").write_text(text.replace("thinkswitch_template", "mine").replace("test.jsonl", "no.jsonl"))
    (folder / "good.yaml").write_text(text.replace("thinkswitch_template", "good"))
    (folder / "many.yaml").write_text("group: many\ntask: [good]\n")
    (tmp_path / "recipes" / "template").mkdir(parents=True)
    write(tmp_path / "recipes" / "template", "test", {"prompt": "a", "answer": "8"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ThinkSwitchError, match=r"The questions of lm-eval's task mine cannot be loaded: .*no\.jsonl"):
        load_task(EvaluationKeys(task="mine"), Sampling())
    with pytest.raises(ThinkSwitchError, match="many is a group of lm-eval tasks; name one task of it"):
        load_task(EvaluationKeys(task="many"), Sampling())


def test_a_task_with_several_filters_counts_each_question_once(tmp_path: Path) -> None:
    row = {
        "doc_id": 0,
        "doc": {},
        "target": "#### 4",
        "resps": [["4"]],
        "arguments": {"gen_args_0": {"arg_0": "", "arg_1": {}}},
    }
    path = tmp_path / "samples.jsonl"
    path.write_bytes(
        b"".join(files.dumps_line({**row, "filter": name}) for name in ("strict-match", "flexible-extract"))
    )
    assert [found.doc_id for found in read_rows(path)] == [0]
