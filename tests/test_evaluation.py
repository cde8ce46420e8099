from __future__ import annotations

import itertools
import math
from pathlib import Path
from statistics import mean

import pytest

from thinkswitch_plugin.data.batch import Asked
from thinkswitch_plugin.data.traces import split
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.figures import Sample, interval, pass_at_k, question_metrics, summarize
from thinkswitch_plugin.judging.samples import Ended, Row, grade_question, samples_file
from thinkswitch_plugin.judging.verdict import Answered, verdict_on
from thinkswitch_plugin.report import parts_table


def sample(correct: list[bool], found: list[str | None] | None = None, tokens: int = 5, cut: bool = False) -> Sample:
    k = len(correct)
    return Sample(0, correct, found or [str(c) for c in correct], [True] * k, [tokens] * k, [cut] * k)


def test_pass_at_k_equals_counting_all_subsets() -> None:
    for n, correct, k in ((5, 2, 3), (6, 1, 2), (4, 0, 4), (4, 4, 1)):
        subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
        assert pass_at_k(n, correct, k) == pytest.approx(mean(any(s) for s in subsets))


def test_interval_of_one_sample_a_question_is_wilsons() -> None:
    z = 1.959963984540054
    for right, n in ((10, 30), (0, 30), (30, 30), (300, 400)):
        p = right / n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        means = [1.0] * right + [0.0] * (n - right)
        assert interval(means, 1) == pytest.approx([centre - half, centre + half], abs=1e-12)


def test_an_interval_of_several_samples_a_question_is_never_a_point() -> None:
    for value in (0.0, 1.0):
        assert interval([value] * 30, 8) == interval([value] * 30, 1)
    assert interval([1.0] * 30, 8)[0] == pytest.approx(0.8865, abs=1e-3)


def test_a_text_that_comes_near_its_budget_was_cut_in_every_mode() -> None:
    texts = [("So far the count is 113", 8190), ("So far the count is 113", 8000), ("It is \\boxed{113}", 8190)]
    row = Row(0, {}, "113", [text for text, _ in texts], "", {"max_gen_toks": 8192})
    found = grade_question(row, [Ended.estimated(n, row.budget) for _, n in texts], "integer", Asked())
    assert found.truncated == [True, False, True] and found.tokens == [8190, 8001, 8190]
    assert found.correct == [False, True, True]  # what stands in a box was said before the cut
    assert Ended.estimated(8, 9) == (None, 9)


def test_summary_of_several_samples_a_question() -> None:
    figures = summarize(
        [
            sample([True, False, True], ["4", "5", "4"]),
            sample([False, False, True], ["1", "1", "2"]),
        ]
    )
    assert figures["mean@k"] == pytest.approx(0.5)
    assert figures["pass@k"] == 1.0
    assert figures["vote@k"] == 0.5
    low, high = figures["ci95"]
    assert 0.3 <= low <= 0.5 <= high <= 0.7


def test_questions_that_name_their_stratum_are_also_summed_up_by_it() -> None:
    def row(number: int, answer: str, **doc: str) -> Row:
        return Row(number, {"question": "?", **doc}, "4", [answer], "", {})

    rows = [row(0, "4", stratum="easy"), row(1, "5", stratum="hard"), row(2, "4", stratum="hard")]
    ended = [Ended("stop", 2)]
    graded = [grade_question(one, ended, "exact", Asked()) for one in rows]
    assert summarize(graded)["strata"] == {"easy": {"n": 1, "mean@k": 1.0}, "hard": {"n": 2, "mean@k": 0.5}}
    assert "strata" not in summarize([grade_question(row(0, "4"), ended, "exact", Asked())])


def test_parts_of_the_questions_become_a_table_of_the_report_if_there_are_any() -> None:
    parts = {"easy": {"n": 1, "mean@k": 1.0}, "hard_novel": {"n": 2, "mean@k": 0.5}}
    table = parts_table(
        {"iterations": [{"iteration": 0, "instruct": {"strata": parts}, "thinking": {"strata": parts}}]}
    )
    assert table.header == ("iteration", "checkpoint", "easy (1)", "hard novel (2)")
    assert table.rows == [["0", "instruct", "100.0 %", "50.0 %"], ["0", "thinking", "100.0 %", "50.0 %"]]
    assert not parts_table({"iterations": [{"iteration": 0, "instruct": {}, "thinking": {}}]}).rows


