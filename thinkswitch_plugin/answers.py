"""Extract and compare final answers: one rule for pair selection, the lm-eval tasks and `thinkswitch score`.

Each kind turns the text *after* the trace into one normal form, or None where no final
answer can be read. docs/grading.md says in words what counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation

import orjson

# Final answers stand at the end; what comes before is not needed, and a degenerate
# text of megabytes would cost minutes in any parser.
WINDOW = 4_000
LONGEST_BOX = 200


def exact(text: str) -> str | None:
    """The whole text without surrounding white space."""
    return text.strip() or None


def digit(text: str) -> str | None:
    """The text if it is one digit and nothing else (the embedded domain)."""
    text = text.strip()
    return text if re.fullmatch(r"[0-9]", text) else None


def integer(text: str) -> str | None:
    r"""The integer that a competition answer comes to, as plain digits (AIME).

    In this order: the last box that is not empty (``\boxed{055}`` -> 55), and no other if
    there is one; the last announcement (``Answer: 220.``, ``the answer is **220**``); the last line,
    by what its last equation equals or the only number in it; the last bold number.
    Leading zeros, ``45.0``, units, degrees, thousands commas and signs are
    understood; an expression is worked out by math-verify.
    """
    text = text[-WINDOW:]
    boxes = [box for box in boxed(text) if box.strip()]
    if boxes:
        return _number(boxes[-1]) or _worked_out(boxes[-1])
    announced = [_number(match.group(1)) for match in _ANNOUNCED.finditer(text)]
    if announced and announced[-1] is not None:
        return announced[-1]
    lines = [line for line in text.splitlines() if re.search(r"\w", line)]
    if lines and (found := _of_line(lines[-1])) is not None:
        return found
    bold = [_number(match.group(1)) for match in _BOLD.finditer(text)]
    return bold[-1] if bold else None


def _of_line(line: str) -> str | None:
    """What a closing line states: the right side of its last equation, or the only number in it."""
    if "=" in line:
        right = line.rsplit("=", 1)[1]
        return _number(right) or _worked_out(right.strip(" $.*\\)]"))
    numbers = set(re.findall(rf"(?<![\w^.{{]){_NUMBER}(?![\w^])", line))
    return _number(numbers.pop().rstrip(",")) if len(numbers) == 1 else None


def boxed(text: str) -> Iterator[str]:
    r"""The contents of every ``\boxed{…}`` and ``\fbox{…}`` with balanced braces, in order."""
    for match in re.finditer(r"\\f?box(?:ed)?\s*\{", text):
        depth, start = 1, match.end()
        for position in range(start, min(len(text), start + 1_000)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                yield text[start:position]
                break


_NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?"
_ANNOUNCED = re.compile(
    r"(?:final\s+answer|answer|result)\b(?:\s+(?:is|equals|to\s+\S+(?:\s+\S+){0,6}\s+is))?\s*[:=]?\s*(?:is\s*)?"
    rf"(?:\*\*|__|\$|\\\(|\\\[|\s)*({_NUMBER})(?![\d/^]|\s*[-+*/^]\s*\d)",
    re.IGNORECASE,
)
_BOLD = re.compile(rf"\*\*\s*\$?\s*(?:[A-Za-z]\w*\s*=\s*)?({_NUMBER})\s*\$?\s*[.!]?\s*\*\*")


def _number(text: str) -> str | None:
    """The integer a short expression states (`016`, `45.0`, `16 \\text{ feet}`, `70^\\circ`), None if it is none."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|operatorname|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(
        r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree|°|\\[,;:! ]|\\quad|\\%|%|\$|\\\(|\\\)|\\\[|\\\]|~", " ", text
    )
    text = re.sub(r"(?<=\d)\{,\}(?=\d)", "", text)
    text = text.rsplit("=", 1)[-1].strip().strip("*_`").strip()
    match = re.fullmatch(rf"({_NUMBER})\s*[.]?\s*(?:[A-Za-z][A-Za-z .]*)?", text)
    if match is None:
        return None
    digits = match.group(1)
    if "," in digits and not re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", digits):
        return None
    return _whole(digits.replace(",", ""))


def _whole(text: str) -> str | None:
    try:
        value = Decimal(text)
    except InvalidOperation:
        return None
    return str(int(value)) if value == value.to_integral_value() and abs(value) < 10**30 else None


# Expressions whose value could be too large to work out: towers, factorials, long powers.
_TOO_LARGE = re.compile(
    r"!|\^\s*\{[^{}]*\^|\^\s*\S\s*\^|\^\s*\{[^{}]*\}\s*\^|\^\s*[\{(]*\s*-?\d{3,}|\d{10,}|\*\*|\\binom|\\uparrow"
)


def _worked_out(expression: str) -> str | None:
    r"""The integer that a short LaTeX expression equals (``\\frac{90}{2}`` -> 45), by math-verify.

    math-verify bounds its own time with SIGALRM, which works in no thread; here that is
    off, and what could take long is refused before.
    """
    words = re.sub(r"\\[a-zA-Z]+", " ", re.sub(r"\\text\s*\{", "{", expression))
    if len(expression) > LONGEST_BOX or _TOO_LARGE.search(expression) or re.search(r"[A-Za-z]{2,}", words):
        return None
    import logging

    from math_verify import parse
    from sympy import Expr, Integer
    from sympy.core.relational import Equality

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    try:
        found = parse(f"\\boxed{{{expression}}}", parsing_timeout=None)
        value = found[0].rhs if found and isinstance(found[0], Equality) else found[0] if found else None
        if not isinstance(value, Expr) or not value.is_number:
            return None
        value = value.doit().simplify()
    except Exception:  # whatever a parser of free text raises, it has read no answer
        return None
    return str(value) if isinstance(value, Integer) else _whole(str(value))


