from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BIN
from thinkswitch_plugin import files
from thinkswitch_plugin.conventions import CONVENTIONS, Convention
from thinkswitch_plugin.data import traces
from thinkswitch_plugin.data.batch import Asked
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging import score

Write = Callable[[str, Sequence[object]], Path]
OUTPUTS = Path("../shared/data/outputs")


def judged(path: Path, kind: str = "integer", opened: bool = False) -> list[dict[str, Any]]:
    return [one for group in score.verdicts(kind, path, Asked(opened)) for one in group]


def test_rows_of_every_format_are_judged_in_order(write_jsonl: Write, tmp_path: Path, command: Any) -> None:
    rows = [
        {"raw": "<think>1+1</think>\\boxed{055}", "gold": "55"},
        {"raw": None, "reasoning": "r", "content": "The answer is 16.", "gold": "016"},
        {"raw": "\\boxed{7}", "gold": 8.0},
        {"raw": "<think>\\boxed{9}", "gold": "9"},
        {"raw": "t</think>no idea", "gold": "9"},
        {"raw": None, "reasoning": "r", "content": None, "finish_reason": "length", "gold": "1"},
        {"raw": "t</think>\\boxed{3}"},
        {"custom_id": "a", "response": {"body": {"choices": [{"message": {"content": "\\boxed{4}"}}]}}, "gold": 4},
        {"custom_id": "b", "response": None, "error": {"message": "x"}, "gold": 4},
        {"resps": [["t</think>5", "6"]], "target": "5"},
    ]
    path = write_jsonl("outputs.jsonl", rows)
    out = tmp_path / "verdicts.jsonl"
    done = command(BIN / "thinkswitch", "score", "--task", "aime", path, "--rows", out)
    assert done.returncode == 0, done.stderr
    assert "| correct | 4 |" in done.stdout
    found = [row for _, row in files.read_jsonl(out)]
    assert [(v["correct"], v["answer"], v["reason"]) for v in found[:9]] == [
        (True, "55", "complete"),
        (True, "16", "complete"),
        (False, "7", "complete"),
        (False, None, "unclosed_trace"),
        (False, None, "no_readable_answer"),
        (False, None, "unclosed_trace"),
        (None, "3", "complete"),
        (True, "4", "complete"),
        (False, None, "failed"),
    ]
    assert [v["correct"] for v in found[9]["samples"]] == [True, False]
    assert [(v["complete"], v["has_trace"]) for v in found[:4]] == [
        (True, True),
        (True, True),
        (True, False),
        (False, True),
    ]


def test_text_without_a_tag_is_an_answer_unless_the_template_opened_the_trace(write_jsonl: Write) -> None:
    path = write_jsonl("o.jsonl", [{"raw": "\\boxed{5}", "gold": "5"}])
    assert judged(path)[0]["correct"] is True
    assert judged(path, opened=True)[0] == {
        "correct": False,
        "answer": None,
        "complete": False,
        "has_trace": True,
        "reason": "unclosed_trace",
    }


def test_an_unclosed_trace_in_content_is_none_the_less(write_jsonl: Write) -> None:
    rows = [
        {"content": "so the count is 7", "gold": "7"},
        {"reasoning": "a trace", "content": "7", "gold": "7"},
        {"reasoning": "", "content": "so the count is 7", "gold": "7"},
    ]
    path = write_jsonl("outputs.jsonl", rows)
    assert [v["reason"] for v in judged(path, opened=True)] == ["unclosed_trace", "complete", "unclosed_trace"]
    assert [v["reason"] for v in judged(path)] == ["complete"] * 3


