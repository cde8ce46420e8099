"""The two formats of an adaptive model: parsing returns what was written, and nothing else counts as an answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkswitch_plugin.data import traces
from thinkswitch_plugin.data.formats import POST, PRE, STOP, Format, Parsed, fault, parse, render
from thinkswitch_plugin.errors import ThinkSwitchError

FORMS = st.sampled_from([PRE, POST])
# Parts of tags next to ordinary text: incomplete tags must pass through unchanged.
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(["<", ">", "/", "think", "answer", "<think>", "</think>", "<answer>", "</ANSWER>", "[", "\n"]),
        st.text(max_size=12),
    ),
    max_size=6,
).map("".join)
CLEAN = TEXTS.map(lambda text: "7" if fault("x", text) else text)


def test_the_two_formats_letter_by_letter() -> None:
    assert render(PRE, "2+3=5", "5") == "<think>\n2+3=5\n</think>\n\n5"
    assert render(POST, "2+3=5", "5") == "<answer>5</answer>\n2+3=5"


@given(form=FORMS, trace=TEXTS, answer=TEXTS)
def test_what_is_rendered_is_parsed_back_or_refused(form: Format, trace: str, answer: str) -> None:
    if fault(trace, answer):
        with pytest.raises(ThinkSwitchError):
            render(form, trace, answer)
        return
    text = render(form, trace, answer)
    assert parse(text) == Parsed(form, answer.strip(), True)
    if form == PRE:
        assert traces.split(text).trace == trace.strip()


@given(form=FORMS, trace=CLEAN, answer=CLEAN, at=st.integers(0, 200))
def test_a_completion_that_was_cut_never_gives_another_answer(form: Format, trace: str, answer: str, at: int) -> None:
    text = render(form, trace, answer)
    assert parse(text[:at], cut=True).answer in (None, answer.strip())


@given(text=TEXTS, cut=st.booleans())
def test_no_text_gives_an_answer_that_holds_a_tag(text: str, cut: bool) -> None:
    for whole in (text, "<think>" + text, "<answer>" + text):
        found = parse(whole, cut=cut)
        if found.answer is not None:
            assert found.form and found.closed and fault("x", found.answer) is None


@pytest.mark.parametrize(
    ("text", "cut", "parsed"),
    [
        ("<answer>5</answer>", False, Parsed(POST, "5", True)),
        ("<answer>5", False, Parsed(POST, "5", True)),  # the engine took the stop string away
        ("<answer>5", True, Parsed(POST, None, False)),
        ("<answer>5</answer>\n2+", True, Parsed(POST, "5", True)),
        ("<answer></answer>", False, Parsed(POST, None, True)),
        ("<answer>4<answer>5</answer>", False, Parsed(POST, None, True)),
        ("<answer>4</think>5</answer>", False, Parsed(POST, None, True)),
        ("<think>\n2+3=5\n</think>\n\n5", False, Parsed(PRE, "5", True)),
        ("<think>\n2+3=5\n</think>\n\n5", True, Parsed(PRE, None, False)),
        ("<think>\n2+3=5", False, Parsed(PRE, None, False)),  # also: the stop string stood inside the trace
        ("<think>\n2+3=5\n</think>\n\n", False, Parsed(PRE, None, True)),
        ("<think>a</think>4</think>5", False, Parsed(PRE, None, True)),
        ("<think>a</think><answer>5</answer>", False, Parsed(PRE, None, True)),
        ("5", False, Parsed(None, None, False)),
        ("2+3=5</think>5", False, Parsed(None, None, False)),
        ("", False, Parsed(None, None, False)),
    ],
)
def test_completions_as_models_write_them(text: str, cut: bool, parsed: Parsed) -> None:
    assert parse(text, cut=cut) == parsed


@given(trace=CLEAN, answer=CLEAN)
def test_generation_of_an_answer_first_stops_right_behind_it(trace: str, answer: str) -> None:
    assert render(POST, trace, answer).find(STOP[0]) == len("<answer>" + answer.strip())
    assert STOP[0] not in render(PRE, trace, answer)
