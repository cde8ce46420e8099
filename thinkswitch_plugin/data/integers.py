"""Read the integer that a text comes to, or that a gold answer is (AIME)."""

from __future__ import annotations

import logging
import re
from decimal import Decimal, InvalidOperation

from thinkswitch_plugin.data.statements import WINDOW, boxed, plain, statements

LONGEST_BOX = 200


def published(text: str) -> str | None:
    """The integer that a gold answer is or states, None if it is none; nothing is looked for in prose."""
    text = plain(text)
    if found := [content for *_, content in statements(text)] or re.findall(r"####([^\n#]+)\s*$", text):
        text = found[-1]
    return _number(text) or _worked_out(text)


def integer(text: str) -> str | None:
    r"""The integer that a competition answer comes to, as plain digits (AIME).

    In this order: the last statement (``\boxed{055}`` -> 55, ``<answer>55</answer>``) that is not
    empty, and nothing else if there is one; the last announcement (``Answer: 220.``, ``the answer
    is **220**``, ``#### 220``); the last sentence, by what its last equation equals or the only
    number in it; the last bold number. Leading zeros, ``45.0``, units, degrees, ordinals,
    thousands commas and signs are understood; an expression is worked out by math-verify.
    """
    text = plain(text)
    if stated_ones := statements(text):
        _, _, box, content = stated_ones[-1]
        # A wrapper may hold a sentence or a box; a box holds the answer itself.
        return _number(content) or _worked_out(content) or (None if box else integer(content))
    text = _DRESSED.sub(r"\1", re.sub(r"[ \t]+", " ", text[-WINDOW:]))
    announced = [m.group(1) for m in _ANNOUNCED.finditer(text) if not _GOES_ON.match(text, m.end())]
    if announced:
        return _number(announced[-1])
    lines = [line for line in text.splitlines() if re.search(r"\w", line)]
    if lines and _BULLET.match(lines[-1]):  # a list at the end checks or explains; the answer is before it
        said = [m.group(1) for line in lines if not _BULLET.match(line) and (m := _STATED.search(line))]
        if said:
            return _number(said[-1])
    if lines and (found := _of_line(lines[-1])) is not None:
        return found
    bold = [_number(match.group(1)) for match in _BOLD.finditer(text)]
    return bold[-1] if bold else None


def last_integer(text: str) -> str | None:
    """MathArena's reading of a final answer: the last box; if there is none, the last integer of the text.

    eth-sri/matharena, src/matharena/parser.py, `extract_answer` with `strict_parsing: false`. Unlike there, a box
    that cannot be read is not passed over for an integer elsewhere.
    """
    text = plain(text)
    boxes = [content for _, _, content in boxed(text) if content.strip()]
    if boxes:
        return _number(boxes[-1]) or _worked_out(boxes[-1])
    integers = re.findall(r"\b\d+\b", text[-WINDOW:])
    return _whole(integers[-1]) if integers else None


_NUMBER = r"[-+]?\d(?:[\d,]*\d)?(?:\.\d+)?"
_ANNOUNCED = re.compile(
    r"(?:\banswer(?: to [^.\n:]{1,60}?)?[*_`\"' ]{0,4}(?:is|equals|:|=)[*_`\"' :\n]{0,6}(?:\$|\\\(|\\\[)?[*_ ]{0,3}"
    rf"|#### ?\$? ?(?={_NUMBER}\.?\s*(?:$|\n)))({_NUMBER})",
    re.IGNORECASE,
)
# What shows that a number was only the beginning of an expression: 2^3, 25\pi, 2 \cdot 3, 3x, 1/2, 7 = …
_GOES_ON = re.compile(r"\d| \d{3}\b| ?[\^/=+*-](?!\*)| ?\\(?:[a-zA-Z]+)|[A-Za-z]\b")
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
    numbers = {match.group(1) for match in _ALONE.finditer(sentence)}
    return _number(numbers.pop()) if len(numbers) == 1 else None


# A number that is not part of a word or an expression; a letter of another script next to it ends a word.
_ALONE = re.compile(
    rf"(?<![\w^.{{\\])({_NUMBER})(?:st|nd|rd|th)?(?!\w|\^|\\[a-zA-Z]| ?\\(?:sqrt|pi|cdot|times))", re.ASCII
)