def test_of_an_unfinished_answer_only_what_was_stated_as_final_counts(write_jsonl: Write) -> None:
    texts = [
        "t</think>so \\boxed{12} is",
        "t</think>the answer is 12",
        "**12** is it. Let me check",
        "Final answer: 12\nSo",
    ]
    for reason in ("length", "content_filter", "error", "max_tokens"):
        rows = [{"raw": text, "finish_reason": reason, "gold": "12"} for text in texts]
        found = judged(write_jsonl("o.jsonl", rows))
        assert [v["correct"] for v in found] == [True, False, False, True]
        assert not any(v["complete"] for v in found)
        assert {v["reason"] for v in found} == {"answer_cut" if reason == "length" else reason}
    for reason in ("stop", None):
        rows = [{"raw": text, "finish_reason": reason, "gold": "12"} for text in texts]
        assert all(v["correct"] and v["complete"] for v in judged(write_jsonl("o.jsonl", rows)))


@pytest.mark.parametrize("each", CONVENTIONS, ids=lambda each: each.name)
def test_nothing_inside_a_trace_counts_in_any_convention(each: Convention, write_jsonl: Write) -> None:
    openings = [entry.replace("…", "") for entry in each.opens]
    closings = [entry.replace("…", "") for entry in each.closes]
    cut = [{"raw": f"{opening}Maybe \\boxed{{7}}. Let me", "gold": "7"} for opening in openings]
    cut += [{**row, "finish_reason": "length"} for row in cut]
    whole = [{"raw": f"{openings[0]}so \\boxed{{7}}\n{closing}42", "gold": "42"} for closing in closings]
    for name in (None, each):
        found = verdicts(write_jsonl("o.jsonl", cut), name)
        assert all(v["answer"] is None and v["correct"] is False for v in found)
        if whole:
            found = verdicts(write_jsonl("o.jsonl", whole), name)
            assert all(v["answer"] in ("42", None) and v["has_trace"] for v in found)
            assert found[0]["correct"] is True


def test_nothing_inside_a_trace_of_an_unknown_tag_counts(write_jsonl: Write) -> None:
    rows = [{"raw": "<my-thinking>Maybe \\boxed{7}. Let me", "gold": "7"}]
    assert judged(write_jsonl("o.jsonl", rows))[0]["answer"] is None


def test_a_convention_of_ones_own_is_named_by_what_opens_and_closes_a_trace(
    write_jsonl: Write, tmp_path: Path, command: Any
) -> None:
    path = write_jsonl("o.jsonl", [{"raw": "[[T]]maybe \\boxed{7}[[/T]]8", "gold": "8"}])
    own = ("--trace-open", "[[T]]", "--trace-close", "[[/T]]", "--rows", tmp_path / "v.jsonl")
    assert command(BIN / "thinkswitch", "score", "--kind", "integer", *own, path).returncode == 0
    assert [row["answer"] for _, row in files.read_jsonl(tmp_path / "v.jsonl")] == ["8"]
    with pytest.raises(ThinkSwitchError, match="`--trace` is 'harmoni', and the nearest convention is 'harmony'"):
        score.convention_named(["harmoni"], None, None)
    with pytest.raises(ThinkSwitchError, match="Give `--trace-open` and `--trace-close` together"):
        score.convention_named([], "x", None)
    with pytest.raises(ThinkSwitchError, match="in one convention"):
        score.convention_named(["think"], "x", "y")


def test_a_gold_answer_that_cannot_be_read_is_no_wrong_answer(write_jsonl: Write, capsys: Any) -> None:
    rows = [
        {"raw": "\\boxed{8}", "gold": "\\frac{8}{21}"},
        {"raw": "\\boxed{8}", "gold": "8"},
        {"raw": "\\boxed{8}", "gold": "9"},
        {"raw": "\\boxed{8}"},
    ]
    path = write_jsonl("o.jsonl", rows)
    found = judged(path)
    assert [v["correct"] for v in found] == [None, True, False, None]
    assert [v.get("gold_not_read") for v in found] == ["\\frac{8}{21}", None, None, None]
    score.score_file("integer", path, None, Asked())
    shown = capsys.readouterr().out
    for line in ("| with a gold answer | 2 |", "| gold not read | 1 |", "| correct | 1 | 50.0 % |"):
        assert line in shown
    assert "cannot be read as `integer`" in shown


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("aime", "integer"),
        ("thinkswitch_aime_k64", "integer"),
        ("aime_matharena", "matharena"),
        ("pubmedqa_full", "decision"),
        ("arithmetic", "digit"),
        ("template", "exact"),
    ],
)
def test_a_task_is_read_as_it_grades(task: str, kind: str) -> None:
    assert score.kind_of(task, None) == kind


