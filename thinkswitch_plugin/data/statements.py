"""Where a text states its final answer: boxes, wrappers such as `<answer>…</answer>`, and what was announced as final."""

from __future__ import annotations

import re
from itertools import pairwise

from thinkswitch_plugin.data import marks

# Final answers stand at the end; a degenerate text of megabytes must cost nothing.
WINDOW = 4_000
LONGEST_STATEMENT = 1_000


def boxed(text: str) -> list[tuple[int, int, str]]:
    r"""Start, end and content of every ``\boxed{…}``, ``\fbox{…}`` and ``\framebox{…}`` with balanced braces, in order.

    A text that went through JSON may have lost the backslash, or have ``\b`` as one character.
    """
    found: list[tuple[int, int, str]] = []
    opened: list[re.Match[str]] = []
    for match in _BRACE.finditer(text) if _BOX.search(text) else ():
        if match.group() != "}":
            opened.append(match)
        elif opened:
            start = opened.pop()
            if len(start.group()) > 1 and match.start() - start.end() <= LONGEST_STATEMENT:
                found.append((start.start(), match.end(), text[start.end() : match.start()]))
    return sorted(found)


def statements(text: str) -> list[tuple[int, int, bool, str]]:
    r"""What a text states as its answer, in order: start, end, whether it is a box, content; none of them empty.

    A statement is a whole box, or what a whole wrapper of an answer encloses (``<answer>…</answer>``).
    """
    found = [(start, end, True, content) for start, end, content in boxed(text)]
    tail = max(0, len(text) - WINDOW)
    wraps = [mark for mark in marks.find(text[tail:]) if mark.kind in (marks.Kind.WRAP, marks.Kind.UNWRAP)]
    for first, last in pairwise(wraps):
        if first.kind is marks.Kind.WRAP and last.kind is marks.Kind.UNWRAP and first.name == last.name:
            found.append((tail + first.start, tail + last.end, False, text[tail + first.end : tail + last.start]))
    return [one for one in sorted(found) if one[3].strip()]


def stated(text: str) -> str:
    r"""The last part of an unfinished text that states a final answer, "" if there is none.

    It must be whole: a closed box or wrapper that no question mark follows, or ``Final answer: 113``
    on a line that ended. A box that was begun after it takes it back.
    """
    text = plain(text)
    whole = [(start, end) for start, end, _, _ in statements(text) if not _ASKED.match(text, end)]
    whole += [match.span() for match in _FINAL.finditer(text, max(0, len(text) - WINDOW))]
    if not whole:
        return ""
    start, end = max(whole)
    return "" if _BOX.search(text, end) else text[start:end]


_BOX = re.compile(r"(?:\\f?box|\\framebox|\\?boxed|\x08oxed)\s{0,3}(?:\[[^\]\n]{0,20}\])?\s{0,3}\{")
_BRACE = re.compile(rf"{_BOX.pattern}|[{{}}]")
_ASKED = re.compile(r"[\s$)\\]{0,4}\?")
# Announced as final, on a line that ended.
_FINAL = re.compile(
    r"(?:\bfinal answer[*_ ]{0,3}(?:is\b|[:=])|####)[^\n]{1,200}\n|\bfinal answer[*_: ]{0,4}\n{1,3}[^\n]{1,200}\n",
    re.IGNORECASE,
)


def plain(text: str) -> str:
    """Full-width characters, and the spaces and the minus sign of typesetting, as their plain forms."""
    return text.translate(_PLAIN)


_PLAIN = str.maketrans(
    {
        **{chr(wide): chr(wide - 0xFEE0) for wide in range(0xFF01, 0xFF5F)},
        **dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f\u3000", " "),
        **{"\u2212": "-", "\u3002": ". "},
    }
)
