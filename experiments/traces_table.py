"""`make traces`: every convention of the table in every shape it is met in, and what becomes of it.

A cell says `pair`, the reason for which the completion is dropped, or `refused` where the whole file is. No cell may
let a part of the trace into a pair, or into the answer that is graded. The last line is one JSON line with the counts.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thinkswitch_plugin import files
from thinkswitch_plugin.conventions import CONVENTIONS, Convention
from thinkswitch_plugin.data import batch
from thinkswitch_plugin.data.batch import Asked
from thinkswitch_plugin.data.pairs import PairReport, build_pairs
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging import verdict

MARKED = "QZX"  # stands only in traces
TRACE = f"{MARKED} maybe \\boxed{{77777}}? Let me see, {MARKED}."
PLAIN = f"{MARKED} maybe 77777? Let me see, {MARKED}."
ANSWER = "The answer is 42."
TAG = re.compile(r"<[^<>]*>|\[[A-Z/ ]+\]|◁[^▷]*▷")


def documented() -> str:
    """The table of docs/how-it-works.md: name, families, and the usual opening and closing of every convention."""
    lines = ["| name | opens | ends | families |", "|---|---|---|---|"]
    for each in CONVENTIONS:
        opens, closes = (f"`{end[0].strip()}`".replace("|", "\\|") if end else "" for end in (each.opens, each.closes))
        lines.append(f"| `{each.name}` | {opens} | {closes.replace(chr(10), '')} | {each.families} |")
    return "\n".join(lines) + "\n"


def opening(convention: Convention) -> str:
    """What opens a trace in a convention, as it is usually written."""
    return convention.opens[0].replace("…", ' type="reasoning"').replace("# ", "## ")


def closing(convention: Convention) -> str:
    """What ends it; empty where the convention knows no end."""
    return convention.closes[0].replace("# ", "## ") if convention.closes else ""


def written(convention: Convention, trace: str, answer: str) -> str:
    """A completion in a convention."""
    return f"{opening(convention)}\n{trace}\n{closing(convention)}\n{answer}"


def shapes(convention: Convention) -> Iterator[tuple[str, str, bool, str]]:
    """Name, text, whether the template opened the trace, and finish reason."""
    end = closing(convention)
    raw = written(convention, TRACE, ANSWER)
    yield "raw", raw, False, "stop"
    yield "opened by the template", f"{TRACE}\n{end}\n{ANSWER}", True, "stop"
    yield "cut inside the trace", f"{opening(convention)}\n{TRACE} so", False, "length"
    yield "cut inside the answer", raw[:-4], False, "length"
    yield "special tokens skipped", TAG.sub("", written(convention, PLAIN, ANSWER)), False, "stop"
    yield "doubled", f"{opening(convention)}\n{TRACE}\n{end}\n{TRACE}\n{end}\n{ANSWER}", False, "stop"
    yield "quoted in code", written(convention, f"{TRACE} It ends with `{end.strip()}`. {TRACE}", ANSWER), False, "stop"


def fate(texts: list[str], how: Asked, finish: str, folder: Path) -> tuple[str, bool]:
    """What becomes of a file of completions, and whether a part of a trace reached a pair or the grader."""
    ids = [f"p{n}" for n in range(len(texts))]
    requests, generations = folder / "requests.jsonl", folder / "generations.jsonl"
    turns = [{"role": "user", "content": "6*7"}]
    requests.write_bytes(
        b"".join(
            files.dumps_line({"custom_id": i, "body": {"messages": turns, "metadata": how.metadata()}}) for i in ids
        )
    )
    rows = [stored(custom_id, text, finish) for custom_id, text in zip(ids, texts, strict=True)]
    generations.write_bytes(b"".join(map(files.dumps_line, rows)))
    graded = [verdict.final_answer("integer", batch.completion_of(row, how)) for row in rows]
    leak = "77777" in graded
    report = PairReport()
    try:
        found = [row["messages"][-1]["content"] for row in build_pairs(requests, generations, report=report)]
    except ThinkSwitchError as error:
        assert "thinkswitch.trace" in str(error), error
        return "refused", leak
    leak |= any(answer != ANSWER for answer in found)
    return ("pair" if found else next(iter(report.dropped))), leak


def stored(custom_id: str, text: str, finish: str) -> dict[str, Any]:
    """One line of a batch output."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"custom_id": custom_id, "response": {"status_code": 200, "body": {"choices": [choice]}}, "error": None}


def cells() -> Iterator[tuple[str, str, str, bool]]:
    """Convention, shape, fate and leak of every cell, in the order of the table."""
    with tempfile.TemporaryDirectory() as folder:
        for convention in CONVENTIONS:
            for shape, text, opened, finish in shapes(convention):
                # As the recipe names the convention, and as it is looked for where nothing is known.
                (named, one), (auto, other) = (
                    fate([text], Asked(opened, known), finish, Path(folder)) for known in (convention, None)
                )
                yield convention.name, shape, named if named == auto else f"{named} (auto: {auto})", one or other


def main() -> int:
    """Print the table; 1 if any cell leaks."""
    rows: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    shown = ["convention"]
    for name, shape, what, leak in cells():
        rows.setdefault(name, [name]).append(f"{what} LEAK" if leak else what)
        counts["LEAK" if leak else what.split(" ")[0]] += 1
        if len(rows) == 1:
            shown.append(shape)
    for row in (shown, ["---"] * len(shown), *rows.values()):
        print(f"| {' | '.join(row)} |")
    print(json.dumps({"conventions": len(rows), "cells": counts.total(), "leaks": counts["LEAK"], **counts}))
    return bool(counts["LEAK"])


if __name__ == "__main__":
    sys.exit(main())
