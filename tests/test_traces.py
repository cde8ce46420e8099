from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkswitch_plugin.data.traces import Outcome, split, split_message, template_opens_trace


@pytest.mark.parametrize(
    ("text", "opened", "trace", "answer", "outcome"),
    [
        ("<think>\n7*3=1\n</think>\n\n1", False, "7*3=1", "1", Outcome.COMPLETE),
        ("7*3=1\n</think>\n\n1", True, "7*3=1", "1", Outcome.COMPLETE),
        ("7*3=1\n</think>\n\n1", False, "7*3=1", "1", Outcome.COMPLETE),
        ("42", False, None, "42", Outcome.COMPLETE),
        ("still adding", True, "still adding", None, Outcome.UNCLOSED),
        ("<think>still adding", False, "still adding", None, Outcome.UNCLOSED),
        ("a</think>b<think>c", False, "a", None, Outcome.UNCLOSED),
        ("a</think>  \n", True, "a", None, Outcome.EMPTY),
        ("a</think>b</think>c", True, "a</think>b", "c", Outcome.AMBIGUOUS),
        ("</a[/THINK]b</think>c", True, "</a[/THINK]b", "c", Outcome.AMBIGUOUS),
        ("<Think>a</think >b", False, "a", "b", Outcome.COMPLETE),
        ("<|begin_of_thought|>a<|end_of_thought|>b", False, "a", "b", Outcome.COMPLETE),
    ],
)
def test_split_shapes(text: str, opened: bool, trace: str | None, answer: str | None, outcome: Outcome) -> None:
    done = split(text, opened=opened)
    assert (done.trace, done.answer, done.outcome) == (trace, answer, outcome)


def test_an_answer_cut_by_the_token_limit_is_not_complete() -> None:
    assert split("a</think>half an ans", opened=True, cut=True).outcome is Outcome.CUT
    assert split("half an ans", cut=True).outcome is Outcome.CUT


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_a_server_that_returned_the_trace_apart(field: str) -> None:
    done = split_message({"content": "\n\n5", field: "2+3=5"}, opened=True, finish_reason="stop")
    assert (done.trace, done.answer, done.complete) == ("2+3=5", "5", True)
    stray = split_message({"content": "5", field: "<think>2+3=5"}, finish_reason="stop")
    assert (stray.trace, stray.answer) == ("2+3=5", "5")
    cut = split_message({"content": None, field: "2+3"}, opened=True, finish_reason="length")
    assert cut.outcome is Outcome.UNCLOSED
    never_ended = split_message({"content": None, field: "The answer is 5"}, opened=True, finish_reason="stop")
    assert never_ended.outcome is Outcome.UNCLOSED and not never_ended.closed_trace
    leaked = split_message({"content": "rest of it</think>5", field: "2+3"}, finish_reason="stop")
    assert leaked.outcome is Outcome.AMBIGUOUS and not leaked.complete


def test_only_a_prompt_that_ends_inside_a_trace_has_opened_it() -> None:
    assert template_opens_trace("<|im_start|>assistant\n<think>\n")
    assert not template_opens_trace("<|im_start|>assistant\n")
    assert not template_opens_trace("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not template_opens_trace("user: what does <think> mean?\nassistant:")


_pieces = st.lists(
    st.sampled_from(["<think>", "</think>", "SECRET", "answer", "\n", " ", "\u2028", "<|end_of_thought|>"]), max_size=12
)


@given(_pieces, st.booleans(), st.booleans())
def test_no_token_before_the_last_closing_tag_is_ever_in_an_answer(pieces: list[str], opened: bool, cut: bool) -> None:
    closings = [i for i, p in enumerate(pieces) if p in ("</think>", "<|end_of_thought|>")]
    after = "".join(pieces[closings[-1] + 1 :] if closings else pieces)
    done = split("".join(pieces), opened=opened, cut=cut)
    if done.answer is not None:
        assert done.answer == after.strip()
    if done.complete:
        assert "think>" not in (done.answer or "") and len(closings) <= 1


@pytest.mark.parametrize(
    "answer",
    ["<思考>SECRET</思考>4", "【推理】SECRET【/推理】4", "<réflexion>SECRET</réflexion>4", "<plan>SECRET</plan>4", "<tool_use>SECRET</tool_use>4"],
)  # fmt: skip
def test_a_second_trace_in_another_language_or_a_plan_keeps_an_answer_from_being_whole(answer: str) -> None:
    assert split(f"<think>a</think>{answer}").outcome is Outcome.AMBIGUOUS
    assert split_message({"content": answer, "reasoning": "a"}).outcome is Outcome.AMBIGUOUS


@pytest.mark.parametrize(
    "quoted", ["“</think>”", "«</think>»", "「</think>」", "(</think>)", '\\"</think>\\"', "~~~\n</think>\n~~~"]
)
def test_a_closing_tag_that_is_only_quoted_ends_no_trace(quoted: str) -> None:
    assert split(f"<think>a {quoted} SECRET").outcome is Outcome.UNCLOSED
