"""Split one completion of a reasoning model into its trace and its answer.

The shapes met in practice, with `<think>` for any convention of `conventions`, and what each becomes:

    <think>a</think>b          trace a, answer b
    a</think>b                 the chat template had opened the trace: trace a, answer b
    reasoning=a, content=b     a server that returned the trace apart
    b                          no mark of any convention: a direct answer, or, where the template had
                               opened the trace, a trace that never ended
    <think>a                   a trace that never ended: no answer
    a</think>b</think>c        more than one closing tag: which one ended the trace
                               cannot be known, so the answer is not fit for training
    a</think><answer>b</answer><|im_end|>    what encloses the answer, or ends the turn, is taken off

Only completions are ever split, so tags inside a *prompt* are left alone.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from thinkswitch_plugin.conventions import CONVENTIONS, ENDS, NONE, Convention
from thinkswitch_plugin.data import marks, messages
from thinkswitch_plugin.data.marks import Kind, Mark

# What ends a turn or opens another, and other tokens of chat formats: tokenized, it would be no text.
_CONTROL = re.compile(
    r"<(?:\|[A-Za-z0-9_:▁-]{1,40}\|?|[a-z_]{1,30}\||/s|eos|bos|pad|unused\d{1,4}|seed:(?:eos|bos|pad)|(?:start|end)_of_turn)>"
    rf"|{'|'.join(map(re.escape, ENDS))}"
    r"|</?｜[^<>｜]{1,40}｜|\]~b\]|<role>[A-Z]{4,12}</role>|\[/?INST\]|\[\|[A-Za-z_]{1,30}\|\]|◁[^◁▷]{1,40}▷"
)
_ENDS = re.compile(rf"(?:\s*(?:{'|'.join(map(re.escape, ENDS))}))+\s*\Z")
LENGTH = "length"  # the one finish reason that a larger token budget helps against
_LAST = {end[-1] for end in ENDS} | {""}
_CHANNELS = {each.name for each in CONVENTIONS if each.channels}
_OF_TRACES = (Kind.OPEN, Kind.CLOSE, Kind.GUARD)
_LONGEST_END = 400  # characters at the end of an answer in which the end of its turn is looked for


class Outcome(StrEnum):
    """What a completion turned out to be; all but `COMPLETE` are reasons to drop it."""

    COMPLETE = "complete"
    UNCLOSED = "unclosed_trace"  # the trace never ended
    CUT = "answer_cut"  # the trace ended, then the answer was cut
    EMPTY = "empty_answer"  # nothing but white space where the answer should be
    AMBIGUOUS = "ambiguous_tags"  # a tag inside what should be the answer, or no saying which one ended the trace
    TAGGED = "answer_tag"  # what encloses an answer (`<answer>`) is not closed, or nested
    FAILED = "failed"  # the server gave no completion for this request


@dataclass(frozen=True)
class Completion:
    """One split completion."""

    trace: str | None  # None where none was written
    answer: str | None
    outcome: Outcome
    cut: bool = False  # generation stopped before the end of the turn
    finish: str | None = None  # why, where it was not the token limit
    wrapped: bool = False  # the answer was enclosed in a wrapper, which is taken off

    @property
    def complete(self) -> bool:
        """Whether `answer` is a whole answer with no part of a trace in it."""
        return self.outcome is Outcome.COMPLETE

    @property
    def closed_trace(self) -> bool:
        """Whether a trace was written and ended (the paper's think ratio counts these)."""
        return self.trace is not None and self.outcome is not Outcome.UNCLOSED

    @property
    def reason(self) -> str:
        """The reason this completion is counted under: an unusual finish reason, otherwise the outcome."""
        return self.finish or self.outcome.value


def finished(finish_reason: str | None) -> bool:
    """Whether a completion is whole: the model ended its turn, or the server names no reason.

    Any other reason (`length`, `content_filter`, `error`, `tool_calls`, …) means that it was cut.
    """
    return finish_reason is None or finish_reason == "stop"


def finish_name(finish_reason: str | None) -> str | None:
    """What a cut completion is counted under, None for the token limit, whose outcomes have names of their own."""
    if finished(finish_reason) or finish_reason == LENGTH:
        return None
    name = re.sub(r"[^a-z0-9]+", "_", (finish_reason or "").lower()[:200]).strip("_")[:40]
    taken = {"", "stop", "length", *(outcome.value for outcome in Outcome)}
    return f"finish_{name or 'unnamed'}" if name in taken else name


def split(text: str, *, opened: bool = False, cut: bool = False, convention: Convention | None = None) -> Completion:
    """Split raw text that still holds its tags.

    The last closing tag ends the trace, so no trace text can reach `answer`.

    Args:
        opened: the chat template had already opened the trace, so that text without a closing tag is all trace.
        cut: generation stopped before the end of the turn.
        convention: how this checkpoint writes its traces; None looks for every convention of the table,
            `conventions.NONE` for no trace at all. A mark of another convention keeps an answer from being whole.
    """
    return replace(_split(text, opened, cut, convention), cut=cut)


def _split(text: str, opened: bool, cut: bool, convention: Convention | None) -> Completion:
    found = marks.find(text, convention)
    steps = [m for m in found if m.kind in (Kind.OPEN, Kind.CLOSE)]
    closings = [m for m in steps if m.kind is Kind.CLOSE]
    if not closings:
        if opened or steps:
            return Completion(_strip_open(text, steps), None, Outcome.UNCLOSED)
        return _with_answer(None, text, found, 0, cut)
    last = closings[-1]
    trace = _strip_open(text[: last.start], steps)
    if steps[-1] is not last:
        return Completion(trace, None, Outcome.UNCLOSED)
    if not _ends(text, steps, opened):
        return Completion(trace, None, Outcome.AMBIGUOUS)
    done = _with_answer(trace, text, found, last.end, cut)
    return replace(done, outcome=Outcome.AMBIGUOUS) if done.complete and len(closings) > 1 else done


def split_apart(reasoning: str, content: str | None, *, cut: bool = False) -> Completion:
    """Take a completion whose server had already moved the trace into `reasoning`.

    Without content nothing shows that the trace ended: a parser that expects a trace
    takes a text without any tag for one, whatever the finish reason.
    """
    content = content or ""
    trace = _strip_open(reasoning, marks.find(reasoning[:200]))
    if not content.strip():
        return Completion(trace, None, Outcome.UNCLOSED)
    return _with_answer(trace, content, marks.find(content, NONE), 0, cut)


def split_message(
    message: dict[str, Any],
    *,
    opened: bool = False,
    finish_reason: str | None = None,
    convention: Convention | None = None,
) -> Completion:
    """Split the `message` of an OpenAI chat completion; without a reasoning parser its `content` holds the trace."""
    cut = not finished(finish_reason)
    reasoning, content = messages.parts(message)
    if reasoning.strip():
        done = split_apart(reasoning, content, cut=cut)
    else:
        done = split(content, opened=opened, cut=cut, convention=convention)
    return replace(done, cut=cut, finish=finish_name(finish_reason))


def has_tag(text: str) -> bool:
    """Whether a tag of any convention occurs in the text."""
    return any(m.kind in _OF_TRACES for m in marks.tags(text))


def trace_mark(text: str) -> str | None:
    """The first mark of a trace, of any convention, in what should be an answer: a tag, or at its start a phrase."""
    found = next((m for m in marks.find(text) if m.kind in _OF_TRACES), None)
    return text[found.start : found.end].strip() if found else None


def wrapper_mark(text: str) -> str | None:
    """The wrapper (`<answer>`) that encloses a whole answer, or is broken in it; None for one around a part of it."""
    rest = [m for m in marks.find(text) if m.kind in (Kind.WRAP, Kind.UNWRAP)]
    found = _unwrapped(text, rest, 0)
    return text[rest[0].start : rest[0].end] if found is None or found[1] else None


def control_token(text: str) -> str | None:
    """The first token of a chat format (`<|im_end|>`) in a text: tokenized, it would end the turn there."""
    found = _CONTROL.search(text)
    return found.group() if found else None


def opens_trace(
    tokenizer: Any, convention: Convention | None = None, arguments: Mapping[str, Any] | None = None
) -> bool:
    """Whether a tokenizer's chat template, with these arguments, opens the trace in its generation prompt."""
    return template_opens_trace(generation_prompt(tokenizer, arguments), convention)


def template_opens_trace(rendered_prompt: str, convention: Convention | None = None) -> bool:
    """Whether a rendered generation prompt ends inside a trace (as Qwen3-Thinking-2507's does)."""
    return _opened_by(rendered_prompt, convention) is not None


def convention_of(tokenizer: Any, arguments: Mapping[str, Any] | None = None) -> Convention | None:
    """The convention in which a checkpoint writes its traces, as far as its chat template shows.

    It is the one in which the generation prompt ends, else the only one of which the template has tags.
    """
    name = _opened_by(generation_prompt(tokenizer, arguments), None)
    if name is None:
        template = getattr(tokenizer, "chat_template", None)
        names = {m.name for m in marks.tags(template)} if isinstance(template, str) else set()
        if len(names) != 1:
            return None
        (name,) = names
    return next((each for each in CONVENTIONS if each.name == name), None)


def generation_prompt(tokenizer: Any, arguments: Mapping[str, Any] | None = None) -> str:
    """What a checkpoint is given for a one-letter question."""
    turns = [{"role": "user", "content": "x"}]
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, **(arguments or {})))


