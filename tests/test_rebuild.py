from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.test_pairs import answer, request
from thinkswitch_plugin.args import EngineKeys, RebuildKeys
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.loop.rebuild import Check, Traces, asked_ids, count_traces, still_thinks

WriteJsonl = Callable[[str, Sequence[object]], Path]
ALL = Traces(15, 15, 15)


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
    assert still_thinks(Traces(closed, whole, asked), ALL, 0.98) is accepted


def test_a_candidate_may_be_cut_as_often_as_the_original_was() -> None:
    half = Traces(15, 15, 30)
    assert still_thinks(Traces(5, 5, 15), half, 0.98)
    assert not still_thinks(Traces(2, 2, 15), half, 0.98)
    assert not still_thinks(Traces(0, 0, 15), Traces(0, 0, 15), 0.0)


def test_the_measure_is_what_the_original_did_on_the_same_requests(write_jsonl: WriteJsonl) -> None:
    requests = write_jsonl("requests.jsonl", [request(f"p{i}", text="1+1") for i in range(6)])
    cut = [answer(f"p{i}-s0", "1+1=", finish="length") for i in range(3)]
    generations = write_jsonl("g.jsonl", [*cut, *(answer(f"p{i}-s0", "1+1=2\n</think>\n\n2") for i in range(3, 6))])
    assert asked_ids(requests, 3) == ["p0-s0", "p1-s0", "p2-s0"] and len(asked_ids(requests)) == 6
    assert count_traces(requests, generations, asked_ids(requests)) == Traces(3, 3, 6)
    assert count_traces(requests, generations, asked_ids(requests, 4)) == Traces(1, 1, 4)
    assert count_traces(requests, generations, asked_ids(requests, 3)) == Traces(0, 0, 3)


def test_what_counts_is_what_finished_and_the_first_line_of_an_id(write_jsonl: WriteJsonl) -> None:
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
    found = count_traces(requests, write_jsonl("g.jsonl", lines), asked_ids(requests))
    assert found == Traces(2, 2, 3) and found.cut == 1


def test_a_candidates_answers_are_counted_by_request_and_not_by_line(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    rows = [request(f"p{i}", text="1+1") for i in range(4)]
    for row in rows:
        row["body"]["max_tokens"] = 64
    requests = write_jsonl("requests.jsonl", rows)
    check = Check(requests, requests, tmp_path / "g.jsonl", "embedded", EngineKeys.model_validate({}), tmp_path)
    failed = {"custom_id": "p0-s0", "response": None, "error": {"message": "no"}}
    thought = [answer(f"p{i}-s0", "1+1=2\n</think>\n\n2") for i in range(2)]
    stored = write_jsonl("check-lambda-0.9.jsonl", [failed, *thought, thought[0]])
    with stored.open("a") as handle:
        handle.write('{"custom_id": "p1')  # a killed attempt; all answers are there, so no engine starts
    assert check.candidate(tmp_path / "candidate", 0.9, limit=2) == Traces(2, 2, 2)


def test_a_broken_request_is_named_by_file_line_and_field(write_jsonl: WriteJsonl) -> None:
    requests = write_jsonl("requests.jsonl", [request("p0"), {"method": "POST"}])
    with pytest.raises(ThinkSwitchError, match=r"requests\.jsonl, line 2: `custom_id` is missing or not text"):
        asked_ids(requests)
    twice = write_jsonl("twice.jsonl", [request("p0"), request("p0")])
    with pytest.raises(ThinkSwitchError, match="is that of line 1 already"):
        asked_ids(twice)


def test_an_original_that_does_not_think_cannot_be_compared_with(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    rows = [request(f"p{i}") for i in range(12)]
    for row in rows:
        row["body"]["metadata"]["trace"] = "inline"
    requests = write_jsonl("requests.jsonl", rows)
    direct = write_jsonl("g.jsonl", [answer(f"p{i}-s0", "2") for i in range(12)])
    engine = EngineKeys.model_validate({})
    found = Check(requests, requests, direct, "embedded", engine, tmp_path).original(4)
    assert found == Traces(0, 4, 4)
    keys = RebuildKeys()  # type: ignore[call-arg]
    with pytest.raises(ThinkSwitchError, match=r"g\.jsonl: 0 of 4 finished completions .*`thinkswitch\.trace`"):
        found.require_some(direct, keys)
    with pytest.raises(ThinkSwitchError, match="0 of 0 finished completions"):
        Traces(0, 0, 12).require_some(direct, keys)
    found.require_some(direct, keys.model_copy(update={"min_think_ratio": 0}))
    Traces(4, 4, 4).require_some(direct, keys)
    # asked other prompts: the measure is all that the original answered
    others = write_jsonl("others.jsonl", [request("p99")])
    assert Check(others, requests, direct, "embedded", engine, tmp_path).original(4) == Traces(0, 12, 12)
