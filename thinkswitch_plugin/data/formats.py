"""The two formats of an adaptive model; the first token of a completion says which one it is.

    pre    <think>            the trace, then the answer, as thinking checkpoints write it
           7*3=1
           1+4=5
           </think>

           5
    post   <answer>5</answer>   the answer, then the trace; inference stops at `</answer>`
           7*3=1
           1+4=5

Only completions are ever parsed, so tags inside a *prompt* are left alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from thinkswitch_plugin.data import traces
from thinkswitch_plugin.errors import ThinkSwitchError

Format = Literal["pre", "post"]
PRE: Format = "pre"
POST: Format = "post"
THINK = ("<think>", "</think>")
ANSWER = ("<answer>", "</answer>")
STOP = (ANSWER[1],)  # the stop strings of every generation in these formats, beside the end of turn

_ANSWER_TAG = re.compile(r"<\s*/?\s*answer\s*>", re.IGNORECASE)


@dataclass(frozen=True)
class Parsed:
    """A parsed completion. `form` is None if it starts with the token of neither format.

    `answer` is None unless it is there, whole, and free of tags. `closed` says that the
    answer's end was written: neither was it cut by the token limit nor its trace left open.
    """

    form: Format | None
    answer: str | None
    closed: bool


def render(form: Format, trace: str, answer: str) -> str:
    """The completion that holds a trace and an answer, without the end of turn.

    White space around both is taken away, so that `parse` gives the same answer back.
    Raises `ThinkSwitchError` for what `fault` names.
    """
    if problem := fault(trace, answer):
        raise ThinkSwitchError(f"Cannot write {answer[:40]!r} in the format {form!r}: {problem}.")
    trace, answer = trace.strip(), answer.strip()
    if form == PRE:
        return f"{THINK[0]}\n{trace}\n{THINK[1]}\n\n{answer}"
    return f"{ANSWER[0]}{answer}{ANSWER[1]}\n{trace}"


def parse(text: str, *, cut: bool = False) -> Parsed:
    """Read a completion in either format.

    Args:
        text: the completion as the model wrote it; whether the engine kept the stop string makes no
            difference, and so an answer that ended its turn without `</answer>` counts as whole.
        cut: generation stopped at the token limit. An answer whose end was written before counts as whole.
    """
    text = text.lstrip()
    if text.startswith(THINK[0]):
        done = traces.split(text, cut=cut)
        closed = done.outcome not in (traces.Outcome.UNCLOSED, traces.Outcome.CUT)
        return Parsed(PRE, _clean(done.answer) if done.complete and not done.wrapped else None, closed)
    if text.startswith(ANSWER[0]):
        answer, end, _ = text.removeprefix(ANSWER[0]).partition(ANSWER[1])
        closed = bool(end) or not cut
        return Parsed(POST, _clean(answer) if closed else None, closed)
    return Parsed(None, None, False)


def has_answer_tag(text: str) -> bool:
    """Whether an opening or closing answer tag occurs in the text."""
    return _ANSWER_TAG.search(text) is not None


def fault(trace: str | None, answer: str) -> str | None:
    """Why a trace and an answer cannot be written in these formats and read back, None if they can."""
    if not trace or not trace.strip():
        return "it has no trace"
    if not answer.strip():
        return "it has no answer"
    for name, text, found in (("trace", trace, traces.has_tag(trace)), ("answer", answer, traces.trace_mark(answer))):
        if found:
            return f"the {name} contains a trace tag"
        if has_answer_tag(text) or (name == "answer" and traces.wrapper_mark(text)):
            return f"the {name} contains an answer tag"
    return None


def _clean(answer: str | None) -> str | None:
    text = (answer or "").strip()
    return text if text and not traces.trace_mark(text) and not has_answer_tag(text) else None
