"""Grade saved outputs again, without generating: `thinkswitch score --task aime FILE`, or `--kind integer`.

A row of the input is one of

    {"raw": "…</think>…", "gold": "055", "finish_reason": "stop"}          tags still in the text
    {"reasoning": "…", "content": "…", "gold": "55"}                       trace returned apart; content may be a list of parts
    {"custom_id": "…", "response": {"body": {"choices": […]}}, "gold": …}  OpenAI or vLLM batch output
    {"resps": [["…", "…"]], "target": "55", "doc": {…}}                    lm-eval samples, k a row

and a verdict is {"correct", "answer", "complete", "has_trace", "reason"}; `correct` is null
where the row has no gold, or one that cannot be read, which `gold_not_read` then holds. `finish_reason` and
`options` (what letters stand for) are optional.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import orjson

from thinkswitch_plugin import console, conventions, files, places
from thinkswitch_plugin.conventions import Convention
from thinkswitch_plugin.data import batch, messages, task_files
from thinkswitch_plugin.data.traces import Completion, Outcome
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging import samples
from thinkswitch_plugin.judging.verdict import verdict_on

NO_ANSWER = "no_readable_answer"


def completions_of(row: dict[str, Any], where: str, how: batch.Asked) -> list[Completion]:
    """The completions that one row of any known format holds.

    Raises `ThinkSwitchError` naming the row if it is of none.
    """
    if isinstance(row.get("resps"), list):
        return [how.split({"content": str(text)}, None) for text in samples.completions(row["resps"])]
    if "response" in row:
        choices = (batch.completion_body(row) or {"choices": [{}]})["choices"]
        return [batch.completion_of({"response": {"body": {"choices": [choice]}}}, how) for choice in choices]
    if not {"raw", "reasoning", "content"} & row.keys():
        raise ThinkSwitchError(
            f"{where}: the row has none of `raw`, `reasoning` and `content`, `response`, `resps`; "
            "see `docs/grading.md` for the formats."
        )
    for name in ("raw", "reasoning", "content"):
        kinds = str | list | None if name == "content" else str | None
        if not isinstance(row.get(name), kinds):
            raise ThinkSwitchError(f"{where}: `{name}` must be text, found {type(row[name]).__name__}.")
    read = {"reasoning": row.get("reasoning"), "content": row.get("content")}
    message = read if row.get("raw") is None else {"content": row["raw"]}
    if fault := messages.fault(message):
        raise ThinkSwitchError(f"{where}: {fault}.")
    return [how.split(message, row.get("finish_reason"))]


def gold_of(row: dict[str, Any]) -> str | None:
    """The right answer that a row carries, if any."""
    for name in ("gold", "target"):
        value = row.get(name)
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
    return None


def letters_of(row: dict[str, Any]) -> dict[str, str] | None:
    """What the letters of a row's options stand for: `options` as a mapping, or `options={…}` in its `note`."""
    options = row.get("options")
    if not isinstance(options, dict) and isinstance(row.get("note"), str):
        match = re.search(r"options=(\{[^{}]*\})", row["note"])
        try:
            options = orjson.loads(match.group(1)) if match else None
        except orjson.JSONDecodeError:
            options = None
    if not isinstance(options, dict):
        return None
    return {str(k).upper(): str(v).strip().lower() for k, v in options.items()}


def verdict(kind: str, done: Completion, gold: str | None, letters: dict[str, str] | None = None) -> dict[str, Any]:
    """One completion graded, in the form that `--rows` writes."""
    read = verdict_on(kind, done, gold, letters)
    # Two tags that end a trace, or a tag around a part of the answer, keep it from training, not from being read.
    whole = not done.cut and done.outcome in (Outcome.COMPLETE, Outcome.AMBIGUOUS, Outcome.TAGGED)
    reason = Outcome.COMPLETE if read.answer is not None and done.outcome is Outcome.TAGGED else done.reason
    if whole and done.answer and read.answer is None:
        reason = NO_ANSWER
    return {
        "correct": read.correct,
        "answer": read.answer,
        "complete": whole and done.answer is not None,
        "has_trace": done.trace is not None,
        "reason": reason,
        **({"gold_not_read": gold} if gold is not None and read.correct is None else {}),
    }


def verdicts(kind: str, path: Path, how: batch.Asked) -> Iterator[list[dict[str, Any]]]:
    """The verdicts of every row, in order: one a row, or k where a row holds k samples."""
    removed = trace_removed(path)
    for number, row in files.read_jsonl(path):
        gold, letters = gold_of(row), letters_of(row)
        done = completions_of(row, f"{path}, line {number}", how)
        found = [verdict(kind, one, gold, letters) for one in done]
        yield [{**one, "has_trace": None} for one in found] if removed else found