DECISIONS = ("yes", "no", "maybe")
LETTERS = {"A": "yes", "B": "no", "C": "maybe"}


def decision(text: str, letters: Mapping[str, str] = LETTERS) -> str | None:
    """The decision yes, no or maybe that a text comes to (PubMedQA).

    In this order: an answer field of a JSON object; the last box; the last announced
    answer (``Final Answer: B``, ``the answer is "maybe"``); a text or last line that begins
    with a decision or is a letter alone; the only decision that the last line names. Prose that names
    several without deciding has no answer.

    Args:
        letters: what the options stand for, where a letter is answered.
    """
    text = text[-WINDOW:].strip()
    for value in _json_answers(text):
        found = _choice(value, letters)
        if found:
            return found
    for found in (_choice(box, letters) for box in reversed(list(boxed(text)))):
        if found:
            return found
    announced = [_choice(m.group(1), letters) for m in _DECIDED.finditer(text) if not _conditional(text, m.start())]
    for found in reversed(announced):
        if found:
            return found
    lines = [line for line in text.splitlines() if line.strip() and not re.fullmatch(r"\s*<[^>]*>\s*", line)]
    if not lines:
        return None
    for line in (lines[-1], lines[0]):
        found = _choice(line, letters)
        if found:
            return found
    named = {word.lower() for word in re.findall(r"\b(?:yes|no|maybe)\b", lines[-1], re.IGNORECASE)}
    hedged = re.search(r"\b(?:not|if|whether|could)\b", lines[-1], re.IGNORECASE)
    return named.pop() if len(named) == 1 and not hedged else None


def _conditional(text: str, position: int) -> bool:
    """Whether the sentence before `position` is a condition: "if the trial failed, the answer is no"."""
    sentence = re.split(r"[.\n](?:\s|$)", text[:position])[-1]
    return re.search(r"\bif\b", sentence, re.IGNORECASE) is not None


_DECIDED = re.compile(
    r"(?:final\s+answer|final\s+decision|answer|decision|conclusion|correct\s+option|option|choice)\b"
    r"(?:\s+to\s+(?:the|this)\s+question)?[\s*_`\"']*(?:is|would\s+be|[:=]|→)[\s:]*(?:therefore|thus|likely)?[\s:]*"
    r"([^\n]{1,60})",
    re.IGNORECASE,
)
_ANSWER_KEYS = ("answer_choice", "final_decision", "final_answer", "decision", "answer", "label", "prediction")


def _choice(text: str, letters: Mapping[str, str]) -> str | None:
    """The decision at the very start of a short text: `B. no`, `**Yes**, because`, `"maybe"`, `(C)`, `A`."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = text.strip().lstrip("*_`\"'([{<$ ").strip()
    with_letter = re.match(r"(?:option\s+)?([A-Za-z])\s*[.):,\-]*[\s*_\"']*\b(yes|no|maybe)\b", text, re.IGNORECASE)
    if with_letter and with_letter.group(1).upper() in letters:
        return with_letter.group(2).lower()
    word = re.match(r"(yes|no|maybe)\b(?!\s+(?:or|and|/)\b|/)", text, re.IGNORECASE)
    if word:
        return word.group(1).lower()
    letter = re.match(r"(?:option\s+)?([A-Z])(?:[\s.)\]}*_\"',:;<]|$)(?!\s*[a-z])", text)
    return letters.get(letter.group(1)) if letter else None


def _json_answers(text: str) -> Iterator[str]:
    """The values of answer fields in a JSON object, whole or with its end cut off."""
    match = re.search(r"\{.*\}", text, re.DOTALL)
    if match:
        try:
            value = orjson.loads(match.group())
        except orjson.JSONDecodeError:
            value = None
        if isinstance(value, dict):
            for key in _ANSWER_KEYS:
                if isinstance(value.get(key), str):
                    yield value[key]
    for key in _ANSWER_KEYS:
        yield from re.findall(rf'["\']{key}["\']\s*:\s*["\']([^"\']*)["\']', text)[-1:]


EXTRACTORS: dict[str, Callable[[str], str | None]] = {
    "exact": exact,
    "digit": digit,
    "integer": integer,
    "decision": decision,
}


def extract(kind: str, text: str | None, letters: Mapping[str, str] | None = None) -> str | None:
    """The final answer in `text` in its normal form, or None where there is none."""
    if text is None:
        return None
    if kind == "decision" and letters:
        return decision(text, letters)
    return EXTRACTORS[kind](text)


def gold(kind: str, text: str) -> str | None:
    """The normal form of a published right answer, which may be written plainly (`016`, `45.0`, `yes`)."""
    if kind == "integer":
        return _number(text) or integer(text)
    return EXTRACTORS[kind](text)


def majority(found: Sequence[str | None]) -> str | None:
    """The most frequent answer (the earliest of equals), None if there is none at all."""
    counts = Counter(a for a in found if a is not None)
    return counts.most_common(1)[0][0] if counts else None
