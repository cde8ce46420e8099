"""Whether an answer repeats the trace that it should come without."""

from __future__ import annotations

import itertools

STRETCH = (
    200  # consecutive characters of the trace after which an answer counts as copied; three fifths of a short trace
)
SHORT = 60  # a shorter answer does not count as a passage


def repeats(trace: str | None, answer: str) -> bool:
    """Whether an answer repeats the trace: all of it, or a long stretch, whatever the case, white space and Markdown.

    What is short may be in both: a trace that ends in `4` has the answer `4`.
    """
    text = _plain(answer)
    # A longer trace than this cannot stand whole in a short answer.
    reasoning = _plain((trace or "") if len(text) >= SHORT else (trace or "")[:300])
    if text.startswith(reasoning):
        return len(reasoning) >= 8
    if reasoning in text:
        return len(reasoning) >= 20
    stretch = min(STRETCH, max(SHORT, 3 * len(reasoning) // 5))
    piece = stretch // 2  # every stretch holds one of these pieces whole; of a very long answer some are looked for
    places = range(0, len(text) - piece + 1, max(piece, len(text) // 200)) if len(text) >= SHORT else ()
    return any(_in_common(text, at, reasoning, piece) >= stretch for at in places)


def _plain(text: str) -> str:
    return " ".join(text.casefold().translate(_MARKDOWN).split())


_MARKDOWN = dict.fromkeys(map(ord, ">*_#`"))


def _in_common(text: str, at: int, other: str, piece: int) -> int:
    """The length of the passage around a piece of text that also occurs in the other text; 0 if the piece does not."""
    there = other.find(text[at : at + piece])
    if there < 0:
        return 0
    before = itertools.takewhile(lambda n: text[at - n] == other[there - n], range(1, min(at, there, STRETCH) + 1))
    end, after_end = at + piece, there + piece
    room = min(len(text) - end, len(other) - after_end, STRETCH)
    after = itertools.takewhile(lambda n: text[end + n] == other[after_end + n], range(room))
    return sum(1 for _ in before) + piece + sum(1 for _ in after)
