"""Generations -> answer-only pairs, with a count of everything that was dropped and why.

One row of `pairs.jsonl`:

    {"messages": [{"role": "user", "content": "7*3+4*2"},
                  {"role": "assistant", "content": "0"}],
     "custom_id": "p00000-s0", "prompt_id": "p00000"}

With `loss: distribution` it holds `logprobs` as well, the entries of the answer's tokens (see `distributions`).
With the trace kept, one row of `rationales.jsonl`: the same and ``"trace": "7*3=1\n1+4=5\n5*2=0"``.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import AnswerKeys
from thinkswitch_plugin.conventions import Convention
from thinkswitch_plugin.data import answers, batch, distributions, formats, messages
from thinkswitch_plugin.data.batch import Asked
from thinkswitch_plugin.data.repeats import repeats
from thinkswitch_plugin.data.rows import rows_by_key
from thinkswitch_plugin.data.traces import Completion, Outcome, control_token, has_tag
from thinkswitch_plugin.errors import ThinkSwitchError

# Reasons beyond `Outcome`, which names what can be wrong with one completion.
MISSING = "not_generated"
NOT_CHOSEN = "not_selected"
NO_MAJORITY = "no_readable_answer"
DISAGREE = "samples_disagree"
CONTROL = "control_token"
NO_TRACE = "no_trace"
REPEATS = "answer_repeats_trace"
BEGINNING = 100  # characters of a completion that are shown
FIRST = AnswerKeys()  # type: ignore[call-arg]
FEWEST_TRACES = 0.1  # of the completions that came to an end; with fewer, the traces must be of a kind we do not know


@dataclass
class PairReport:
    """What happened to every prompt and sample; stored in `pairs.json`."""

    prompts: int = 0
    samples: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    prompts_without_pair: int = 0
    disagreed: list[str] = field(default_factory=list)  # ids of the prompts that `min_agreement` dropped
    unwrapped: int = 0  # answers taken out of `<answer>…</answer>` and the like
    duplicates: int = 0  # further lines for an id that is stored already
    unknown_ids: int = 0  # lines for an id that nobody asked

    def summary(self) -> str:
        """One line for people: `510 of 512 samples kept; dropped: 2 unclosed_trace`."""
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.dropped.most_common())
        parts = (
            (f"{self.kept} of {self.samples} samples kept", True),
            (f"dropped: {reasons}", reasons),
            (f"prompts dropped by `min_agreement`: {console.some(self.disagreed)}", self.disagreed),
            (f"{self.unwrapped} answers unwrapped", self.unwrapped),
            (f"{self.duplicates} lines left out whose id is stored twice", self.duplicates),
            (f"{self.unknown_ids} lines left out whose id nobody asked", self.unknown_ids),
        )
        return "; ".join(text for text, there in parts if there)

    def as_json(self) -> dict[str, Any]:
        """The counts as plain values; ``disagreed`` only if there are any."""
        found = {**vars(self), "dropped": dict(sorted(self.dropped.items()))}
        return {name: value for name, value in found.items() if name != "disagreed" or value}


def build_pairs(
    requests: Path,
    generations: Path,
    *,
    keys: AnswerKeys = FIRST,
    keep_trace: bool = False,
    convention: Convention | None = None,
    report: PairReport,
) -> Iterator[dict[str, Any]]:
    """Yield the pairs in the order of `requests`, counting into `report`; memory grows with ids only.

    Args:
        requests: OpenAI batch file; consecutive lines with one `body.metadata.prompt_id`
            are the samples of one prompt, and `trace` and `convention` beside it say how
            the completion is read.
        generations: its batch output, in any order. Of several lines with one id the first that is no
            failure counts; a torn last line is left out.
        keys: which samples become pairs: the `first` complete one, `all`, or by `vote` (the first complete one
            that gives the majority answer, which at least the share `min_agreement` of the complete ones must give).
        keep_trace: give each pair its `trace`, and drop those that `formats` cannot write.
        convention: how the recipe says that traces are written; None leaves it to each request.

    Raises:
        ThinkSwitchError: a file is missing, or a line is broken, named by file and line; or, when all are read, a
            trace is expected and (nearly) no completion has one that we can see.
    """
    if not generations.exists():
        raise ThinkSwitchError(f"{generations} does not exist; generate it first.")
    found = completions(requests, generations, convention, report)
    votes = answers.Votes()
    for prompt, group in itertools.groupby(found, key=lambda one: batch.prompt_id(one.request)):
        report.prompts += 1
        complete: list[tuple[AnsweredRequest, Completion]] = []
        for one in group:
            report.samples += 1
            outcome = judge(one.done, one.how, keep_trace=keep_trace) if one.done else MISSING
            if one.done and outcome == Outcome.COMPLETE:
                complete.append((one, one.done))
            else:
                report.dropped[outcome] += 1
        texts = [str(done.answer) for _, done in complete]
        chosen, reason = select(texts, keys)
        if keys.selection == "vote":
            votes.count([answers.extract(keys.kind, text) for text in texts])
        if reason == DISAGREE:
            report.disagreed.append(prompt)
        if len(complete) > len(chosen):
            report.dropped[reason] += len(complete) - len(chosen)
        report.kept += len(chosen)
        report.prompts_without_pair += not chosen
        for one, done in (complete[place] for place in chosen):
            report.unwrapped += done.wrapped
            turns = [*one.request["body"]["messages"], {"role": "assistant", "content": done.answer}]
            ids = {"custom_id": one.request["custom_id"], "prompt_id": batch.prompt_id(one.request)}
            if keep_trace:
                yield {"messages": turns, **ids, "trace": done.trace}
            else:
                yield {"messages": turns, **ids, **distributions.of_pair(one.request, one.stored, done)}
    votes.require_agreement(keys.kind, "set `thinkswitch.answers.selection: first`")


class AnsweredRequest(NamedTuple):
    """A request, how its completion is read, its completion (None if there is none), and the line and row of that."""

    request: dict[str, Any]
    how: Asked
    done: Completion | None
    stored: tuple[files.Line, dict[str, Any]] | None

    @property
    def tokens(self) -> int:
        """The tokens of the completion."""
        return batch.tokens_of(batch.completion_body(self.stored[1]) or {}) if self.stored else 0


def completions(
    requests: Path,
    generations: Path,
    convention: Convention | None = None,
    report: PairReport | None = None,
    ids: Container[str] | None = None,
) -> Iterator[AnsweredRequest]:
    """Yield every request, in order, with its completion; memory grows with ids only. Arguments as of `build_pairs`.

    Args:
        ids: only these requests; None for all.

    Raises `ThinkSwitchError` for a broken line, and at the end if (nearly) no completion has the trace that is expected.
    """
    asked = {request["custom_id"] for _, request in batch.read_requests(requests)}
    if not asked:
        raise ThinkSwitchError(f"{requests} holds no requests; delete it and run the stage `requests` again.")
    counts, guard = report or PairReport(), Guard()
    answered: dict[str, bool] = {}

    def key(where: files.Line, row: dict[str, Any]) -> str | None:
        custom_id = batch.stored_id(row, where)
        if custom_id not in asked:
            counts.unknown_ids += 1
            return None
        counts.duplicates += custom_id in answered
        if answered.get(custom_id):
            return None
        answered[custom_id] = batch.completion_body(row) is not None
        return custom_id

    with rows_by_key(generations, key, torn_end=True) as stored_row:
        for _, request in files.read_jsonl(requests):
            if ids is not None and request["custom_id"] not in ids:
                continue
            how, found = batch.asked(request, convention), stored_row(request["custom_id"])
            done = found and batch.completion_of(found[1], how)
            if found and done and how.thinks:
                guard.look_at(*found, done)
            yield AnsweredRequest(request, how, done, found)
    if report:
        guard.require_traces()


class Guard:
    """The guard that needs no list of conventions: traces are expected, and (nearly) none can be seen."""

    def __init__(self) -> None:
        self.whole = self.traced = 0
        self.first: tuple[files.Line, str] | None = None  # the first completion without a trace, and its beginning

    def look_at(self, where: files.Line, row: dict[str, Any], done: Completion) -> None:
        """Count a completion if it shows whether traces can be seen: it has one, or came to its end without."""
        if done.closed_trace:
            self.traced += 1
        elif done.cut or done.outcome in (Outcome.FAILED, Outcome.EMPTY):
            return
        elif self.first is None:
            trace, content = messages.parts(row["response"]["body"]["choices"][0]["message"])
            self.first = where, (trace or content).strip()[:BEGINNING]
        self.whole += 1

    def require_traces(self) -> None:
        """Raise `ThinkSwitchError` if (nearly) no completion has a trace."""
        if self.first is not None and self.traced < FEWEST_TRACES * self.whole:
            where, text = self.first
            raise ThinkSwitchError(
                f"{where}: of {self.whole} finished completions {self.traced} have a trace that "
                f"can be told from the answer; this one begins {text!r}: set `thinkswitch.trace` in the recipe to the "
                "convention in which this checkpoint writes its trace, to {open: …, close: …}, or, if it answers "
                "directly, to none."
            )


def judge(done: Completion, how: Asked, *, keep_trace: bool = False) -> str:
    """`complete`, or why a completion is dropped."""
    trace, answer = done.trace or "", done.answer
    if not done.complete or answer is None:
        return done.reason
    if done.trace is None and how.thinks:
        return NO_TRACE
    if control_token(answer) or any(end in answer for end in how.ends):
        return CONTROL
    if repeats(done.trace, answer):
        return REPEATS
    if keep_trace and not trace:
        return NO_TRACE
    if keep_trace and has_tag(trace):
        return Outcome.AMBIGUOUS
    if keep_trace and control_token(trace):
        return CONTROL
    if keep_trace and (formats.has_answer_tag(trace) or formats.has_answer_tag(answer)):
        return Outcome.TAGGED
    return Outcome.COMPLETE


def select(complete: Sequence[str], keys: AnswerKeys) -> tuple[Sequence[int], str]:
    """The places of those complete answers of one prompt that become pairs, and why the others do not."""
    if keys.selection == "vote":
        found = [answers.extract(keys.kind, answer) for answer in complete]
        winner = answers.majority(found)
        if winner is None:
            return [], NO_MAJORITY
        agrees = found.count(winner) >= (keys.min_agreement or 0) * len(found)
        return ([found.index(winner)], NOT_CHOSEN) if agrees else ([], DISAGREE)
    return range(len(complete))[: None if keys.selection == "all" else 1], NOT_CHOSEN


def write_pairs(
    requests: Path,
    generations: Path,
    out: Path,
    *,
    keys: AnswerKeys = FIRST,
    keep_trace: bool = False,
    convention: Convention | None = None,
) -> PairReport:
    """Write `pairs.jsonl` (or, with traces, `rationales.jsonl`) atomically, and beside it the counts as JSON.

    Raises `ThinkSwitchError` if not one pair is left.
    """
    report = PairReport()
    with files.atomic_file(out) as handle:
        rows = build_pairs(
            requests,
            generations,
            keys=keys,
            keep_trace=keep_trace,
            convention=convention,
            report=report,
        )
        for row in rows:
            handle.write(files.dumps_line(row))
        if report.kept == 0 and report.dropped[DISAGREE]:
            raise ThinkSwitchError(
                f"{generations}: the samples of no prompt agree enough ({report.summary()}); lower "
                "`answers.min_agreement` in the recipe, or increase `sampling.samples`."
            )
        if report.kept == 0:
            raise ThinkSwitchError(
                f"{generations} holds no complete answer ({report.summary()}); "
                "increase `sampling.max_tokens` in the recipe, or check the file."
            )
    files.write_json(out.with_suffix(".json"), {**report.as_json(), **keys.selecting()})
    return report
