"""Extract and compare final answers: one rule for pair selection, the lm-eval tasks and `thinkswitch score`.

Each kind turns the text *after* the trace into one normal form, or None where no final
answer can be read. docs/grading.md describes the rules.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pkgutil import resolve_name
from typing import Any

from thinkswitch_plugin.answer_kinds import KINDS
from thinkswitch_plugin.data.statements import stated
from thinkswitch_plugin.errors import ThinkSwitchError

FEWEST_VOTES = 3  # from which on it is not by chance that no vote had two equal answers


def exact(text: str) -> str | None:
    """The whole text without surrounding white space."""
    return text.strip() or None


def digit(text: str) -> str | None:
    """The text if it is one digit and nothing else (the demo domain)."""
    text = text.strip()
    return text if re.fullmatch(r"[0-9]", text) else None


@cache
def _reader(name: str) -> Callable[..., Any]:
    return resolve_name(f"{__package__}.{name}")


def extract(kind: str, text: str | None, letters: Mapping[str, str] | None = None) -> str | None:
    """The final answer in `text` in its normal form, or None if there is none.

    Args:
        kind: a key of `KINDS`.
        letters: what the letters of the options stand for, if a decision is read.
    """
    if text is None:
        return None
    read = _reader(KINDS[kind].answer)
    return read(text, letters) if letters and kind == "decision" else read(text)


def extract_unfinished(kind: str, text: str | None, letters: Mapping[str, str] | None = None) -> str | None:
    """The final answer that a text stated before it was cut off; None where the kind takes the whole text for it."""
    return None if text is None or KINDS[kind].whole else extract(kind, stated(text), letters)


def gold(kind: str, text: str) -> str | None:
    """The normal form of a published right answer, None if the kind cannot read it (`8/21` is not an integer).

    It is the answer itself (`016`, `45.0`, `70^\\circ`, `yes`) or states it (`\\boxed{7}`, `… #### 80`);
    nothing is looked for in prose.
    """
    return _reader(KINDS[kind].gold)(text)


def is_right(kind: str, found: str | None, wanted: str) -> bool:
    """Whether an extracted answer is right.

    Args:
        wanted: the gold answer in its normal form.
    """
    compare = KINDS[kind].right
    return found == wanted if compare is None else found is not None and bool(_reader(compare)(found, wanted))


def unread(kind: str, text: str) -> str:
    """Why `gold` cannot read a gold answer, as part of a sentence."""
    return f"the gold answer {text[:80]!r} cannot be read as `{kind}`"


def majority(found: Sequence[str | None]) -> str | None:
    """The most frequent answer (the earliest of equals), None if there is none at all."""
    counts = Counter(a for a in found if a is not None)
    return counts.most_common(1)[0][0] if counts else None


class Votes:
    """Whether votes could be held: in free text no two answers are alike, so any of them would win."""

    def __init__(self) -> None:
        self.held = self.agreed = 0  # votes over several answers; those in which two were alike

    def count(self, found: Sequence[str | None]) -> None:
        """Count one vote."""
        there = [one for one in found if one is not None]
        self.held += len(there) > 1
        self.agreed += len(set(there)) < len(there)

    def free_text(self, kind: str) -> bool:
        """Whether whole texts were compared (`kind` is a key of `KINDS`) and no two of them were alike."""
        return KINDS[kind].whole and self.held >= FEWEST_VOTES and not self.agreed

    def require_agreement(self, kind: str, instead: str) -> None:
        """Raise `ThinkSwitchError` for free text; `instead` is what to do, as part of a sentence."""
        if self.free_text(kind):
            raise ThinkSwitchError(
                f"In {self.held} votes over several answers no two were alike, so these answers are free text, which has no "
                f"majority; {instead}, or name how a final answer is read (integer, decision, choice) as `answer`."
            )
