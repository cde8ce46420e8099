"""`thinkswitch answer`: one question for the terminal, or a file of questions as JSONL."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging import compare
from thinkswitch_plugin.router.switch import Routed, Switch
from thinkswitch_plugin.run import MODES

STDIN = "-"


def answer_one(switch: Switch, question: str) -> Routed:
    """Ask one question and print the answer, the mode, p(think) and tokens."""
    found = switch.answer(question)
    sign = "≥" if found.mode == "thinking" else "<"
    title = f"{found.mode} (p(think) = {found.p_think:.3f} {sign} {switch.threshold:.3f})"
    assert found.reply is not None
    compare.show(question, [replace(found.reply, title=title)])
    return found


def answer_file(switch: Switch, source: str, out: Path | None) -> list[Routed]:
    """Ask every row of a JSONL file, or of the standard input; write one row each, in the same order.

    A row holds `question` (or `prompt`, `problem`), further fields of the domain's template, and optionally an `id`.
    The counts go to the standard error, so that the standard output is JSONL and nothing else.

    Raises `ThinkSwitchError` naming the line of a row that cannot be asked.
    """
    path = Path("/dev/stdin") if source == STDIN else Path(source)
    rows = []
    for number, row in files.read_jsonl(path):
        try:
            switch.asked(row)
        except ThinkSwitchError as problem:
            where = "standard input" if source == STDIN else str(path)
            raise ThinkSwitchError(f"{where}, line {number}: {problem}") from None
        rows.append(row)
    if not rows:
        raise ThinkSwitchError(f'{source} holds no questions; write one a line: {{"question": "…"}}')
    found = switch.answer_all(rows)
    lines = [
        files.dumps_line({**({"id": row["id"]} if "id" in row else {}), **routed.row()})
        for row, routed in zip(rows, found, strict=True)
    ]
    if out is None:
        sys.stdout.buffer.write(b"".join(lines))
        sys.stdout.flush()
    else:
        with files.atomic_file(out) as handle:
            handle.writelines(lines)
    print(counts(found), file=sys.stderr, flush=True)
    return found


def counts(found: Sequence[Routed]) -> str:
    """How many questions each mode answered, and with how many tokens, in one line."""
    parts = []
    for mode in MODES:
        of_mode = [one for one in found if one.mode == mode]
        parts.append(f"{len(of_mode)} by {mode} ({sum(one.tokens for one in of_mode):,} tokens)")
    failed = sum(one.reply is None for one in found)
    text = (
        f"{len(found)} questions: {', '.join(parts)}, {sum(o.tokens for o in found) / len(found):.1f} tokens a question"
    )
    return text + (f"; {failed} not answered" if failed else "")
