"""The verdict on one completion: the only definition of cut, closed trace, final answer, correct and think ratio.

lm-eval's metrics, the report, sweeps, the switch and `thinkswitch score` all use it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkswitch_plugin.conventions import NONE, Convention
from thinkswitch_plugin.data import answers, batch, pairs, traces

CUT_FROM = 0.99  # of the budget: text seldom encodes to exactly the ids it was decoded from


class Answered(str):
    """A completion as it passes through lm-eval: its text, which knows how the engine ended it."""

    completion: traces.Completion

    @classmethod
    def of(cls, text: str, completion: traces.Completion) -> Answered:
        """The text of a completion together with how it was split."""
        made = cls(text)
        made.completion = completion
        return made


@dataclass(frozen=True, slots=True)
class Verdict:
    """One completion graded.

    Attributes:
        cut: generation stopped before the end of the turn.
        closed_trace: a trace was written and ended.
        answer: the final answer as it was read, None without one.
        correct: None if there is no gold answer, or one that cannot be read.
    """

    cut: bool
    closed_trace: bool
    answer: str | None
    correct: bool | None


def verdict_on(
    kind: str, done: traces.Completion, gold: str | None, letters: Mapping[str, str] | None = None
) -> Verdict:
    """Grade one completion.

    Args:
        kind: how final answers are read, a key of `KINDS`.
        done: the completion, split.
        letters: what the letters of the options stand for.
    """
    found = final_answer(kind, done, letters)
    right = None if gold is None else answers.gold(kind, gold)
    return Verdict(done.cut, done.closed_trace, found, None if right is None else answers.is_right(kind, found, right))


def convention_read(convention: Convention | None) -> Convention | None:
    """The recipe's convention as both checkpoints are read by it: `none` speaks only of what is trained on."""
    return None if convention is NONE else convention


def how_read(tokenizer: Any, convention: Convention | None, arguments: Mapping[str, Any] | None = None) -> batch.Asked:
    """How a checkpoint is asked and its completions are read when it is evaluated; see `batch.asked_of`."""
    return batch.asked_of(tokenizer, convention_read(convention), arguments)


def final_answer(kind: str, done: traces.Completion, letters: Mapping[str, str] | None = None) -> str | None:
    """The final answer of a split completion; of an unfinished one, what it had stated as final."""
    read = answers.extract_unfinished if done.cut else answers.extract
    return read(kind, done.answer, letters)


def final_answers(
    requests: Path, generations: Path, kind: str, convention: Convention | None = None
) -> Iterator[tuple[str, list[tuple[str | None, int]]]]:
    """The id of every prompt, with the final answer (None if none can be read) and the tokens of each answered sample.

    Raises `ThinkSwitchError` as `pairs.completions`, whose arguments these are.
    """
    every = pairs.completions(requests, generations, convention)
    for prompt_id, group in itertools.groupby(every, key=lambda one: batch.prompt_id(one.request)):
        done = [(one.done, one.tokens) for one in group if one.done and one.done.outcome is not traces.Outcome.FAILED]
        yield prompt_id, [(final_answer(kind, completion), tokens) for completion, tokens in done]


def split(text: str) -> traces.Completion:
    """A completion from lm-eval: as its engine ended it, or as far as the text alone shows."""
    return text.completion if isinstance(text, Answered) else traces.split(text)


def is_cut(tokens: int, budget: int) -> bool:
    """Whether a completion was cut, if only its text is known: its tokens, counted by encoding it again, come near its budget.

    Where an engine's finish reason is known, that decides instead.
    """
    return tokens >= CUT_FROM * budget


def think_ratio(closed: float, whole: float) -> float:
    """Completions that closed a trace ÷ completions that were not cut; 0 if all were cut.

    Args:
        closed: how many of the whole ones closed a trace.
    """
    return closed / whole if whole else 0.0
