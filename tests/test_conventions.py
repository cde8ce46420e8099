"""Every convention in the table, in every shape: no part of a trace gets into a pair."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from experiments import traces_table
from experiments.traces_table import closing, opening, stored, written
from tests.conftest import ROOT
from thinkswitch_plugin import conventions, files
from thinkswitch_plugin.args import PluginKeys
from thinkswitch_plugin.conventions import CONVENTIONS, NONE, Convention
from thinkswitch_plugin.data import marks, traces
from thinkswitch_plugin.data.batch import Asked, asked, asked_of, completion_of
from thinkswitch_plugin.data.pairs import PairReport, build_pairs, judge
from thinkswitch_plugin.data.traces import Outcome, finish_name, finished, split
from thinkswitch_plugin.demo.tokenizer import build_tokenizer
from thinkswitch_plugin.errors import ThinkSwitchError

MARK = "\ue000"  # occurs only in traces
ENDING = [each for each in CONVENTIONS if each.closes]


def test_no_cell_of_the_table_leaks_and_every_convention_with_an_end_gives_a_pair() -> None:
    cells = list(traces_table.cells())
    assert [cell for cell in cells if cell[3]] == []
    raw = {name: what for name, shape, what, _ in cells if shape == "raw"}
    assert [name for name, what in raw.items() if what != "pair"] == [c.name for c in CONVENTIONS if not c.closes]
    assert all(what != "pair" for _, shape, what, _ in cells if shape.startswith("cut") or shape == "doubled")


def test_the_document_holds_the_table() -> None:
    assert traces_table.documented() in (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")


_noise = st.sampled_from(
    [MARK, "so 7", " ", "\n", "`", '"', "```", "\u200b", "&lt;/think&gt;", "<answer>", "</answer>", "## Thinking\n", "assistantfinal",
     *(end for each in ENDING for end in each.closes[:1]), *(each.opens[0] for each in CONVENTIONS)]
)  # fmt: skip
_traces = st.lists(_noise, max_size=6).map(lambda pieces: MARK + "".join(pieces) + MARK)


@settings(max_examples=400)
@given(
    st.sampled_from(ENDING),
    _traces,
    st.sampled_from(["4", "The answer is 4.", "`4`", '"4"', "a <b> [c]"]),
    st.booleans(),
    st.booleans(),
)
def test_whatever_a_trace_holds_none_of_it_reaches_a_pair(
    convention: Convention, trace: str, answer: str, opened: bool, cut: bool
) -> None:
    text = f"{trace}\n{closing(convention)}\n{answer}" if opened else written(convention, trace, answer)
    for known in (convention,) if opened else (convention, None):
        done = split(text, opened=opened, cut=cut, convention=known)
        outcome = judge(done, Asked(opened, known))
        pair = (done.answer or "") if outcome == "complete" else ""
        assert MARK not in pair and (outcome == "complete") is bool(pair), (text, known)
        assert MARK not in (done.answer or ""), (text, known)


@settings(max_examples=60)
@given(
    st.text("bcdfgjklmpqvxz", min_size=3, max_size=9),
    st.sampled_from([("<{}>", "</{}>"), ("[{}]", "[/{}]"), ("<|{}|>", "<|/{}|>"), ("{{{}}}", "{{/{}}}"), ("**{}**\n", "**end**\n"), ("{}:\n", "Answer:\n")]),
    st.booleans(),
)  # fmt: skip
def test_with_a_convention_that_no_table_knows_the_guard_stops(name: str, form: tuple[str, str], opened: bool) -> None:
    begin, end = (each.format(name) for each in form)
    texts = [f"{'' if opened else begin}{MARK} let me see {n}{end}{n}" for n in range(12)]
    assume(not any(traces.has_tag(text) for text in texts))
    with pytest.raises(
        ThinkSwitchError, match=r"generations\.jsonl, line 1: of 12 finished .*`thinkswitch\.trace`"
    ) as error:
        built(texts, Asked(opened))
    assert MARK.encode("unicode_escape").decode() in str(error.value) and "\n" not in str(error.value)
    mine = conventions.from_key({"open": begin, "close": end})
    assert built(texts, Asked(opened, mine)) == [str(n) for n in range(12)]


def built(texts: list[str], how: Asked) -> list[str]:
    """The answers of the pairs from completions of as many prompts."""
    with tempfile.TemporaryDirectory() as folder:
        requests, generations = Path(folder, "requests.jsonl"), Path(folder, "generations.jsonl")
        turns = [{"role": "user", "content": "q"}]
        ids = [f"p{n}" for n in range(len(texts))]
        bodies = [{"custom_id": i, "body": {"messages": turns, "metadata": how.metadata()}} for i in ids]
        requests.write_bytes(b"".join(map(files.dumps_line, bodies)))
        lines = [files.dumps_line(stored(i, text, "stop")) for i, text in zip(ids, texts, strict=True)]
        generations.write_bytes(b"".join(lines))
        return [row["messages"][-1]["content"] for row in build_pairs(requests, generations, report=PairReport())]


@pytest.mark.parametrize(
    ("text", "opened", "trace", "answer", "outcome"),
    [
        # as families write it
        ("<|channel>thought\nT<channel|>4<turn|>", False, "T", "4", Outcome.COMPLETE),
        ("<|channel|>analysis<|message|>T<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>4<|return|>", False, "T<|end|><|start|>assistant", "4", Outcome.COMPLETE),
        ("<|channel|>analysis<|message|>T<|end|><|start|>assistant<|channel|>commentary to=f<|message|>U<|end|><|start|>assistant<|channel|>final<|message|>4", False, "T<|end|><|start|>assistant<|channel|>commentary to=f<|message|>U", "4", Outcome.COMPLETE),
        ("analysisTassistantcommentaryUassistantfinal4", False, "TassistantcommentaryU", "4", Outcome.COMPLETE),
        ('<details type="reasoning" done="true">\n<summary>Thought</summary>T\n</details>\n4', False, "<summary>Thought</summary>T", "4", Outcome.COMPLETE),
        ("**Here's my thought process:** T **Here's my response:**\n**4**", False, "T", "**4**", Outcome.COMPLETE),
        # in other letters and brackets
        ("< THINK >T< / Think >4", False, "T", "4", Outcome.COMPLETE),
        ("&lt;think&gt;T&amp;lt;/think&amp;gt;4", False, "T", "4", Outcome.COMPLETE),
        ("<th\u200bink>T</think\u200b>4", False, "T", "4", Outcome.COMPLETE),
        ("＜ｔｈｉｎｋ＞T＜/think＞4", False, "T", "4", Outcome.COMPLETE),
        ("\\u003cthink\\u003eT\\u003c/think\\u003e4", False, "T", "4", Outcome.COMPLETE),
        ("<think:6124c78e>T</think:6124c78e>4", False, "T", "4", Outcome.COMPLETE),
        ('<thinking budget="high">T</thinking>4', False, "T", "4", Outcome.COMPLETE),
        ("<think>\n<think>\nT</think>4", False, "T", "4", Outcome.COMPLETE),
        ("<think>\nT</think>4", True, "T", "4", Outcome.COMPLETE),
        # what may still be trace
        ("<think>a<think>T</think>T", False, "a<think>T", None, Outcome.AMBIGUOUS),
        ("a<reflection>T</reflection>T", True, "a<reflection>T", None, Outcome.AMBIGUOUS),
        ("<think>T</analysis>T", False, "T", None, Outcome.AMBIGUOUS),
        ("I end with `</think>`. T", True, "I end with `</think>`. T", None, Outcome.UNCLOSED),
        ("```\n<think>a</think>\n```\nT", True, "```\n<think>a</think>\n```\nT", None, Outcome.UNCLOSED),
        ("T</think\n\n4", False, None, None, Outcome.AMBIGUOUS),
        ("<my_thoughts>T</my_thoughts>4", False, None, None, Outcome.AMBIGUOUS),
        ("<think>T</think>Here is my thought process: U Here is my response: 4", False, "T", None, Outcome.AMBIGUOUS),
        ("<think>T</think>assistantfinal4", False, "T", None, Outcome.AMBIGUOUS),
        ("<think>T</think><tool_call>{}</tool_call>", False, "T", None, Outcome.AMBIGUOUS),
        ("thought\nT\n\n4", False, "T\n\n4", None, Outcome.UNCLOSED),
        # wrappers and ends of turns
        ("<think>T</think>\n<answer>\n4\n</answer>", False, "T", "4", Outcome.COMPLETE),
        ("<think>T</think><|START_RESPONSE|>4<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", False, "T", "4", Outcome.COMPLETE),
        ("<think>T</think><answer>4", False, "T", "<answer>4", Outcome.TAGGED),
        ("<think>T</think><answer><answer>4</answer></answer>", False, "T", "<answer><answer>4</answer></answer>", Outcome.TAGGED),
        ("<think>T</think>So <answer>4</answer>.", False, "T", "So <answer>4</answer>.", Outcome.COMPLETE),
        ("<think>T</think>4</s>", False, "T", "4", Outcome.COMPLETE),
        ("<think>T</think>4[|endofturn|]\n<|im_end|>\n", False, "T", "4", Outcome.COMPLETE),
        ("<think>T</think></s>", False, "T", None, Outcome.EMPTY),
    ],
)  # fmt: skip
def test_what_models_write(text: str, opened: bool, trace: str | None, answer: str | None, outcome: Outcome) -> None:
    done = split(text, opened=opened)
    assert (done.trace, done.answer, done.outcome) == (trace, answer, outcome)


def test_a_named_convention_alone_ends_the_trace_and_the_others_guard_the_answer() -> None:
    reflecting = "<thinking>a <reflection>b</reflection> c</thinking> 4"
    assert split(reflecting).outcome is Outcome.AMBIGUOUS
    assert split(reflecting, convention=conventions.from_key("thinking")).answer == "4"
    assert split("<think>T</think>4", convention=conventions.from_key("thinking")).outcome is Outcome.AMBIGUOUS
    mine = conventions.from_key({"open": "BEGIN", "close": "END"})
    assert split("BEGIN T <think> END 4", convention=mine).answer == "4"
    assert split("BEGIN T", convention=mine).outcome is Outcome.UNCLOSED
    assert split("4", convention=NONE).answer == "4"
    assert split("<think>T</think>4", convention=NONE).outcome is Outcome.AMBIGUOUS


@pytest.mark.parametrize(
    "reason",
    ["content_filter", "error", "abort", "max_tokens", "tool_calls", "eos", "", "STOP", "unclosed_trace", "a b\n/c"],
)
def test_every_finish_reason_but_stop_means_cut_and_is_counted_under_its_name(reason: str) -> None:
    row = stored("p0", "<think>T</think>4", reason)
    done = completion_of(row, Asked())
    name = finish_name(reason)
    assert not finished(reason) and done.cut and not done.complete and done.reason == name
    assert name and name.isascii() and " " not in name and name not in {*Outcome, "stop", "length"}
    assert (finished("stop"), finished(None), finish_name("length")) == (True, True, None)
    assert completion_of(stored("p0", "<think>T</think>4", "length"), Asked()).reason == "answer_cut"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("thinkng", "'thinkng', and the nearest convention is 'thinking'"),
        ({"open": "<a>"}, "neither the name of a convention nor {open"),
        ({"open": "<a>", "close": " "}, "`close` of the value is not a text"),
        ({"open": "---", "close": "---"}, "the same text"),
        (7, "neither the name"),
    ],
)
def test_a_key_that_names_no_convention_is_refused_with_the_nearest(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PluginKeys.model_validate({"trace": value})


def test_the_names_of_the_table_are_told_apart_and_read_back_from_a_request() -> None:
    assert len({each.name for each in CONVENTIONS}) == len(CONVENTIONS)
    custom = conventions.from_key({"open": "<a>", "close": "</a>"})
    for how in (
        Asked(),
        Asked(True),
        Asked(False, NONE),
        Asked(True, CONVENTIONS[3]),
        Asked(False, custom, ("<stop>",)),
    ):
        assert asked({"body": {"metadata": how.metadata()}}) == how
    assert asked({"body": {}}, NONE) == Asked(False, NONE)
    assert asked({"body": {"metadata": {"trace": "opened"}}}, NONE) == Asked(True)
    granite = conventions.from_key("granite")
    assert asked({"body": {"metadata": Asked(True, CONVENTIONS[3]).metadata()}}, granite) == Asked(True, granite)


def test_a_checkpoints_template_tells_its_convention() -> None:
    thinking, instruct = build_tokenizer("thinking"), build_tokenizer("instruct")
    how = asked_of(thinking)
    assert how.opened and how.convention is not None and how.convention.name == "think" and how.ends == ()
    assert not asked_of(instruct).opened
    with pytest.raises(
        ThinkSwitchError, match=r"`thinkswitch.trace` is none, but the chat template of .* opens a trace"
    ):
        asked_of(thinking, NONE)
    for each in CONVENTIONS:
        if not any(marks._is_phrase(each, entry) for entry in each.opens[:1]):
            assert traces.template_opens_trace(f"user: 1\nassistant:{opening(each)}\n", each), each.name
            assert traces.template_opens_trace(f"user: 1\nassistant:{opening(each)}\n"), each.name
