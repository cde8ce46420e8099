"""Extract and compare final answers: one rule for pair selection, the lm-eval tasks and `thinkswitch score`.

Each kind turns the text *after* the trace into one normal form, or None where no final
answer can be read. docs/grading.md says in words what counts.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation

import orjson

# Final answers stand at the end; a degenerate text of megabytes must cost nothing.
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
    there is one; the last announcement (``Answer: 220.``, ``the answer is **220**``); the last
    sentence, by what its last equation equals or the only number in it; the last bold
    number. Leading zeros, ``45.0``, units, degrees, thousands commas and signs are
    understood; an expression is worked out by math-verify.
    """
    boxes = [box for box in boxed(text) if box.strip()]
    if boxes:
        return _number(boxes[-1]) or _worked_out(boxes[-1])
    text = re.sub(r"[ \t]+", " ", text[-WINDOW:])
    announced = [m.group(1) for m in _ANNOUNCED.finditer(text) if not _GOES_ON.match(text, m.end())]
    if announced:
        return _number(announced[-1])
    lines = [line for line in text.splitlines() if re.search(r"\w", line)]
    if lines and _BULLET.match(lines[-1]):  # a closing list checks or explains; the answer stands before it
        stated = [m.group(1) for line in lines if not _BULLET.match(line) and (m := _STATED.search(line))]
        if stated:
            return _number(stated[-1])
    if lines and (found := _of_line(lines[-1])) is not None:
        return found
    bold = [_number(match.group(1)) for match in _BOLD.finditer(text)]
    return bold[-1] if bold else None


