from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments import bench_pairs
from tests.conftest import ROOT
from thinkswitch_plugin import files
from thinkswitch_plugin.args import AnswerKeys
from thinkswitch_plugin.data.pairs import PairReport, build_pairs, write_pairs
from thinkswitch_plugin.errors import ThinkSwitchError

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


def answer(custom_id: str, content: str | None, finish: str | None = "stop", **extra: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **extra}
    body = {"choices": [{"index": 0, "message": message, "finish_reason": finish}]}
    return {"custom_id": custom_id, "response": {"status_code": 200, "body": body}, "error": None}


def built(requests: Path, generations: Path, selection: str = "first", **others: float) -> tuple[list[str], PairReport]:
    report = PairReport()
    keys = AnswerKeys.model_validate({"selection": selection, "kind": "digit", **others})
    rows = build_pairs(requests, generations, keys=keys, report=report)
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


@pytest.mark.parametrize(("least", "kept"), [(0.5, 1), (0.67, 0)])
def test_a_prompt_on_which_the_samples_disagree_too_much_is_dropped_by_a_vote_and_counted(
    least: float, kept: int, write_jsonl: Write, tmp_path: Path
) -> None:
    requests = write_jsonl("requests.jsonl", [request("p0", s) for s in range(4)])
    texts = ["t</think>3", "t</think>5", "t</think>5", "t</think>none"]  # two of four; what cannot be read disagrees
    generations = write_jsonl("generations.jsonl", [answer(f"p0-s{i}", t) for i, t in enumerate(texts)])
    rows, report = built(requests, generations, "vote", min_agreement=least)
    assert rows == ["p0-s1=5"][:kept] and report.prompts_without_pair == 1 - kept
    assert report.dropped == ({"not_selected": 3} if kept else {"samples_disagree": 4})
    assert report.disagreed == ["p0"][kept:]
    keys = AnswerKeys.model_validate({"selection": "vote", "kind": "digit", "min_agreement": least})
    if kept:
        write_pairs(requests, generations, tmp_path / "pairs.jsonl", keys=keys)
        counts = files.read_json(tmp_path / "pairs.json")
        assert (counts["selection"], counts["min_agreement"], "disagreed" in counts) == ("vote", 0.5, False)
    else:
        with pytest.raises(
            ThinkSwitchError,
            match=r"4 samples_disagree; prompts .* `min_agreement`: 1 \(p0\)\); lower `answers.min_agreement`",
        ):
            write_pairs(requests, generations, tmp_path / "pairs.jsonl", keys=keys)


def test_a_prompt_with_tags_keeps_its_text_and_gets_its_own_answer(write_jsonl: Write) -> None:
    text = "What does </think> mean in <think>?"
    requests = write_jsonl("requests.jsonl", [request("p0", text=text)])
    generations = write_jsonl("generations.jsonl", [answer("p0-s0", "t</think>4")])
    rows = list(build_pairs(requests, generations, report=PairReport()))
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
        write_pairs(requests, generations, tmp_path / "pairs.jsonl")
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


def inline(prompt: str, **metadata: Any) -> dict[str, Any]:
    row = request(prompt)
    row["body"]["metadata"] = {"prompt_id": prompt, "trace": "inline", **metadata}
    return row


def test_a_completion_without_a_trace_is_no_pair_where_one_is_expected(write_jsonl: Write) -> None:
    requests = write_jsonl("requests.jsonl", [inline(f"p{i}") for i in range(3)])
    texts = ["<think>t</think>1", "2", "<think>t</think><answer>3</answer>"]
    rows, report = built(requests, write_jsonl("g.jsonl", [answer(f"p{i}-s0", t) for i, t in enumerate(texts)]))
    assert rows == ["p0-s0=1", "p2-s0=3"] and report.dropped == {"no_trace": 1} and report.unwrapped == 1
    assert "1 answers unwrapped" in report.summary()


