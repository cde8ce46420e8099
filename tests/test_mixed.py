"""The demo domain `arithmetic-mixed`: its questions, its teacher, its files, and its lm-eval task."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT
from thinkswitch_plugin import files
from thinkswitch_plugin.data import pairs
from thinkswitch_plugin.data.contamination import overlaps
from thinkswitch_plugin.demo import cache, mixed, task
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.recipe import load_recipe

SEEDS = st.integers(0, 50)


def test_held_out_questions_are_fixed_and_of_every_stratum() -> None:
    held_out = mixed.held_out()
    assert held_out == mixed.held_out() and len(set(held_out)) == 660
    assert held_out[:3] == ["9*5+3+5+5", "4*8+5+7+4", "0-9*0*1"]
    counts = Counter((mixed.stratum(q), mixed.operands(q)) for q in held_out)
    assert {length for _, length in counts} == {2, 3, 4, 5, 6}
    for length in (4, 5, 6):
        assert counts["easy", length] == counts["hard", length] == 66
    assert (counts["short", 2], counts["short", 3]) == (66, 198)


@settings(max_examples=5)
@given(seed=SEEDS)
def test_training_questions_are_distinct_and_never_held_out(seed: int) -> None:
    questions = mixed.training_questions(seed)
    assert len(set(questions)) == 2000 and not set(questions) & set(mixed.held_out())
    assert questions != mixed.training_questions(seed + 1)
    # What `make iterate` asks of any domain, by the same function.
    assert not overlaps([(q, q) for q in questions], mixed.held_out(), n=13, share=0.2)


@given(seed=SEEDS, length=st.integers(2, 6), easy=st.booleans())
def test_a_question_is_of_the_length_and_stratum_it_was_drawn_for(seed: int, length: int, easy: bool) -> None:
    question = mixed.draw(random.Random(seed), length, easy=easy and length >= 4)
    assert mixed.operands(question) == length == len(task.steps(question)) + 1
    zero = any(step[1:3] == "*0" for step in task.steps(question)[-2:])
    assert mixed.stratum(question) == ("short" if length < 4 else "easy" if zero else "hard")


def test_a_step_of_the_teacher_is_wrong_in_a_quarter_of_the_cases_and_the_answer_never(tmp_path: Path) -> None:
    mixed.write_training_files(tmp_path, 0)
    report = pairs.PairReport()
    rows = list(
        pairs.build_pairs(tmp_path / "requests.jsonl", tmp_path / "generations.jsonl", keep_trace=True, report=report)
    )
    assert report.kept == report.samples == 2000
    wrong = steps = 0
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        assert answer == task.answer(question)
        value = question[0]
        lines = row["trace"].splitlines()
        for line, step in zip(lines, range(1, len(question), 2), strict=True):
            assert line[:-2] == value + question[step : step + 2]  # a wrong result is carried on
            value = line[-1]
            steps, wrong = steps + 1, wrong + (value != task.answer(line[:3]))
    # About 6,200 steps: a third within four standard errors.
    assert steps > 5500 and abs(wrong / steps - mixed.NOISE) < 0.025


def test_the_files_are_made_once_and_made_again_when_a_setting_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[int] = []
    monkeypatch.setattr(cache, "ensure_pair", lambda seed, instruct, thinking: made.append(seed))
    monkeypatch.chdir(tmp_path)
    keys = load_recipe(ROOT / "recipes" / "arithmetic-mixed.yaml").keys
    cache.ensure(keys, 3)
    folder = tmp_path / ".cache" / "arithmetic-mixed" / "seed-3"
    assert made == [3]
    first = (folder / "generations.jsonl").stat()
    assert files.read_json(folder / "settings.json")["noise"] == mixed.NOISE
    cache.ensure(keys, 3)
    assert (folder / "generations.jsonl").stat().st_mtime_ns == first.st_mtime_ns
    before = (folder / "generations.jsonl").read_bytes()
    monkeypatch.setattr(mixed, "NOISE", 0.5)
    cache.ensure(keys, 3)
    assert files.read_json(folder / "settings.json")["noise"] == 0.5
    assert (folder / "generations.jsonl").read_bytes() != before
    (folder / "settings.json").unlink()
    with pytest.raises(ThinkSwitchError, match="contains files that the demo domain did not create"):
        cache.ensure(keys, 3)


@pytest.fixture
def grade(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "lm_eval_tasks"))
    import thinkswitch_tasks

    yield thinkswitch_tasks.grade_arithmetic_mixed
    sys.modules.pop("thinkswitch_tasks", None)


@pytest.mark.parametrize(
    ("text", "accuracy", "think", "answered"),
    [
        ("<answer>5", 1, 0, 1),
        ("<answer>4", 0, 0, 1),
        ("<answer>", 0, 0, 0),
        ("<think>\n2+3=5\n</think>\n\n5", 1, 1, 1),
        ("<think>\n2+3=5\n", 0, 1, 0),
        ("5", 1, 0, 1),  # a checkpoint of the loop, which knows no format
        ("2+3=5\n</think>\n\n5", 1, 1, 1),
        ("", 0, 0, 0),
    ],
)
def test_the_task_reads_both_formats(grade: Any, text: str, accuracy: int, think: int, answered: int) -> None:
    found = grade({"question": "2+3", "answer": "5", "stratum": "short"}, [text])
    assert found == {
        "accuracy": accuracy, "think_share": think, "answered": answered, "accuracy_short": accuracy,
    }  # fmt: skip


def test_lm_eval_means_a_stratum_over_its_own_questions(tmp_path: Path) -> None:
    """The real lm-eval on a model that always answers 0: right on the easy questions that end in `*0`."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class AlwaysZero(LM):
        def generate_until(self, requests: list[Any]) -> list[str]:
            return ["<answer>0" for _ in requests]

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            raise NotImplementedError

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError

    name = "thinkswitch_arithmetic_mixed"
    manager = TaskManager(include_path=str(ROOT / "lm_eval_tasks"), include_defaults=False)
    results = simple_evaluate(model=AlwaysZero(), tasks=[name], task_manager=manager, bootstrap_iters=0)
    assert results is not None
    found = {key.removesuffix(",none"): value for key, value in results["results"][name].items()}
    rows = mixed.rows()
    assert found["accuracy"] == pytest.approx(sum(r["answer"] == "0" for r in rows) / 660)
    for stratum in mixed.STRATA:
        own = [r["answer"] == "0" for r in rows if r["stratum"] == stratum]
        assert found[f"accuracy_{stratum}"] == pytest.approx(sum(own) / len(own))
    assert (found["think_share"], found["answered"]) == (0, 1)