def test_cut_completions_are_left_out_of_the_think_ratio() -> None:
    whole, cut = sample([True]), Sample(1, [False], [None], [False], [64], [True])
    figures = summarize([whole, cut])
    assert figures["think_ratio"] == 1.0
    assert figures["truncated"] == 0.5
    assert figures["answered"] == 0.5


def test_grading_reads_only_what_follows_the_trace() -> None:
    assert verdict_on("digit", split("7*3=1\n</think>\n\n1", opened=True), "1").correct
    assert verdict_on("digit", split("1", opened=True), "1").answer is None
    assert verdict_on("digit", split("1"), "1").correct
    assert verdict_on("digit", split("<think>1</think>"), "1").answer is None


def test_lm_evals_think_ratio_is_the_reports_and_leaves_out_what_was_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend("lm_eval_tasks")
    from thinkswitch_tasks import grade_digit, think_ratio

    how = Asked(opened=True)
    ends = [("1+1=2</think>2", "stop"), ("1+1=2</think>2", "stop"), ("1+1=", "length"), ("2", "stop")]
    answered = [Answered.of(text, how.split({"content": text}, finish)) for text, finish in ends]
    golds = ({"question": "1+1", "answer": "2"}, {"question": "1+2", "answer": "3"})
    reported = [grade_digit(doc, [texts]) for doc, texts in zip(golds, (answered[:3], answered[1:]), strict=True)]
    assert [one["think_ratio"] for one in reported] == [[2, 2], [1, 2]]
    rows = [
        Row(n, {}, doc["answer"], list(texts), "", {})
        for n, (doc, texts) in enumerate(zip(golds, (answered[:3], answered[1:]), strict=True))
    ]
    ended = [[Ended(finish, 1) for _, finish in part] for part in (ends[:3], ends[1:])]
    figures = summarize([grade_question(row, end, "digit", how) for row, end in zip(rows, ended, strict=True)])
    assert think_ratio([one["think_ratio"] for one in reported]) == figures["think_ratio"] == 3 / 4
    assert sum(one["mean@k"] for one in reported) / 2 == figures["mean@k"]
    assert think_ratio([[0, 0]]) == 0
    assert question_metrics("digit", ["<think>1+1"], "2")["think_ratio"] == [0, 1], "by the text alone nothing is cut"


def test_every_reader_of_samples_names_the_row_that_is_none(tmp_path: Path) -> None:
    from experiments.adaptive_scoring import read_questions
    from thinkswitch_plugin.report.questions import asked_texts

    path = tmp_path / "samples_x_2026-01-02T03-04-06.jsonl"
    (tmp_path / "results_2026-01-02T03-04-06.json").write_text('{"configs": {}}')
    for row in (
        '{"doc_id": 4, "resps": []}',
        '{"doc_id": 4, "doc": {}, "target": 1, "resps": [[]], "arguments": {"gen_args_0": {"arg_0": "", "arg_1": {}}}}',
    ):
        path.write_text(row)
        for read in (lambda: list(read_questions(path, None, "digit")), lambda: asked_texts(path)):
            with pytest.raises(ThinkSwitchError, match=r"jsonl, line 1, question 4: not a row of lm-eval's samples"):
                read()


def test_a_task_is_not_taken_for_another_whose_name_begins_alike(tmp_path: Path) -> None:
    stamps = ("2026-01-02T03-04-05.678901", "2026-01-02T03-04-06")  # isoformat leaves out microseconds that are 0
    for task in ("aime", "aime_k8", "[a]"):
        for stamp in stamps:
            (tmp_path / f"samples_{task}_{stamp}.jsonl").touch()
    for task in ("aime", "aime_k8", "[a]"):
        assert samples_file(tmp_path, task).name == f"samples_{task}_{stamps[1]}.jsonl"
    with pytest.raises(ThinkSwitchError, match="holds no samples_aim_"):
        samples_file(tmp_path, "aim")
