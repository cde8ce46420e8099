"""Extract and compare final answers: one rule for pair selection and for the lm-eval tasks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence


def exact(text: str) -> str | None:
    """The whole text without surrounding white space."""
    return text.strip() or None


def digit(text: str) -> str | None:
    """The text if it is one digit and nothing else (the embedded domain)."""
    text = text.strip()
    return text if re.fullmatch(r"[0-9]", text) else None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {"exact": exact, "digit": digit}


def extract(kind: str, text: str | None) -> str | None:
    """The final answer in `text` in its normal form, or None where there is none."""
    return None if text is None else EXTRACTORS[kind](text)


def majority(found: Sequence[str | None]) -> str | None:
    """The most frequent answer (the earliest of equals), None if there is none at all."""
    counts = Counter(a for a in found if a is not None)
    return counts.most_common(1)[0][0] if counts else None