def test_a_task_of_ones_own_needs_one_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = tmp_path / "lm_eval_tasks"
    tasks.mkdir()
    (tasks / "mine.yaml").write_text("task: mine\nprocess_results: !function thinkswitch_tasks.grade_integer\n")
    (tasks / "other.yaml").write_text("task: other\nprocess_results: !function mine.score\n")
    monkeypatch.chdir(tmp_path)
    assert score.kind_of("mine", None) == "integer"
    with pytest.raises(ThinkSwitchError, match="'other' grades by a function of its own; use `--kind KIND`"):
        score.kind_of("other", None)
    with pytest.raises(ThinkSwitchError, match="There is no task 'nothing'"):
        score.kind_of("nothing", None)


def test_letters_follow_the_options_of_the_row(write_jsonl: Write) -> None:
    rows = [
        {"raw": "B", "gold": "maybe", "options": {"A": "yes", "B": "maybe", "C": "no"}},
        {"raw": "B", "gold": "no"},
        {"raw": "B", "gold": "maybe", "note": 'options={"A": "yes", "B": "maybe", "C": "no"} x'},
    ]
    assert all(v["correct"] for v in judged(write_jsonl("o.jsonl", rows), "decision"))


@pytest.mark.parametrize(
    ("row", "message"),
    [({"text": "5"}, "line 1: the row has none of `raw`"), ({"raw": 5}, "line 1: `raw` must be text, found int")],
)
def test_a_row_of_no_known_format_is_named(write_jsonl: Write, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ThinkSwitchError, match=message):
        judged(write_jsonl("o.jsonl", [row]))


def verdicts(path: Path, convention: Convention | None) -> list[dict[str, Any]]:
    return [one for group in score.verdicts("integer", path, Asked(convention=convention)) for one in group]


@pytest.mark.skipif(not OUTPUTS.is_dir(), reason="the real outputs are not here")
@pytest.mark.parametrize(
    ("name", "agree", "graded"),
    [
        ("skythought_aime24", 200, 200),
        ("lrm_token_economy_aime", 271, 271),
        ("misc_tag_variety", 42, 45),  # the publisher counts 90 as wrong where the gold answer is 90^\\circ
    ],
)
@pytest.mark.parametrize("kind", ["integer", "matharena"])
def test_real_outputs_agree_with_their_publishers(name: str, agree: int, graded: int, kind: str) -> None:
    path = OUTPUTS / f"{name}.jsonl"
    published = [row["publisher_correct"] for _, row in files.read_jsonl(path)]
    pairs = [(p, v["correct"]) for p, v in zip(published, judged(path, kind), strict=True)]
    pairs = [(p, v) for p, v in pairs if p is not None and v is not None]
    assert (sum(p == v for p, v in pairs), len(pairs)) == (agree, graded)


@pytest.mark.skipif(not OUTPUTS.is_dir(), reason="the real outputs are not here")
@pytest.mark.parametrize("path", sorted(OUTPUTS.glob("*.jsonl")), ids=lambda p: p.stem)
def test_no_trace_text_is_in_any_answer_of_real_outputs(path: Path) -> None:
    seen = 0
    for number, row in files.read_jsonl(path):
        for done in score.completions_of(row, f"line {number}", Asked()):
            if done.complete and done.answer:
                seen += 1
                assert not traces.has_tag(done.answer)
                if done.trace and len(done.trace) > 200:
                    assert done.trace[-200:] not in done.answer
    assert seen > 20