def boxed(text: str) -> Iterator[str]:
    r"""The contents of every ``\boxed{…}`` and ``\fbox{…}`` with balanced braces, in order."""
    for match in re.finditer(r"\\f?box(?:ed)? ?\{", text):
        depth, start = 1, match.end()
        for position in range(start, min(len(text), start + 1_000)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                yield text[start:position]
                break


_NUMBER = r"[-+]?\d(?:[\d,]*\d)?(?:\.\d+)?"
_ANNOUNCED = re.compile(
    r"\banswer(?: to [^.\n:]{1,60}?)?[*_` ]{0,4}(?:is|equals|:|=)[*_` :\n]{0,6}(?:\$|\\\(|\\\[)?[*_ ]{0,3}"
    rf"({_NUMBER})",
    re.IGNORECASE,
)
# What shows that a number was only the beginning of an expression: 2^3, 25\pi, 2 \cdot 3, 3x, 1/2, 7 = …
_GOES_ON = re.compile(r"\d| ?[\^/=+*-](?!\*)| ?\\(?:[a-zA-Z]+)|[A-Za-z]\b")
_BOLD = re.compile(rf"\*\* ?\$?(?:[A-Za-z]\w* ?= ?)?({_NUMBER})\$? ?[.!]? ?\*\*")
_STATED = re.compile(rf"\b(?:is|are|equals|be) (?:\*\*)?\$?({_NUMBER})\$?(?:\*\*)?[.!]?\s*$")
_BULLET = re.compile(r"\s*[-*•] ")
_CLAUSE = re.compile(r"\b(?:when|where|for|with|since|if|because|as)\b", re.IGNORECASE)


def _of_line(line: str) -> str | None:
    """What a closing line states: the right side of its last equation, or the only number, of its last sentence."""
    sentence = [s for s in re.split(r"(?<=[^\d\s])\. |(?<=\d)\. (?=[A-Z])", line) if re.search(r"\w", s)][-1]
    if stated := _STATED.search(sentence):
        return _number(stated.group(1))
    clause = _CLAUSE.search(sentence)
    if clause and re.search(r"\d", sentence[: clause.start()]):
        sentence = sentence[: clause.start()]
    if "=" in sentence:
        right = sentence.rsplit("=", 1)[1]
        return _number(right) or _worked_out(right.strip(" $.*\\)]"))
    numbers = set(re.findall(rf"(?<![\w^.{{\\]){_NUMBER}(?!\w|\^|\\[a-zA-Z]| ?\\(?:sqrt|pi|cdot|times))", sentence))
    return _number(numbers.pop()) if len(numbers) == 1 else None


def _number(text: str) -> str | None:
    """The integer a short expression states (`016`, `45.0`, `16 \\text{ feet}`, `70^\\circ`), None if it is none."""
    if len(text) > LONGEST_BOX:
        return None
    text = re.sub(r"(?<=\d)(?:\\[,!;: ]|\{,\})(?=\d)", "", text)
    text = re.sub(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|mbox|underline|operatorname)\s*\{([^{}]*)\}", _unwrapped, text)
    text = re.sub(r"\\(?:pmod|bmod|mod|equiv)\b.*", "", text)
    text = re.sub(
        r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree|°|\\[,;:! ]|\\quad|\\%|%|\$|\\\(|\\\)|\\\[|\\\]|~", " ", text
    )
    text = text.strip().strip("*_`").strip()
    while text.startswith("{") and text.endswith("}"):
        text = text[1:-1].strip()
    if "=" in text:
        if re.search(rf"{_UNIT_MARK}|,(?!\d{{3}})|\b(?:or|and)\b", text):
            return None
        text = text.rsplit("=", 1)[-1].strip()
    text = re.sub(r"^\(?[A-E]\)\s*", "", text)
    match = re.fullmatch(
        rf"({_NUMBER})\s*[.]?\s*(?:{_UNIT_MARK}(?:\^\{{?\d\}}?)?|[A-Za-z]{{2,}}[A-Za-z .]*(?:\^\{{?\d\}}?)?)?\s*[.]?",
        text,
    )
    if match is None:
        return None
    digits = match.group(1)
    if "," in digits and not re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", digits):
        return None
    return _whole(digits.replace(",", ""))


_UNIT_MARK = "\x00"


def _unwrapped(match: re.Match[str]) -> str:
    """`\\text{ cm}` is a unit, of however few letters; `\\text{016}` and `\\textbf{(B) }` are their content."""
    content = match.group(1)
    return _UNIT_MARK if re.fullmatch(r"[\sA-Za-z.]*[A-Za-z][\sA-Za-z.]*(?:\^\d)?", content) else f" {content} "


def _whole(text: str) -> str | None:
    try:
        value = Decimal(text)
    except InvalidOperation:
        return None
    return str(int(value)) if abs(value) < 10**30 and value == value.to_integral_value() else None


# Expressions whose value could be too large to work out: towers, large factorials, long powers.
_TOO_LARGE = re.compile(
    r"\d{3,}\s*!|[^\d\s]\s*!|!\s*!|\^\s*\{[^{}]*\^|\^\s*\S\s*\^|\^\s*\{[^{}]*\}\s*\^"
    r"|\^\s*[{(]*\s*-?\d{3,}|\d{10,}|\*\*|\\uparrow|\\binom\s*\{\s*\d{4,}"
)


def _worked_out(expression: str) -> str | None:
    r"""The integer that a short LaTeX expression equals (``\frac{90}{2}`` -> 45), by math-verify.

    math-verify bounds its own time with SIGALRM, which works in no thread; here that is
    off, and what could take long is refused before.
    """
    if "=" in expression:
        if re.search(r",|\b(?:or|and)\b", expression):
            return None
        expression = expression.rsplit("=", 1)[1]
    words = re.sub(r"\\[a-zA-Z]+", " ", re.sub(r"\\text\s*\{", "{", expression))
    if len(expression) > LONGEST_BOX or _TOO_LARGE.search(expression) or re.search(r"[A-Za-z]|,(?!\d{3})", words):
        return None
    from math_verify import parse
    from sympy import Expr

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    try:
        found = parse(f"\\boxed{{{expression}}}", parsing_timeout=None)
        value = found[0] if found else None
        if not isinstance(value, Expr) or not value.is_number:
            return None
        return _whole(str(value.doit().simplify()))
    except Exception:  # whatever a parser of free text raises, it has read no answer
        return None


LETTERS = {"A": "yes", "B": "no", "C": "maybe"}


def decision(text: str, letters: Mapping[str, str] = LETTERS) -> str | None:
    """The decision yes, no or maybe that a text comes to (PubMedQA).

    In this order: an answer field of a JSON object; the last box; the last announcement
    (``Final Answer: B``, ``the answer is "maybe"``, ``I choose B``, a heading *Answer*) that is not a
    condition; a last or first line that is a decision or a letter, or begins with one; the
    only decision that the last line names. Prose that names several without deciding has
    no answer.

    Args:
        letters: what the options stand for, where a letter is answered.
    """
    boxes = list(boxed(text))
    text = re.sub(r"[ \t]+", " ", text[-WINDOW:]).strip()
    for value in (*_json_answers(text), *reversed(boxes)):
        if found := _choice(value, letters, announced=True):
            return found
    announced = [
        (match.start(), _choice(match.group(1), letters, announced=True))
        for pattern in (_DECIDED, _HEADED)
        for match in pattern.finditer(text)
        if not _conditional(text, match.start())
    ]
    for _, found in sorted(announced, key=lambda item: item[0], reverse=True):
        if found:
            return found
    lines = [line for line in text.splitlines() if line.strip() and not re.fullmatch(r" ?<[^>]*> ?", line)]
    if not lines:
        return None
    for line in (lines[-1], lines[0]):
        if found := _choice(line, letters, announced=False):
            return found
    named = {word.lower() for word in re.findall(r"\b(?:yes|no|maybe)\b", lines[-1], re.IGNORECASE)}
    hedged = re.search(r"\b(?:not|if|whether|could)\b|\bno \w", lines[-1], re.IGNORECASE)
    return named.pop() if len(named) == 1 and not hedged else None


_DECIDED = re.compile(
    r"(?:\b(?:answer(?: choice)?|decision|conclusion|final|correct option)\b(?: to (?:the|this) question)?"
    r"[*_`\"' ]{0,4}(?:is|would be|[:=]|→)|\bI (?:would )?(?:choose|select|pick|go with))"
    r"[*_`: ]{0,6}(?:therefore |thus |likely |option )?([^\n]{1,60})",
    re.IGNORECASE,
)
_HEADED = re.compile(
    r"^[#*_ ]*(?:final )?(?:answer|decision|conclusion)[*_: ]*\n+[ ]?([^\n]{1,60})", re.IGNORECASE | re.MULTILINE
)
_ANSWER_KEYS = ("answer_choice", "final_decision", "final_answer", "decision", "answer", "label", "prediction")


def _conditional(text: str, position: int) -> bool:
    """Whether the sentence before `position` is a condition: "if the trial failed, the answer is no"."""
    sentence = re.split(r"\.(?:\s|$)|\n", text[:position])[-1]
    return re.search(r"\bif\b", sentence, re.IGNORECASE) is not None


_STOPS = r"(?= ?(?:$|[.;:!?)\]}*_\"'`\n]|,|[-–—] |because\b|since\b))"


def _choice(text: str, letters: Mapping[str, str], *, announced: bool) -> str | None:
    """The decision at the very start of a short text: `B. no`, `**Yes**, because`, `"maybe"`, `(C)`, `A`.

    "No difference in mortality" and "A trial of 40" decide nothing, and "yes, no or maybe" is a list;
    after an announcement "yes in most patients" is enough.
    """
    text = re.sub(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = text.strip().lstrip("*_`\"'([{<$ ").strip()
    with_letter = re.match(r"(?:option )?([A-Za-z]) ?[.):,-][ *_\"')]*\b(yes|no|maybe)\b", text, re.IGNORECASE)
    if with_letter and with_letter.group(1).upper() in letters:
        return with_letter.group(2).lower()
    if re.match(r"(?:yes|no|maybe) ?(?:,|/|or\b|and\b)+ ?(?:or |and )?(?:yes|no|maybe)\b", text, re.IGNORECASE):
        return None
    word = re.match(rf"(yes|no|maybe)\b{_STOPS}", text, re.IGNORECASE)
    if word is None and announced:
        word = re.match(r"(yes|maybe)\b", text, re.IGNORECASE)
    if word:
        return word.group(1).lower()
    letter = re.match(r"(?:[Oo]ption )?([A-Z])(?:[.):\]}*_\"',;]|$| ?$| because\b| since\b)", text)
    return letters.get(letter.group(1)) if letter else None


def _json_answers(text: str) -> Iterator[str]:
    """The values of answer fields in a JSON object, whole or with its end cut off."""
    start, end = text.find("{"), text.rfind("}")
    try:
        value = orjson.loads(text[start : end + 1]) if 0 <= start < end else None
    except orjson.JSONDecodeError:
        value = None
    if isinstance(value, dict):
        yield from (value[key] for key in _ANSWER_KEYS if isinstance(value.get(key), str))
    for key in _ANSWER_KEYS:
        yield from re.findall(rf"[\"']{key}[\"'] ?: ?[\"']([^\"'\n]*)[\"']", text)[-1:]


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
