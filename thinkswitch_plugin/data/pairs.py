"""Generations -> answer-only pairs, with a count of everything that was dropped and why.

One row of `pairs.jsonl`:

    {"messages": [{"role": "user", "content": "7*3+4*2"},
                  {"role": "assistant", "content": "0"}],
     "custom_id": "p00000-s0", "prompt_id": "p00000"}

With the trace kept, one row of `rationales.jsonl`: the same and ``"trace": "7*3=1\n1+4=5\n5*2=0"``.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from thinkswitch_plugin import files
from thinkswitch_plugin.conventions import Convention
from thinkswitch_plugin.data import answers, batch, formats
from thinkswitch_plugin.data.batch import Asked
from thinkswitch_plugin.data.guard import Guard
from thinkswitch_plugin.data.repeats import repeats
from thinkswitch_plugin.data.traces import Completion, Outcome, control_token, has_tag
from thinkswitch_plugin.errors import ThinkSwitchError

# Reasons beyond `Outcome`, which names what can be wrong with one completion.
MISSING = "not_generated"
NOT_CHOSEN = "not_selected"
NO_MAJORITY = "no_readable_answer"
CONTROL = "control_token"
NO_TRACE = "no_trace"
REPEATS = "answer_repeats_trace"


@dataclass
class PairReport:
    """What happened to every prompt and sample; stored in `pairs.json`."""

    prompts: int = 0
    samples: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    prompts_without_pair: int = 0
    unwrapped: int = 0  # answers taken out of `<answer>…</answer>` and the like
    duplicates: int = 0  # further lines for an id that is stored already
    unknown_ids: int = 0  # lines for an id that nobody asked

    def summary(self) -> str:
        """One line for people: `510 of 512 samples kept; dropped: 2 unclosed_trace`."""
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.dropped.most_common())
        parts = (
            (f"{self.kept} of {self.samples} samples kept", True),
            (f"dropped: {reasons}", reasons),
            (f"{self.unwrapped} answers unwrapped", self.unwrapped),
            (f"{self.duplicates} lines left out whose id is stored twice", self.duplicates),
            (f"{self.unknown_ids} lines left out whose id nobody asked", self.unknown_ids),
        )
        return "; ".join(text for text, there in parts if there)

    def as_json(self) -> dict[str, Any]:
        """The counts as plain values."""
        return {**vars(self), "dropped": dict(sorted(self.dropped.items()))}


@dataclass(frozen=True, slots=True)
class _Stored:
    """What a stored line comes to; a whole answer lies in the spill at `start`, `length` bytes long,
    and behind it the trace, if that is kept."""

    outcome: str
    wrapped: bool = False
    start: int = 0
    length: int = 0
    trace: int = 0  # bytes


def build_pairs(
    requests: Path,
    generations: Path,
    *,
    selection: str = "first",
    answer_kind: str = "exact",
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
        selection: `first` complete sample, `all`, or `vote` (the first complete sample
            that gives the majority answer).
        answer_kind: how `vote` reads a final answer, a key of `answers.EXTRACTORS`.
        keep_trace: give each pair its `trace`, and drop those that `formats` cannot write.
        convention: how the recipe says that traces are written; None leaves it to each request.

    Raises:
        ThinkSwitchError: a file is missing, or a line is broken, named by file and line; or a trace is expected
            and (nearly) no completion has one that we can see.
    """
    if not generations.exists():
        raise ThinkSwitchError(f"{generations} does not exist; generate it first.")
    asked = read_asked(requests, convention)
    if not asked:
        raise ThinkSwitchError(f"{requests} holds no requests; delete it and run the stage `requests` again.")
    with tempfile.TemporaryFile(dir=_spill_folder(generations)) as spill:
        stored = _read_generations(generations, asked, spill, report, keep_trace=keep_trace)
        for _, group in itertools.groupby((row for _, row in files.read_jsonl(requests)), key=batch.prompt_id):
            members = list(group)
            report.prompts += 1
            report.samples += len(members)
            complete: list[tuple[dict[str, Any], str]] = []
            for request in members:
                found = stored.get(request["custom_id"])
                if found is not None and found.outcome == Outcome.COMPLETE:
                    spill.seek(found.start)
                    complete.append((request, spill.read(found.length).decode()))
                else:
                    report.dropped[found.outcome if found else MISSING] += 1
            chosen, reason = select(complete, selection, answer_kind)
            if len(complete) > len(chosen):
                report.dropped[reason] += len(complete) - len(chosen)
            report.kept += len(chosen)
            report.prompts_without_pair += not chosen
            for request, answer in chosen:
                found = stored[request["custom_id"]]
                report.unwrapped += found.wrapped
                spill.seek(found.start + found.length)
                trace = {"trace": spill.read(found.trace).decode()} if keep_trace else {}
                turns = [*request["body"]["messages"], {"role": "assistant", "content": answer}]
                ids = {"custom_id": request["custom_id"], "prompt_id": batch.prompt_id(request)}
                yield {"messages": turns, **ids, **trace}