def test_a_file_in_which_nearly_nothing_has_a_trace_is_refused_by_its_first_completion(write_jsonl: Write) -> None:
    requests = write_jsonl("requests.jsonl", [inline(f"p{i}") for i in range(12)])
    lines = [answer(f"p{i}-s0", f"Let me\nsee: {i}") for i in range(1, 12)]
    generations = write_jsonl("generations.jsonl", [answer("p0-s0", "<think>t</think>1"), *lines])
    with pytest.raises(
        ThinkSwitchError,
        match=r"generations\.jsonl, line 2: of 12 finished completions 1 have .* begins 'Let me\\nsee: 1': set `thinkswitch\.trace`",
    ):
        built(requests, generations)
    direct = write_jsonl("requests.jsonl", [inline(f"p{i}", trace="none") for i in range(12)])
    rows, report = built(direct, generations)
    assert len(rows) == 11 and rows[0] == "p1-s0=Let me\nsee: 1" and report.dropped == {"ambiguous_tags": 1}
    mine = {"open": "Let me", "close": "see:"}
    rows, report = built(
        write_jsonl("requests.jsonl", [inline(f"p{i}", convention=mine) for i in range(12)]), generations
    )
    assert len(rows) == 11 and rows[0] == "p1-s0=1"


def test_what_was_cut_does_not_show_that_no_traces_are_written(write_jsonl: Write) -> None:
    requests = write_jsonl("requests.jsonl", [inline(f"p{i}") for i in range(12)])
    lines = [answer(f"p{i}-s0", "Let me", finish="length") for i in range(1, 12)]
    rows, report = built(requests, write_jsonl("g.jsonl", [answer("p0-s0", "<think>t</think>1"), *lines]))
    assert rows == ["p0-s0=1"] and report.dropped == {"answer_cut": 11}


def test_only_a_finished_answer_is_whole_and_others_are_counted_under_their_reason(write_jsonl: Write) -> None:
    reasons = [
        "stop",
        None,
        "length",
        "content_filter",
        "error",
        "abort",
        "max_tokens",
        "tool_calls",
        "eos",
        "Weird one!",
    ]
    requests = write_jsonl("requests.jsonl", [request(f"p{i}") for i in range(len(reasons))])
    lines = [answer(f"p{i}-s0", f"t</think>{i}", finish=reason) for i, reason in enumerate(reasons)]
    rows, report = built(requests, write_jsonl("g.jsonl", lines))
    assert rows == ["p0-s0=0", "p1-s0=1"]
    assert report.dropped == {"answer_cut": 1, "weird_one": 1, **dict.fromkeys(reasons[3:-1], 1)}


LONG = "First we add seven and three, which is ten, and then we take away two, so that eight is left. " * 3


@pytest.mark.parametrize(
    ("reasoning", "content", "outcome"),
    [
        ("2+3=5, so 5", "2+3=5,  so\n5", "answer_repeats_trace"),
        ("7*3=1\n1+4=5", "7*3=1\n1+4=5\n\n5", "answer_repeats_trace"),
        (LONG + " It is 8.", f"Well. {LONG} 8", "answer_repeats_trace"),
        ("Hm. " * 99 + LONG + "It is 8.", f"The solution: {LONG}", "answer_repeats_trace"),
        ("2+2=4", "4", "kept"),
        ("4", "4", "kept"),
        ("2+3=5", "Since 2+3=5, the answer is 5", "kept"),
        (LONG, "First we add seven and three, which is ten, and take away two: 8.", "kept"),
    ],
)
def test_an_answer_that_repeats_its_reasoning_is_no_pair(
    write_jsonl: Write, reasoning: str, content: str, outcome: str
) -> None:
    requests = write_jsonl("requests.jsonl", [request("p0")])
    _, report = built(requests, write_jsonl("g.jsonl", [answer("p0-s0", content, reasoning=reasoning)]))
    assert (dict(report.dropped) or "kept") == ({outcome: 1} if outcome != "kept" else "kept")


@pytest.mark.parametrize(
    "message",
    [
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "t"}]}, {"type": "text", "text": "5"}]},
        {"content": [{"type": "text", "text": "5"}], "reasoning_content": "t"},
        {"content": "5", "reasoning_details": [{"type": "reasoning.text", "text": "t"}]},
        {"content": "5", "reasoning": "", "thinking": "t"},
        {"content": "5", "reasoning": {"text": "t"}},
        {"content": "5", "thinking_blocks": [{"type": "thinking", "thinking": "t"}]},
        {"content": "5", "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]},
    ],
)
def test_reasoning_is_found_where_servers_put_it(write_jsonl: Write, message: dict[str, Any]) -> None:
    requests = write_jsonl("requests.jsonl", [inline("p0")])
    line = answer("p0-s0", "")
    line["response"]["body"]["choices"][0]["message"] = {"role": "assistant", **message}
    assert built(requests, write_jsonl("g.jsonl", [line]))[0] == ["p0-s0=5"]


