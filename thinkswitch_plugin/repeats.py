"""Whether an answer repeats the trace that it should come without."""

from __future__ import annotations

import itertools

STRETCH = 200  # characters; an answer with as many in a row from its trace is no answer of its own


def repeats(trace: str | None, answer: str) -> bool:
    """Whether an answer repeats the trace: all of it, or a long stretch, white space aside.

    What is short may be in both: a trace that ends in `4` has the answer `4`.
    """
    text = " ".join(answer.split())
    if len(text) < 60:  # too short for a stretch, and for a trace of more than its own length
        trace = (trace or "")[:2000]
    reasoning = " ".join((trace or "").split())
    if reasoning == text:
        return len(text) >= 8
    if len(reasoning) >= 12 and text.startswith(reasoning):
        return True
    if len(reasoning) >= 60 and reasoning[:STRETCH] in text:
        return True
    # Every stretch holds one of these pieces whole; of a very long answer some are looked for.
    piece = STRETCH // 2
    places = range(0, len(text) - piece + 1, max(piece, len(text) // 200))
    return any(_in_common(text, at, reasoning, piece) >= STRETCH for at in places)


def _in_common(text: str, at: int, other: str, piece: int) -> int:
    """How long the stretch around a piece of a text is that stands in the other text too, 0 if the piece does not."""
    there = other.find(text[at : at + piece])
    if there < 0:
        return 0
    before = itertools.takewhile(lambda n: text[at - n] == other[there - n], range(1, min(at, there, STRETCH) + 1))
    end, after_end = at + piece, there + piece
    room = min(len(text) - end, len(other) - after_end, STRETCH)
    after = itertools.takewhile(lambda n: text[end + n] == other[after_end + n], range(room))
    return sum(1 for _ in before) + piece + sum(1 for _ in after)
