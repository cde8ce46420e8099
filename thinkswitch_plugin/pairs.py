"""Generations -> answer-only pairs, with a count of everything that was dropped and why.

One row of `pairs.jsonl`:

    {"messages": [{"role": "user", "content": "7*3+4*2"},
                  {"role": "assistant", "content": "0"}],
     "custom_id": "p00000-s0", "prompt_id": "p00000"}
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

from thinkswitch_plugin import answers, batch, files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.traces import Completion, Outcome, control_token, split_message

# Reasons beyond `Outcome`, which names what can be wrong with one completion.
MISSING = "not_generated"
NOT_CHOSEN = "not_selected"
NO_MAJORITY = "no_readable_answer"
CONTROL = "control_token"


@dataclass
class PairReport:
    """What became of every prompt and sample; `pairs.json` holds it."""

    prompts: int = 0
    samples: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    prompts_without_pair: int = 0
    duplicates: int = 0  # further lines for an id that is stored already
    unknown_ids: int = 0  # lines for an id that nobody asked

    def summary(self) -> str:
        """One line for people: `510 of 512 samples kept; dropped: 2 unclosed_trace`."""
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.dropped.most_common())
        text = f"{self.kept} of {self.samples} samples kept" + (f"; dropped: {reasons}" if reasons else "")
        if self.duplicates:
            text += f"; {self.duplicates} lines left out whose id is stored twice"
        if self.unknown_ids:
            text += f"; {self.unknown_ids} lines left out whose id nobody asked"
        return text

    def as_json(self) -> dict[str, Any]:
        """The counts as plain values."""
        return {
            "prompts": self.prompts,
            "samples": self.samples,
            "kept": self.kept,
            "dropped": dict(sorted(self.dropped.items())),
            "prompts_without_pair": self.prompts_without_pair,
            "duplicates": self.duplicates,
            "unknown_ids": self.unknown_ids,
        }


@dataclass(frozen=True, slots=True)
class _Stored:
    """What a stored line comes to; a whole answer lies in the spill at `start`, `length` bytes long."""

    outcome: str
    start: int = 0
    length: int = 0


def build_pairs(
    requests: Path,
    generations: Path,
    *,
    selection: str = "first",
    answer_kind: str = "exact",
    report: PairReport,
) -> Iterator[dict[str, Any]]:
    """Yield the pairs in the order of `requests`, counting into `report` on the way.

    Each file is read from front to back, the generations once: answers, without their traces, wait in
    an unnamed temporary file, so memory grows with ids only.

    Args:
        requests: OpenAI batch file; consecutive lines with one `body.metadata.prompt_id`
            are the samples of one prompt, and `body.metadata.trace` says whether the
            chat template opened the trace.
        generations: its batch output, in any order. Of several lines with one id the first that is no
            failure counts; a torn last line is left out.
        selection: `first` complete sample, `all`, or `vote` (the first complete sample
            that gives the majority answer).
        answer_kind: how `vote` reads a final answer, a key of `answers.EXTRACTORS`.

    Raises:
        ThinkSwitchError: a file is missing or a line is broken, named by file and line.
    """
    if not generations.exists():
        raise ThinkSwitchError(f"{generations} does not exist; generate it first.")
    opened = {request["custom_id"]: batch.opens_trace(request) for _, request in batch.read_requests(requests)}
    if not opened:
        raise ThinkSwitchError(f"{requests} holds no requests; delete it and run the stage `requests` again.")
    with tempfile.TemporaryFile(dir=_spill_folder(generations)) as spill:
        stored = _read_generations(generations, opened, spill, report)
        rows = (request for _, request in files.read_jsonl(requests))
        for _, group in itertools.groupby(rows, key=batch.prompt_id):
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
                yield {
                    "messages": [*request["body"]["messages"], {"role": "assistant", "content": answer}],
                    "custom_id": request["custom_id"],
                    "prompt_id": batch.prompt_id(request),
                }


def _spill_folder(generations: Path) -> Path | None:
    # Beside the generations there is room for their answers; /tmp may lie in memory.
    return generations.parent if os.access(generations.parent, os.W_OK) else None


def _read_generations(
    generations: Path, opened: dict[str, bool], spill: IO[bytes], report: PairReport
) -> dict[str, _Stored]:
    """What became of every request, by id; whole answers go into `spill`."""
    stored: dict[str, _Stored] = {}
    for number, row in files.read_jsonl(generations, torn_end=True):
        custom_id = batch.stored_id(row, generations, number)
        if custom_id not in opened:
            report.unknown_ids += 1
            continue
        if custom_id in stored:
            report.duplicates += 1
            if stored[custom_id].outcome != Outcome.FAILED:
                continue
        outcome, answer = judge(row, opened=opened[custom_id])
        text = answer.encode()
        stored[custom_id] = _Stored(outcome, spill.tell(), len(text))
        spill.write(text)
    return stored


def completion_of(row: dict[str, Any], *, opened: bool) -> Completion:
    """The split completion of one line of a batch output file."""
    body = batch.completion_body(row)
    if body is None:
        return Completion(None, None, Outcome.FAILED)
    choice = body["choices"][0]
    return split_message(choice["message"], opened=opened, finish_reason=choice.get("finish_reason"))


def judge(row: dict[str, Any], *, opened: bool) -> tuple[str, str]:
    """Outcome and whole answer (empty unless complete) of one line of a batch output file."""
    done = completion_of(row, opened=opened)
    if not done.complete or done.answer is None:
        return done.outcome.value, ""
    if control_token(done.answer):
        return CONTROL, ""
    return done.outcome.value, done.answer


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


def write_pairs(requests: Path, generations: Path, out: Path, *, selection: str, answer_kind: str) -> PairReport:
    """Write `pairs.jsonl` atomically, and `pairs.json` beside it with the counts.

    Raises `ThinkSwitchError` if not one pair is left.
    """
    report = PairReport()
    with files.atomic_file(out) as handle:
        for row in build_pairs(requests, generations, selection=selection, answer_kind=answer_kind, report=report):
            handle.write(files.dumps_line(row))
        if report.kept == 0:
            raise ThinkSwitchError(
                f"{generations} holds no complete answer ({report.summary()}); "
                "raise `sampling.max_tokens` in the recipe, or look at the file."
            )
    files.write_json(out.with_suffix(".json"), {**report.as_json(), "selection": selection})
    return report