def _opened_by(rendered_prompt: str, convention: Convention | None) -> str | None:
    """The name of the convention whose opening a rendered prompt ends with."""
    steps = [m for m in marks.find(rendered_prompt, convention) if m.kind in (Kind.OPEN, Kind.CLOSE)]
    if not steps or steps[-1].kind is not Kind.OPEN or rendered_prompt[steps[-1].end :].strip():
        return None
    return steps[-1].name


def _ends(text: str, steps: Sequence[Mark], opened: bool) -> bool:
    """Whether the last closing mark ends the outermost trace.

    It does not where it belongs to a block inside (`<think>a<think>b</think>c`), or to another convention than
    what was opened (`<think>a</analysis>b`): what follows may still be trace.
    """
    depth: list[str | None] = [None] if opened else []  # None: opened by the template, in a convention not known here
    before = 0
    for mark in steps:
        if mark.kind is Kind.OPEN:
            again = depth and depth[-1] in (None, mark.name) and not text[before : mark.start].strip()
            if again or (mark.name in depth and mark.name in _CHANNELS):
                depth.pop()  # written twice, or again after the template
            depth.append(mark.name)
        elif mark.name in depth:
            del depth[len(depth) - 1 - depth[::-1].index(mark.name) :]
        elif None in depth:
            depth.clear()
        before = mark.end
    return not depth