def _spill_folder(generations: Path) -> Path | None:
    # The folder of the generations has room for their answers; /tmp may be in memory.
    return generations.parent if os.access(generations.parent, os.W_OK) else None


def read_asked(requests: Path, convention: Convention | None = None) -> dict[str, Asked]:
    """How the completion of every request is read, by id. Raises `ThinkSwitchError` as `batch.read_requests`."""
    known: dict[Asked, Asked] = {}  # one object for all that are alike
    found = {}
    for _, request in batch.read_requests(requests):
        how = batch.asked(request, convention)
        found[request["custom_id"]] = known.setdefault(how, how)
    return found


def completions(
    generations: Path, asked: dict[str, Asked], report: PairReport
) -> Iterator[tuple[int, dict[str, Any], Completion]]:
    """Yield line number, row and split completion of the stored lines that count, in the order of the file.

    An id comes twice only where an answer follows a failure. Lines that do not count are counted in `report`.
    """
    answered: dict[str, bool] = {}
    for number, row in files.read_jsonl(generations, torn_end=True):
        custom_id = batch.stored_id(row, generations, number)
        if custom_id not in asked:
            report.unknown_ids += 1
            continue
        if custom_id in answered:
            report.duplicates += 1
            if answered[custom_id]:
                continue
        done = batch.completion_of(row, asked[custom_id])
        answered[custom_id] = done.outcome is not Outcome.FAILED
        yield number, row, done


def _read_generations(
    generations: Path, asked: dict[str, Asked], spill: IO[bytes], report: PairReport, *, keep_trace: bool
) -> dict[str, _Stored]:
    """What became of every request, by id; whole answers, and traces if they are kept, go into `spill`."""
    stored: dict[str, _Stored] = {}
    guard = Guard(generations)
    for number, row, done in completions(generations, asked, report):
        custom_id = row["custom_id"]
        outcome, *texts = judge(done, asked[custom_id], keep_trace=keep_trace)
        if asked[custom_id].thinks:
            guard.look_at(number, row, done)
        answer, trace = (text.encode() for text in texts)
        stored[custom_id] = _Stored(outcome, done.wrapped, spill.tell(), len(answer), len(trace))
        spill.write(answer + trace)
    guard.require_traces()
    return stored


def judge(done: Completion, how: Asked, *, keep_trace: bool = False) -> tuple[str, str, str]:
    """Outcome, whole answer, and trace if it is kept (both empty unless complete), of one completion."""
    if not done.complete or done.answer is None:
        return done.reason, "", ""
    if done.trace is None and how.thinks:
        return NO_TRACE, "", ""
    if control_token(done.answer) or any(end in done.answer for end in how.ends):
        return CONTROL, "", ""
    if repeats(done.trace, done.answer):
        return REPEATS, "", ""
    if not keep_trace:
        return done.outcome.value, done.answer, ""
    if problem := _fault_of_trace(done.trace, done.answer):
        return problem, "", ""
    return done.outcome.value, done.answer, done.trace or ""


def _fault_of_trace(trace: str | None, answer: str) -> str | None:
    """Why a whole completion is not fit for the formats with a trace, as a reason to drop it."""
    if not trace:
        return NO_TRACE
    if has_tag(trace):
        return Outcome.AMBIGUOUS.value
    if control_token(trace):
        return CONTROL
    return Outcome.TAGGED.value if formats.has_answer_tag(trace) or formats.has_answer_tag(answer) else None


def select(
    complete: list[tuple[dict[str, Any], str]], selection: str, answer_kind: str
) -> tuple[list[tuple[dict[str, Any], str]], str]:
    """The samples of one prompt that become pairs, and why the others do not."""
    if selection == "all":
        return complete, NOT_CHOSEN
    if selection == "vote":
        found = [answers.extract(answer_kind, answer) for _, answer in complete]
        winner = answers.majority(found)
        if winner is None:
            return [], NO_MAJORITY
        return [complete[found.index(winner)]], NOT_CHOSEN
    return complete[:1], NOT_CHOSEN


def write_pairs(
    requests: Path,
    generations: Path,
    out: Path,
    *,
    selection: str,
    answer_kind: str,
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
            selection=selection,
            answer_kind=answer_kind,
            keep_trace=keep_trace,
            convention=convention,
            report=report,
        )
        for row in rows:
            handle.write(files.dumps_line(row))
        if report.kept == 0:
            raise ThinkSwitchError(
                f"{generations} holds no complete answer ({report.summary()}); "
                "increase `sampling.max_tokens` in the recipe, or check the file."
            )
    files.write_json(out.with_suffix(".json"), {**report.as_json(), "selection": selection})
    return report
