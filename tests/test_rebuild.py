from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.test_pairs import answer, request
from thinkswitch_plugin.args import RebuildKeys
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.loop.rebuild import Baseline, asked_ids, baseline, still_thinks, think_ratio


@pytest.mark.parametrize(
    ("closed", "whole", "asked", "accepted"),
    [
        (64, 64, 64, True),
        (62, 64, 64, True),
        (61, 64, 64, False),
        (14, 15, 15, True),
        (13, 15, 15, False),
        (3, 3, 15, False),
        (490, 500, 500, True),
        (489, 500, 500, False),
    ],
)
def test_the_check_has_one_prompt_of_tolerance_on_small_sets_only(
    closed: int, whole: int, asked: int, accepted: bool
) -> None:
    assert still_thinks(closed, whole, asked, needed=0.98, whole_share=1.0) is accepted


def test_a_candidate_may_be_cut_as_often_as_the_original_was() -> None:
    assert still_thinks(5, 5, 15, needed=0.98, whole_share=0.5)
    assert not still_thinks(2, 2, 15, needed=0.98, whole_share=0.5)
    assert not still_thinks(0, 0, 15, needed=0.0, whole_share=0.0)


def test_the_measure_is_what_the_original_did_on_the_same_requests(
    write_jsonl: Callable[[str, Sequence[object]], Path],
) -> None:
    requests = write_jsonl("requests.jsonl", [request(f"p{i}", text="1+1") for i in range(6)])
    cut = [answer(f"p{i}-s0", "1+1=", finish="length") for i in range(3)]
    generations = write_jsonl("g.jsonl", [*cut, *(answer(f"p{i}-s0", "1+1=2\n</think>\n\n2") for i in range(3, 6))])
    assert asked_ids(requests, 3) == ["p0-s0", "p1-s0", "p2-s0"] and len(asked_ids(requests)) == 6
    assert think_ratio(requests, generations, asked_ids(requests)) == (3, 3)
    assert think_ratio(requests, generations, asked_ids(requests, 4)) == (1, 1)
    assert think_ratio(requests, generations, asked_ids(requests, 3)) == (0, 0)


def test_what_counts_is_what_finished_and_the_first_line_of_an_id(
    write_jsonl: Callable[[str, Sequence[object]], Path],
) -> None:
    requests = write_jsonl("requests.jsonl", [request(f"p{i}", text="1+1") for i in range(3)])
    failed = {"custom_id": "p1-s0", "response": None, "error": {"message": "no"}}
    lines = [
        answer("p0-s0", "1+1=2\n</think>\n\n2"),
        answer("p0-s0", "1+1"),
        failed,
        answer("p1-s0", "1+1=2\n</think>\n\n2"),
        answer("p2-s0", "1+1=2\n</think>\n\n2", finish="content_filter"),
        answer("p9-s0", "1+1"),
    ]
    assert think_ratio(requests, write_jsonl("g.jsonl", lines), asked_ids(requests)) == (2, 2)


def test_an_original_that_does_not_think_is_no_baseline(write_jsonl: Callable[[str, Sequence[object]], Path]) -> None:
    rows = [request(f"p{i}") for i in range(12)]
    for row in rows:
        row["body"]["metadata"]["trace"] = "inline"
    requests = write_jsonl("requests.jsonl", rows)
    direct = write_jsonl("g.jsonl", [answer(f"p{i}-s0", "2") for i in range(12)])
    found = baseline(requests, direct, asked_ids(requests, 4))
    assert found == Baseline(0, 4, 4)
    keys = RebuildKeys()  # type: ignore[call-arg]
    with pytest.raises(ThinkSwitchError, match=r"g\.jsonl: 0 of 4 finished completions .*`thinkswitch\.trace`"):
        found.require_traces(direct, keys)
    with pytest.raises(ThinkSwitchError, match="0 of 0 finished completions"):
        Baseline(0, 0, 12).require_traces(direct, keys)
    found.require_traces(direct, keys.model_copy(update={"min_think_ratio": 0}))
    Baseline(4, 4, 4).require_traces(direct, keys)
    # asked other prompts: the measure is all that the original answered
    assert baseline(requests, direct, ["p99-s0"]) == Baseline(0, 12, 12)
