"""Generations -> answer-only pairs, with a count of everything that was dropped and why.

One row of `pairs.jsonl`:

    {"messages": [{"role": "user", "content": "7*3+4*2"},
                  {"role": "assistant", "content": "0"}],
     "custom_id": "p00000-s0", "prompt_id": "p00000"}
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thinkswitch_plugin import answers, files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.traces import Completion, Outcome, split_message

# Reasons beyond `Outcome`, which names what can be wrong with one completion.
MISSING = "not_generated"
NOT_CHOSEN = "not_selected"
NO_MAJORITY = "no_readable_answer"


@dataclass
class PairReport:
    """What became of every prompt and sample; `pairs.json` holds it."""

    prompts: int = 0
    samples: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    prompts_without_pair: int = 0

    def summary(self) -> str:
        """One line for people: `510 of 512 samples kept; dropped: 2 unclosed_trace`."""
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.dropped.most_common())
        return f"{self.kept} of {self.samples} samples kept" + (f"; dropped: {reasons}" if reasons else "")

    def as_json(self) -> dict[str, Any]:
        """The counts as plain values."""
        return {
            "prompts": self.prompts,
            "samples": self.samples,
            "kept": self.kept,
            "dropped": dict(sorted(self.dropped.items())),
            "prompts_without_pair": self.prompts_without_pair,
        }


def index_generations(path: Path) -> dict[str, int]:
    """Byte offset of every stored answer by `custom_id`; of two with one id the first counts.

    A torn last line (a killed run) is left out. Memory grows with ids only, not with texts.
    """
    offsets: dict[str, int] = {}
    position = 0
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.endswith(b"\n"):
                break
            if line.strip():
                custom_id = files.parse_line(line, path, number).get("custom_id")
                if not isinstance(custom_id, str):
                    raise ThinkSwitchError(f"{path}, line {number}: `custom_id` is missing or not text.")
                offsets.setdefault(custom_id, position)
            position += len(line)
    return offsets


def completion_of(row: dict[str, Any], *, opened: bool) -> Completion:
    """The split completion of one line of a batch output file."""
    response = row.get("response")
    body = response.get("body") if isinstance(response, dict) else None
    choices = body.get("choices") if isinstance(body, dict) else None
    if row.get("error") or not choices:
        return Completion(None, None, Outcome.FAILED)
    choice = choices[0]
    return split_message(choice.get("message") or {}, opened=opened, finish_reason=choice.get("finish_reason"))


def build_pairs(
    requests: Path,
    generations: Path,
    *,
    selection: str = "first",
    answer_kind: str = "exact",
    report: PairReport,
) -> Iterator[dict[str, Any]]:
    """Yield the pairs in the order of `requests`, counting into `report` on the way.

    Args:
        requests: OpenAI batch file; consecutive lines with one `body.metadata.prompt_id`
            are the samples of one prompt, and `body.metadata.trace` says whether the
            chat template opened the trace.
        generations: its batch output, in any order.
        selection: `first` complete sample, `all`, or `vote` (the first complete sample
            that gives the majority answer).
        answer_kind: how `vote` reads a final answer, a key of `answers.EXTRACTORS`.

    Raises:
        ThinkSwitchError: a file is missing or a line is broken, named by file and line.
    """
    if not generations.is_file():
        raise ThinkSwitchError(f"{generations} does not exist; generate it first.")
    offsets = index_generations(generations)
    numbered = ((n, r) for n, r in files.read_jsonl(requests))
    with generations.open("rb") as handle:
        for _, group in itertools.groupby(numbered, key=lambda item: _prompt_id(item[1], requests, item[0])):
            members = [request for _, request in group]
            report.prompts += 1
            report.samples += len(members)
            complete: list[tuple[dict[str, Any], str]] = []
            for request in members:
                offset = offsets.get(request["custom_id"])
                if offset is None:
                    report.dropped[MISSING] += 1
                    continue
                handle.seek(offset)
                row = files.parse_line(handle.readline(), generations, 0)
                opened = (request["body"].get("metadata") or {}).get("trace") == "opened"
                done = completion_of(row, opened=opened)
                if done.complete and done.answer is not None:
                    complete.append((request, done.answer))
                else:
                    report.dropped[done.outcome.value] += 1
            chosen, reason = select(complete, selection, answer_kind)
            if len(complete) > len(chosen):
                report.dropped[reason] += len(complete) - len(chosen)
            report.kept += len(chosen)
            report.prompts_without_pair += not chosen
            for request, answer in chosen:
                yield {
                    "messages": [*request["body"]["messages"], {"role": "assistant", "content": answer}],
                    "custom_id": request["custom_id"],
                    "prompt_id": (request["body"].get("metadata") or {}).get("prompt_id", request["custom_id"]),
                }


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


def _prompt_id(request: dict[str, Any], path: Path, number: int) -> str:
    body = request.get("body")
    if not isinstance(request.get("custom_id"), str) or not isinstance(body, dict):
        raise ThinkSwitchError(f"{path}, line {number}: `custom_id` or `body` is missing.")
    if not isinstance(body.get("messages"), list) or not body["messages"]:
        raise ThinkSwitchError(f"{path}, line {number}: `body.messages` is missing or empty.")
    return str((body.get("metadata") or {}).get("prompt_id", request["custom_id"]))


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