def _with_answer(trace: str | None, text: str, found: Sequence[Mark], start: int, cut: bool) -> Completion:
    """The completion whose answer begins at `start` of a text with these marks."""
    rest = [m for m in found if m.start >= start]
    if marks.phrase_at_start(text, start) or any(m.kind in _OF_TRACES for m in rest):
        return Completion(trace, None, Outcome.AMBIGUOUS)
    if cut:
        return Completion(trace, without_end(text[start:]).strip() or None, Outcome.CUT)
    found_answer = _unwrapped(text, rest, start)
    if found_answer is None:
        return Completion(trace, text[start:].strip() or None, Outcome.TAGGED)
    answer, wrapped = found_answer
    return Completion(trace, answer or None, Outcome.COMPLETE if answer else Outcome.EMPTY, wrapped=wrapped)


def _unwrapped(text: str, rest: Sequence[Mark], start: int) -> tuple[str, bool] | None:
    """An answer without the wrapper that encloses all of it, if one does, and whether; None where one is broken.

    A wrapper around a part (`So it is <answer>4</answer>.`) is as the prompt asked, and stays.
    """
    whole = without_end(text[start:]).strip()
    for opening, closing in itertools.zip_longest(rest[::2], rest[1::2]):
        if closing is None or (opening.kind, closing.kind, closing.name) != (Kind.WRAP, Kind.UNWRAP, opening.name):
            return None  # not closed, or nested
    if len(rest) != 2 or text[start : rest[0].start].strip() or without_end(text[rest[1].end :]).strip():
        return whole, False
    return without_end(text[rest[0].end : rest[1].start]).strip(), True


def without_end(text: str) -> str:
    """A text without the strings at its very end that end a turn (`<|im_end|>`)."""
    if text.rstrip()[-1:] not in _LAST:
        return text
    place = max(0, len(text) - _LONGEST_END)
    return text[:place] + _ENDS.sub("", text[place:])


def end_mark(text: str) -> str | None:
    """The string that ends a turn at the very end of a text, if there is one."""
    return text[len(without_end(text)) :].strip() or None


def _strip_open(trace: str, steps: Sequence[Mark]) -> str:
    """A trace without the openings it begins with."""
    start = 0
    for mark in steps:
        if mark.kind is not Kind.OPEN or mark.end > len(trace) or trace[start : mark.start].strip():
            break
        start = mark.end
    return trace[start:].strip()