def test_reasoning_given_twice_is_never_a_pair(write_jsonl: Write) -> None:
    requests = write_jsonl("requests.jsonl", [inline(f"p{i}") for i in range(2)])
    lines = [answer("p0-s0", "<think>t</think>5", reasoning="t"), answer("p1-s0", "5", reasoning="<think>t")]
    rows, report = built(requests, write_jsonl("g.jsonl", lines))
    assert rows == ["p1-s0=5"] and report.dropped == {"ambiguous_tags": 1}


def test_the_tokenizers_own_end_of_turn_is_taken_off_and_kept_out(write_jsonl: Write) -> None:
    requests = write_jsonl("requests.jsonl", [inline(f"p{i}", ends=["@@END"]) for i in range(2)])
    lines = [answer("p0-s0", "<think>t</think>5@@END\n"), answer("p1-s0", "<think>t</think>5@@END6")]
    rows, report = built(requests, write_jsonl("g.jsonl", lines))
    assert rows == ["p0-s0=5"] and report.dropped == {"control_token": 1}


@pytest.mark.parametrize("name", ["lrm_token_economy_aime", "misc_tag_variety", "lineage_chat", "skythought_aime24"])
def test_no_pair_from_real_outputs_holds_a_part_of_a_trace(write_jsonl: Write, name: str) -> None:
    path = ROOT.parent / "shared" / "data" / "outputs" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("the real outputs are not here")
    requests, lines, reasonings = [], [], {}
    for n, (_, row) in enumerate(files.read_jsonl(path)):
        extra = {"reasoning": row["reasoning"]} if row["reasoning"] else {}
        text = row["content"] if row["raw"] is None else row["raw"]
        requests.append(inline(f"p{n}"))
        lines.append(answer(f"p{n}-s0", text, finish=row["finish_reason"], **extra))
        traced = re.search(r"^(.*)(?:</think>|<\|end_of_thought\|>)", text or "", re.DOTALL)
        reasonings[f"p{n}-s0"] = " ".join((row["reasoning"] or (traced[1] if traced else "")).split())
    report = PairReport()
    pairs = list(build_pairs(write_jsonl("requests.jsonl", requests), write_jsonl("g.jsonl", lines), report=report))
    assert len(pairs) > 20 and report.kept + sum(report.dropped.values()) == report.samples
    for row in pairs:
        text, reasoning = " ".join(row["messages"][-1]["content"].split()), reasonings[row["custom_id"]]
        assert reasoning and "think>" not in text and "_of_thought" not in text
        assert not any(text[at : at + 200] in reasoning for at in range(max(1, len(text) - 200)) if len(text) >= 200)


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


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {}}, {"type": "tool_use", "input": {}}])
def test_a_part_that_is_no_text_does_not_pass_for_a_trace(write_jsonl: Write, part: dict[str, Any]) -> None:
    requests = write_jsonl("requests.jsonl", [inline(f"p{i}") for i in range(2)])
    lines = [answer("p0-s0", "<think>t</think>5"), answer("p1-s0", "")]
    lines[1]["response"]["body"]["choices"][0]["message"] = {"content": [{"type": "text", "text": "SECRET 5"}, part]}
    rows, report = built(requests, write_jsonl("g.jsonl", lines))
    assert rows == ["p0-s0=5"] and report.dropped == {"failed": 1}


@pytest.mark.parametrize(
    "rest", ["[e~[\n]~b]ai\n6", "<｜DSML｜function_calls>6", "<role>HUMAN</role>6", "<SPECIAL_12>6"]
)
def test_what_opens_another_turn_is_in_no_answer(write_jsonl: Write, rest: str) -> None:
    requests = write_jsonl("requests.jsonl", [inline(f"p{i}") for i in range(2)])
    lines = [answer("p0-s0", "<think>t</think>5<SPECIAL_12>"), answer("p1-s0", f"<think>t</think>5{rest}")]
    rows, report = built(requests, write_jsonl("g.jsonl", lines))
    assert rows == ["p0-s0=5"] and report.dropped == {"control_token": 1}


def test_the_parts_of_a_message_are_kept_where_the_tokenizers_end_is_taken_off(write_jsonl: Write) -> None:
    requests = write_jsonl("requests.jsonl", [inline("p0", ends=["@@END"])])
    line = answer("p0-s0", "")
    parts = [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "5@@END"}]
    line["response"]["body"]["choices"][0]["message"] = {"content": parts}
    assert built(requests, write_jsonl("g.jsonl", [line]))[0] == ["p0-s0=5"]
