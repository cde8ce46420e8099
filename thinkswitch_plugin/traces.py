"""Split one completion of a reasoning model into its trace and its answer.

The shapes met in practice, and what each becomes:

    <think>a</think>b          trace a, answer b
    a</think>b                 the chat template had opened the trace: trace a, answer b
    reasoning=a, content=b     a server that returned the trace apart
    b                          no tag: a direct answer, or, where the template had
                               opened the trace, a trace that never ended
    <think>a                   a trace that never ended: no answer
    a</think>b</think>c        more than one closing tag: which one ended the trace
                               cannot be known, so the answer is not fit for training

Only completions are ever split, so tags inside a *prompt* are left alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

# Qwen's pair first, then what other model families write. Each pattern begins with its one literal
# character, which makes the search several times as fast as one pattern for all.
_NAMES = r"(?:think|thinking|thought|reasoning)"
_OPEN = (
    re.compile(rf"<(?:\s*{_NAMES}\s*>|\|begin_of_thought\|>)", re.IGNORECASE),
    re.compile(r"\[THINK\]", re.IGNORECASE),
)
_CLOSE = (
    re.compile(rf"<(?:\s*/\s*{_NAMES}\s*>|\|end_of_thought\|>)", re.IGNORECASE),
    re.compile(r"\[/THINK\]", re.IGNORECASE),
)
# What ends a turn or opens another: Qwen and most, DeepSeek, Gemma, Mistral and Llama 2.
_CONTROL = re.compile(r"<\|[A-Za-z0-9_]{1,40}\|>|<｜[^<>｜]{1,40}｜>|<(?:start|end)_of_turn>|\[/?INST\]")


class Outcome(StrEnum):
    """What a completion turned out to be; all but `COMPLETE` are reasons to drop it."""

    COMPLETE = "complete"
    UNCLOSED = "unclosed_trace"  # the trace never ended
    CUT = "answer_cut"  # the trace ended, then the token limit cut the answer
    EMPTY = "empty_answer"  # nothing but white space where the answer should be
    AMBIGUOUS = "ambiguous_tags"  # a tag inside what should be the answer
    FAILED = "failed"  # the server gave no completion for this request


@dataclass(frozen=True)
class Completion:
    """One split completion. `trace` is None where none was written."""

    trace: str | None
    answer: str | None
    outcome: Outcome

    @property
    def complete(self) -> bool:
        """Whether `answer` is a whole answer with no part of a trace in it."""
        return self.outcome is Outcome.COMPLETE

    @property
    def closed_trace(self) -> bool:
        """Whether a trace was written and ended (the paper's think ratio counts these)."""
        return self.trace is not None and self.outcome is not Outcome.UNCLOSED


def split(text: str, *, opened: bool = False, cut: bool = False) -> Completion:
    """Split raw text that still holds its tags.

    Args:
        text: the completion as the model wrote it.
        opened: the chat template had already opened the trace, so that text
            without a closing tag is all trace.
        cut: generation stopped at the token limit.

    Returns:
        The last closing tag ends the trace, so no trace text can reach `answer`.
    """
    closings = _find(_CLOSE, text)
    if not closings:
        if opened or _occurs(_OPEN, text):
            return Completion(_strip_open(text), None, Outcome.UNCLOSED)
        return _with_answer(None, text, cut)
    start, end = closings[-1]
    trace, answer = _strip_open(text[:start]), text[end:]
    if _occurs(_OPEN, answer):
        return Completion(trace, None, Outcome.UNCLOSED)
    done = _with_answer(trace, answer, cut)
    if done.complete and len(closings) > 1:
        return Completion(trace, done.answer, Outcome.AMBIGUOUS)
    return done


def split_apart(reasoning: str, content: str | None, *, cut: bool = False) -> Completion:
    """Take a completion whose server had already moved the trace into `reasoning`.

    Without content nothing shows that the trace ended: a parser that expects a trace
    takes a text without any tag for one, whatever the finish reason.
    """
    content = content or ""
    if has_tag(content):
        return Completion(reasoning, None, Outcome.AMBIGUOUS)
    if not content.strip():
        return Completion(_strip_open(reasoning), None, Outcome.UNCLOSED)
    return _with_answer(_strip_open(reasoning), content, cut)


def split_message(message: dict[str, Any], *, opened: bool = False, finish_reason: str | None = None) -> Completion:
    """Split the `message` of an OpenAI chat completion.

    vLLM names the separate trace `reasoning`, transformers and others `reasoning_content`.
    A server without a reasoning parser leaves it in `content`.
    """
    cut = finish_reason == "length"
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    content = message.get("content")
    if reasoning:
        return split_apart(str(reasoning), content, cut=cut)
    return split(content or "", opened=opened, cut=cut)


def has_tag(text: str) -> bool:
    """Whether any opening or closing trace tag occurs in the text."""
    return _occurs(_OPEN, text) or _occurs(_CLOSE, text)


def control_token(text: str) -> str | None:
    """The first token of a chat format (`<|im_end|>`) in a text: tokenized, it would end the turn there."""
    found = _CONTROL.search(text)
    return found.group() if found else None


def opens_trace(tokenizer: Any) -> bool:
    """Whether a tokenizer's chat template opens the trace in its generation prompt."""
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], add_generation_prompt=True, tokenize=False
    )
    return template_opens_trace(str(rendered))


def template_opens_trace(rendered_prompt: str) -> bool:
    """Whether a rendered generation prompt ends inside a trace (as Qwen3-Thinking-2507's does)."""
    openings, closings = _find(_OPEN, rendered_prompt), _find(_CLOSE, rendered_prompt)
    if not openings or rendered_prompt[openings[-1][1] :].strip():
        return False
    return not closings or closings[-1] < openings[-1]


def _find(patterns: tuple[re.Pattern[str], ...], text: str) -> list[tuple[int, int]]:
    """Start and end of every match, in order."""
    return sorted(match.span() for pattern in patterns for match in pattern.finditer(text))


def _occurs(patterns: tuple[re.Pattern[str], ...], text: str) -> bool:
    return any(pattern.search(text) for pattern in patterns)


def _with_answer(trace: str | None, answer: str, cut: bool) -> Completion:
    text = answer.strip()
    if cut:
        return Completion(trace, text or None, Outcome.CUT)
    return Completion(trace, text or None, Outcome.COMPLETE if text else Outcome.EMPTY)


def _strip_open(trace: str) -> str:
    text = trace.strip()
    match = next((m for pattern in _OPEN if (m := pattern.match(text))), None)
    return text[match.end() :].strip() if match else text
