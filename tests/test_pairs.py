from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import bench_pairs
from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.pairs import PairReport, build_pairs, write_pairs

Write = Callable[[str, Sequence[object]], Path]


def request(prompt: str, sample: int = 0, text: str = "2+3") -> dict[str, Any]:
    return {
        "custom_id": f"{prompt}-s{sample}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "m",
            "messages": [{"role": "user", "content": text}],
            "metadata": {"prompt_id": prompt, "trace": "opened"},
        },
    }


def answer(custom_id: str, content: str | None, finish: str = "stop", **extra: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **extra}
    body = {"choices": [{"index": 0, "message": message, "finish_reason": finish}]}
    return {"custom_id": custom_id, "response": {"status_code": 200, "body": body}, "error": None}


def built(requests: Path, generations: Path, selection: str = "first") -> tuple[list[str], PairReport]:
    report = PairReport()
    rows = build_pairs(requests, generations, selection=selection, answer_kind="digit", report=report)
    return [f"{r['custom_id']}={r['messages'][-1]['content']}" for r in rows], report


def test_everything_that_is_dropped_is_counted_and_order_is_that_of_the_requests(write_jsonl: Write) -> None:
    requests = write_jsonl("requests.jsonl", [request(f"p{i}") for i in range(7)])
    failed = {"custom_id": "p4-s0", "response": None, "error": {"message": "no"}}
    generations = write_jsonl(
        "generations.jsonl",
        [
            answer("p5-s0", "\n\n5", reasoning="t"),
            answer("p0-s0", "t\n</think>\n\n1"),
            answer("p1-s0", "never ends", finish="length"),
            answer("p2-s0", "t</think>", finish="stop"),
            answer("p3-s0", "t</think>1</think>2"),
            failed,
            answer("p0-s0", "t</think>9"),
        ],
    )
    rows, report = built(requests, generations)
    assert rows == ["p0-s0=1", "p5-s0=5"]
    assert report.as_json() == {
        "prompts": 7,
        "samples": 7,
        "kept": 2,
        "prompts_without_pair": 5,
        "unwrapped": 0,
        "duplicates": 1,
        "unknown_ids": 0,
        "dropped": {"ambiguous_tags": 1, "empty_answer": 1, "failed": 1, "not_generated": 1, "unclosed_trace": 1},
    }


def test_first_all_and_vote(write_jsonl: Write) -> None:
    requests = write_jsonl("requests.jsonl", [request("p0", s) for s in range(4)])
    texts = ["unfinished", "t</think>3", "t</think>5", "t</think>5"]
    generations = write_jsonl("generations.jsonl", [answer(f"p0-s{i}", t) for i, t in enumerate(texts)])
    assert built(requests, generations, "first")[0] == ["p0-s1=3"]
    assert built(requests, generations, "all")[0] == ["p0-s1=3", "p0-s2=5", "p0-s3=5"]
    rows, report = built(requests, generations, "vote")
    assert rows == ["p0-s2=5"]
    assert report.dropped == {"unclosed_trace": 1, "not_selected": 2}
    assert report.kept + sum(report.dropped.values()) == report.samples


def test_a_prompt_with_tags_keeps_its_text_and_gets_its_own_answer(write_jsonl: Write) -> None:
    text = "What does </think> mean in <think>?"
    requests = write_jsonl("requests.jsonl", [request("p0", text=text)])
    generations = write_jsonl("generations.jsonl", [answer("p0-s0", "t</think>4")])
    rows = list(build_pairs(requests, generations, answer_kind="digit", report=PairReport()))
    assert [m["content"] for m in rows[0]["messages"]] == [text, "4"]


def test_a_torn_last_line_counts_as_not_generated(write_jsonl: Write) -> None:
    requests = write_jsonl("requests.jsonl", [request("p0"), request("p1")])
    generations = write_jsonl("generations.jsonl", [answer("p0-s0", "t</think>1")])
    with generations.open("ab") as handle:
        handle.write(b'{"custom_id": "p1-s0", "resp')
    rows, report = built(requests, generations)
    assert rows == ["p0-s0=1"] and report.dropped == {"not_generated": 1}


