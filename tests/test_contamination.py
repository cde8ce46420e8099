from __future__ import annotations

import shutil
from pathlib import Path

import orjson
import pytest

from tests.conftest import ROOT
from thinkswitch_plugin.args import EvaluationKeys
from thinkswitch_plugin.data import contamination
from thinkswitch_plugin.demo import task
from thinkswitch_plugin.errors import ThinkSwitchError

TEXT = "A committee of five is chosen from seven men and six women so that at least two women sit on it"
END = " Please reason step by step, and put your final answer within the box at the end of it."


def ids(prompts: list[str], questions: list[str]) -> list[str]:
    named = [(str(i), text) for i, text in enumerate(prompts)]
    return [o.prompt_id for o in contamination.overlaps(named, questions, n=8, share=0.2)]


def test_equal_texts_are_found_whatever_their_case_and_spacing() -> None:
    assert ids([TEXT.upper().replace(" ", "  ")], [TEXT]) == ["0"]
    assert ids(["7*3+4"], ["7+3*4"]) == []


def test_a_question_inside_another_text_is_found() -> None:
    assert ids([f"Consider this: {TEXT}. In how many ways?", "Something else altogether"], [TEXT]) == ["0"]


def test_a_short_question_inside_a_prompt_is_found() -> None:
    assert ids(["Hint first. What is the capital of France?"], ["What is the capital of France?"]) == ["0"]


def test_a_question_contained_whole_counts_more_than_a_long_one_shared_in_part() -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    long_one = " ".join([*words, *(f"w{i}" for i in range(200))])
    assert ids([f"{' '.join(words[:9])} then other things entirely here now"], [long_one, " ".join(words[:9])]) == ["0"]


def test_the_tasks_own_wording_does_not_count() -> None:
    questions = [f"Question number {i} is about the {w} of things.{END}" for i, w in enumerate("abcdef")]
    assert ids([f"Another matter.{END}"], questions) == []


def test_a_training_prompt_from_the_evaluation_set_stops_the_run_and_is_shown() -> None:
    keys = EvaluationKeys.model_validate({"task": "thinkswitch_arithmetic"})
    clean = [(f"p{i}", q) for i, q in enumerate(task.training_prompts(0, 20))]
    contamination.require_uncontaminated(clean, keys)
    leaked = task.held_out()[3]
    with pytest.raises(ThinkSwitchError, match=r"1 training prompt\(s\) overlap") as caught:
        contamination.require_uncontaminated([*clean, ("leak", leaked)], keys)
    assert f"prompt leak and question 3 (100 % shared): '{leaked}'" in str(caught.value)


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ThinkSwitchError, match="lm-eval knows no task 'thinkswitch_nothing'"):
        contamination.evaluation_questions("thinkswitch_nothing")


def test_a_gold_answer_that_the_task_cannot_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = tmp_path / "lm_eval_tasks"
    tasks.mkdir()
    shutil.copy(ROOT / "lm_eval_tasks" / "thinkswitch_tasks.py", tasks)
    text = (ROOT / "lm_eval_tasks" / "thinkswitch_template.yaml").read_text().replace("grade_exact", "grade_integer")
    text = text.replace("thinkswitch_template", "mine").replace("recipes/template/test.jsonl", "test.jsonl")
    (tasks / "mine.yaml").write_text(text)
    rows = [{"prompt": "a", "answer": "8"}, {"prompt": "b", "answer": r"\frac{8}{21}"}]
    (tmp_path / "test.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ThinkSwitchError, match=r"Question 1 of lm-eval's task mine .* cannot be read as `integer`"):
        contamination.evaluation_questions("mine")
