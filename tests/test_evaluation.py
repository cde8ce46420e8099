from __future__ import annotations

import itertools
import math
from pathlib import Path
from statistics import mean

import pytest

from thinkswitch_plugin.data.batch import Asked
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.evaluation import (
    Sample,
    grade,
    grade_question,
    interval,
    pass_at_k,
    samples_file,
    summarize,
)


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
    found = grade_question(0, "113", texts, 8192, kind="integer", how=Asked())
    assert found.truncated == [True, False, True] and found.tokens == [8190, 8001, 8190]
    assert found.correct == [False, True, True]  # what stands in a box was said before the cut
    short = grade_question(0, "113", [("113", 8)], 9, kind="integer", how=Asked())
    assert short.truncated == [False]


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


def test_cut_completions_are_left_out_of_the_think_ratio() -> None:
    whole, cut = sample([True]), Sample(1, [False], [None], [False], [64], [True])
    figures = summarize([whole, cut])
    assert figures["think_ratio"] == 1.0
    assert figures["truncated"] == 0.5
    assert figures["answered"] == 0.5


def test_grading_reads_only_what_follows_the_trace() -> None:
    assert grade("digit", "7*3=1\n</think>\n\n1", "1", opened=True)["accuracy"]
    assert not grade("digit", "1", "1", opened=True)["answered"]
    assert grade("digit", "1", "1")["accuracy"]
    assert not grade("digit", "<think>1</think>", "1")["answered"]


def test_a_task_is_not_taken_for_another_whose_name_begins_alike(tmp_path: Path) -> None:
    stamps = ("2026-01-02T03-04-05.678901", "2026-01-02T03-04-06")  # isoformat leaves out microseconds that are 0
    for task in ("aime", "aime_k8", "[a]"):
        for stamp in stamps:
            (tmp_path / f"samples_{task}_{stamp}.jsonl").touch()
    for task in ("aime", "aime_k8", "[a]"):
        assert samples_file(tmp_path, task).name == f"samples_{task}_{stamps[1]}.jsonl"
    with pytest.raises(ThinkSwitchError, match="holds no samples_aim_"):
        samples_file(tmp_path, "aim")
