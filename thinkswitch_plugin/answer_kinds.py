"""The kinds of final answers: one entry each, for votes, grading, `thinkswitch score` and lm-eval's tasks.

A reader is a function `module:name` of the room `data` that turns a text into the normal form of an answer, or None.
"""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """How answers of one kind are read.

    Attributes:
        answer: reads what follows a trace.
        gold: reads a published right answer.
        whole: an answer is all of the text, so a text that was cut has none.
        right: whether an answer is right, of the answer and the right one; None if they must be equal.
    """

    answer: str
    gold: str
    whole: bool = False
    right: str | None = None


KINDS = {
    "exact": Kind("answers:exact", "answers:exact", whole=True),
    "digit": Kind("answers:digit", "answers:digit", whole=True),
    "integer": Kind("integers:integer", "integers:published"),
    "decision": Kind("decisions:decision", "decisions:decision"),
    "matharena": Kind("integers:last_integer", "integers:published"),
    "choice": Kind("decisions:choice", "decisions:choice"),
    "instructions": Kind("answers:exact", "benchmarks:instructions", whole=True, right="benchmarks:follows"),
}