def _number(text: str) -> str | None:
    """The integer a short expression states (`016`, `45.0`, `16 \\text{ feet}`, `70^\\circ`), None if it is none."""
    if len(text) > LONGEST_BOX:
        return None
    text = re.sub(r"(?<=\d)(?:\\[,!;: ]|\{,\})(?=\d)", "", text)
    text = re.sub(r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?!\d)", lambda match: match.group(1).replace(" ", ""), text)
    text = _STYLE.sub(" ", text)
    for _ in range(2):  # one inside the other
        text = _WRAPPED.sub(_unwrapped, text)
    text = re.sub(r"(?:\\[pb]?mod|\(mod)\b.*", "", text).replace(r"\equiv", "=")
    text = re.sub(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree|\\q?quad|\\[,;:! $%#()\[\]]|[$%#€£°~]", " ", text)
    text = text.strip().strip("*_`").strip(" ,;")
    while text.startswith("{") and text.endswith("}"):
        text = text[1:-1].strip()
    if "=" in text:
        left, _, right = text.rpartition("=")
        if _UNIT_MARK in left.lstrip(f" {_UNIT_MARK}") or re.search(r",(?!\d{3})|\b(?:or|and)\b", text):
            return None
        text = right.strip()
    text = re.sub(r"^\(?[A-E]\)\s*", "", text)
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    digits = match.group(1)
    if "," in digits and not re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", digits):
        return None
    return _whole(digits.replace(",", ""))


_UNIT_MARK = "\x00"  # words in `\text{…}`: a unit, or words before the number
_STYLE = re.compile(
    r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:displaystyle|left|right|bf|rm|it|large|Large|LARGE|huge|Huge|bigl?|bigr|Bigl?|Bigr)\b"
)
_WRAPPER = r"\\(?:text(?:bf|it|rm|sf|tt|normal|superscript)?|math(?:rm|bf|it|sf|tt)|boldsymbol|bm|mbox|hbox|underline|operatorname)\s*"
_WRAPPED = re.compile(rf"{_WRAPPER}\{{([^{{}}]*)\}}")
_DRESSED = re.compile(rf"{_WRAPPER}\{{\s*({_NUMBER})\s*\}}")  # a number and nothing else
_ORDINAL = rf"(?:\^?\s*\{{?\s*(?:st|nd|rd|th)\s*\}}?|\^\s*\{{?\s*{_UNIT_MARK}\s*\}}?)"
_QUANTITY = re.compile(
    rf"(?:{_UNIT_MARK}\s*)?({_NUMBER})\s*[.]?\s*{_ORDINAL}?\s*"
    rf"(?:(?:{_UNIT_MARK}\s*)+|[A-Za-z]{{2,}}[A-Za-z .]*)?(?:\^\{{?\d\}}?)?\s*[.]?"
)


def _unwrapped(match: re.Match[str]) -> str:
    """`\\text{ cm}` is a unit, of however few letters; `\\text{016}` and `\\textbf{(1) }` are their content."""
    content = match.group(1)
    return (
        _UNIT_MARK if re.fullmatch(r"[\sA-Za-z.:/()-]*[A-Za-z][\sA-Za-z.:/()-]*(?:\^\d)?", content) else f" {content} "
    )


def _whole(text: str) -> str | None:
    try:
        value = Decimal(text)
    except InvalidOperation:
        return None
    return str(int(value)) if abs(value) < 10**30 and value == value.to_integral_value() else None


# Expressions whose value could be too large to work out: towers, large factorials, long powers; numbers side by side.
_TOO_LARGE = re.compile(
    r"\d{3,}\s*!|[^\d\s]\s*!|!\s*!|\^\s*\{[^{}]*\^|\^\s*\S\s*\^|\^\s*\{[^{}]*\}\s*\^"
    r"|\^\s*[{(]*\s*-?\d{3,}|\d{10,}|\d\s+\d|\*\*|\\uparrow|\\binom\s*\{\s*\d{4,}"
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