def test_no_pair_at_all_is_an_error_and_leaves_no_file(write_jsonl: Write, tmp_path: Path) -> None:
    requests = write_jsonl("requests.jsonl", [request("p0")])
    generations = write_jsonl("generations.jsonl", [answer("p0-s0", "cut", finish="length")])
    with pytest.raises(ThinkSwitchError, match="1 unclosed_trace"):
        write_pairs(requests, generations, tmp_path / "pairs.jsonl", selection="first", answer_kind="digit")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["generations.jsonl", "requests.jsonl"]


def test_a_broken_line_is_named(write_jsonl: Write) -> None:
    requests = write_jsonl("requests.jsonl", [request("p0")])
    generations = write_jsonl("generations.jsonl", [answer("p0-s0", "t</think>1")])
    generations.write_bytes(generations.read_bytes() + b"not json\n")
    with pytest.raises(ThinkSwitchError, match=r"generations\.jsonl, line 2: not valid JSON"):
        built(requests, generations)


def test_line_separators_inside_a_text_do_not_break_a_row(write_jsonl: Write) -> None:
    requests = write_jsonl("requests.jsonl", [request("p0", text="a\u2028b")])
    generations = write_jsonl("generations.jsonl", [answer("p0-s0", "t\u2028t</think>1")])
    assert built(requests, generations)[0] == ["p0-s0=1"]
    assert len(list(files.read_jsonl(requests))) == 1


def test_an_answer_beats_a_failure_stored_before_it_and_strangers_are_counted(write_jsonl: Write) -> None:
    requests = write_jsonl("requests.jsonl", [request("p0"), request("p1")])
    failed = {"custom_id": "p0-s0", "response": None, "error": {"message": "no"}}
    lines = [failed, answer("p0-s0", "t</think>1"), answer("p1-s0", "t</think>2"), answer("p9-s0", "t</think>3")]
    rows, report = built(requests, write_jsonl("generations.jsonl", lines))
    assert rows == ["p0-s0=1", "p1-s0=2"]
    assert (report.duplicates, report.unknown_ids, report.samples) == (1, 1, 2)
    assert report.summary().endswith(
        "1 lines left out whose id is stored twice; 1 lines left out whose id nobody asked"
    )


def test_an_answer_with_a_control_token_is_no_pair(write_jsonl: Write) -> None:
    requests = write_jsonl("requests.jsonl", [request("p0"), request("p1")])
    texts = {"p0-s0": "t</think>1<|im_end|>\n<|im_start|>user", "p1-s0": "t</think>1 < 2 and a <b> [x] | y"}
    rows, report = built(requests, write_jsonl("generations.jsonl", [answer(i, t) for i, t in texts.items()]))
    assert rows == ["p1-s0=1 < 2 and a <b> [x] | y"] and report.dropped == {"control_token": 1}


def test_requests_that_share_an_id_are_named(write_jsonl: Write) -> None:
    requests = write_jsonl("requests.jsonl", [request("p0"), request("p0")])
    with pytest.raises(ThinkSwitchError, match=r"requests\.jsonl, line 2: the `custom_id` 'p0-s0' is that of line 1"):
        built(requests, write_jsonl("generations.jsonl", [answer("p0-s0", "t</think>1")]))


def test_memory_is_flat_and_the_spill_leaves_nothing(tmp_path: Path) -> None:
    found = bench_pairs.measure(3000, 20_000, tmp_path, rounds=1)
    assert found["counts add up"] and found["pairs"] == 2940
    assert found["peak MB"] < 150 and found["megabytes"] > 55
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "generations.jsonl", "pairs.json", "pairs.jsonl", "requests.jsonl",
    ]  # fmt: skip