def trace_removed(path: Path) -> bool:
    """Whether lm-eval removed the traces before it wrote a samples file: `think_end_token` is a model argument.

    lm-eval writes the arguments of the run into the results file of the same date, beside the samples.
    """
    date = re.fullmatch(r"samples_.*_(\d{4}-\d\d-\d\dT[^_]*)\.jsonl", path.name)
    results = path.with_name(f"results_{date.group(1)}.json") if date else None
    if results is None or not results.is_file():
        return False
    found = files.read_json(results)
    config = found.get("config") if isinstance(found, dict) else None
    return "think_end_token" in ((config.get("model_args") if isinstance(config, dict) else None) or "")


def kind_of(task: str | None, answer: str | None) -> str:
    """How answers are read: as `answer` says, or as an lm-eval task of ours grades them (`grade_integer` -> integer).

    Args:
        task: its name, with or without `thinkswitch_`.

    Raises `ThinkSwitchError` if there is no such task, or it does not grade by a kind.
    """
    if answer is not None:
        return answer
    names = dict.fromkeys((f"thinkswitch_{task}", str(task)))
    folders = [folder for folder in (places.find(places.TASKS), task_files.installed()) if folder]
    place = next(((n, f) for f in folders for n in names if (f / f"{n}.yaml").is_file()), None)
    if place is None:
        known = sorted({p.stem.removeprefix("thinkswitch_") for f in folders for p in f.glob("thinkswitch_*.yaml")})
        raise ThinkSwitchError(
            f"There is no task {task!r}; use one of {', '.join(known)}, a file of lm_eval_tasks/, or `--kind KIND`."
            if known
            else f"There is no task {task!r}, as no task files are installed; use `--kind KIND`."
        )
    kind = task_files.kind_of_task(*place)
    if kind is None:
        raise ThinkSwitchError(
            f"The task {task!r} grades by a function of its own; use `--kind KIND` to grade its outputs."
        )
    return kind


def convention_named(names: Sequence[str], opening: str | None, closing: str | None) -> Convention | None:
    """How traces are written, by a convention's name or by the texts that open and close them; None for any of the table.

    Raises `ThinkSwitchError` if there is no such convention, more than one is named, or an opening has no closing.
    """
    if (opening is None) != (closing is None):
        raise ThinkSwitchError("Give `--trace-open` and `--trace-close` together.")
    values: list[str | dict[str, str]] = [*names]
    if opening is not None and closing is not None:
        values.append({"open": opening, "close": closing})
    if len(values) > 1:
        raise ThinkSwitchError(
            "Traces are written in one convention; give one name, or `--trace-open` and `--trace-close`."
        )
    if values and (fault := conventions.fault(values[0], "`--trace`")):
        raise ThinkSwitchError(f"{fault}.")
    return conventions.from_key(values[0]) if values else None


def score_file(kind: str, path: Path, rows: Path | None, how: batch.Asked) -> None:
    """Print a table for a file of outputs and, on request, write the verdicts.

    Args:
        kind: how answers are read, a key of `KINDS`.

    Raises `ThinkSwitchError` if the file is missing, empty, or a row cannot be read.
    """
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()

    with files.atomic_file(rows) if rows else nullcontext() as out:
        for group in verdicts(kind, path, how):
            for one in group:
                counts["completions"] += 1
                counts["with a trace"] += one["has_trace"] is True
                counts["complete"] += one["complete"]
                counts["answered"] += one["answer"] is not None
                counts["with a gold answer"] += one["correct"] is not None
                counts["gold not read"] += "gold_not_read" in one
                counts["correct"] += one["correct"] is True
                reasons[one["reason"]] += 1
            if out:
                out.write(files.dumps_line(group[0] if len(group) == 1 else {"samples": group}))
        if not counts["completions"]:
            raise ThinkSwitchError(f"{path} has no rows; give a file of saved outputs.")
    graded = counts["with a gold answer"]
    body = [[name, str(n), ""] for name, n in counts.items() if name != "correct"]
    body.append(["correct", str(counts["correct"]), f"{100 * counts['correct'] / graded:.1f} %" if graded else ""])
    body += [[f"reason: {reason}", str(n), ""] for reason, n in reasons.most_common()]
    console.say("\n".join(console.table([path.name, "rows", "of graded"], body)))
    if counts["gold not read"]:
        console.say(
            f"Not graded: completions whose gold answer cannot be read as `{kind}`; `--kind` chooses another kind."
        )
    if trace_removed(path):
        console.say(
            "lm-eval removed the traces from these outputs (`think_end_token` among its model arguments), so nothing "
            "here shows which of them had one."
        )
