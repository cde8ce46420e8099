from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.test_pairs import answer, request
from thinkswitch_plugin.merging.rebuild import asked_ids, still_thinks, think_ratio


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
