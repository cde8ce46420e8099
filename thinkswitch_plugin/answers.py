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
from itertools import pairwise

import orjson

from thinkswitch_plugin import marks

# Final answers stand at the end; a degenerate text of megabytes must cost nothing.
WINDOW = 4_000
LONGEST_BOX = 200
LONGEST_STATEMENT = 1_000


def exact(text: str) -> str | None:
    """The whole text without surrounding white space."""
    return text.strip() or None


def digit(text: str) -> str | None:
    """The text if it is one digit and nothing else (the embedded domain)."""
    text = text.strip()
    return text if re.fullmatch(r"[0-9]", text) else None


def integer(text: str) -> str | None:
    r"""The integer that a competition answer comes to, as plain digits (AIME).

    In this order: the last statement (``\boxed{055}`` -> 55, ``<answer>55</answer>``) that is not
    empty, and nothing else if there is one; the last announcement (``Answer: 220.``, ``the answer
    is **220**``, ``#### 220``); the last sentence, by what its last equation equals or the only
    number in it; the last bold number. Leading zeros, ``45.0``, units, degrees, ordinals,
    thousands commas and signs are understood; an expression is worked out by math-verify.
    """
    text = _plain(text)
    if stated_ones := statements(text):
        _, _, box, content = stated_ones[-1]
        # A wrapper may hold a sentence or a box; a box holds the answer itself.
        return _number(content) or _worked_out(content) or (None if box else integer(content))
    text = _DRESSED.sub(r"\1", re.sub(r"[ \t]+", " ", text[-WINDOW:]))
    announced = [m.group(1) for m in _ANNOUNCED.finditer(text) if not _GOES_ON.match(text, m.end())]
    if announced:
        return _number(announced[-1])
    lines = [line for line in text.splitlines() if re.search(r"\w", line)]
    if lines and _BULLET.match(lines[-1]):  # a closing list checks or explains; the answer stands before it
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
    text = _plain(text)
    boxes = [content for _, _, content in boxed(text) if content.strip()]
    if boxes:
        return _number(boxes[-1]) or _worked_out(boxes[-1])
    integers = re.findall(r"\b\d+\b", text[-WINDOW:])
    return _whole(integers[-1]) if integers else None


def boxed(text: str) -> Iterator[tuple[int, int, str]]:
    r"""Start, end and content of every ``\boxed{…}``, ``\fbox{…}`` and ``\framebox{…}`` with balanced braces, in order.

    A text that went through JSON may have lost the backslash, or have ``\b`` as one character.
    """
    for match in _BOX.finditer(text):
        depth, start = 1, match.end()
        for position in range(start, min(len(text), start + LONGEST_STATEMENT)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                yield match.start(), position + 1, text[start:position]
                break


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
    text = _plain(text)
    whole = [(start, end) for start, end, _, _ in statements(text) if not _ASKED.match(text, end)]
    whole += [match.span() for match in _FINAL.finditer(text, max(0, len(text) - WINDOW))]
    if not whole:
        return ""
    start, end = max(whole)
    return "" if _BOX.search(text, end) else text[start:end]


_BOX = re.compile(r"(?:\\f?box|\\framebox|\\?boxed|\x08oxed)\s{0,3}(?:\[[^\]\n]{0,20}\])?\s{0,3}\{")
_ASKED = re.compile(r"[\s$)\\]{0,4}\?")
# Announced as final, on a line that ended.
_FINAL = re.compile(
    r"(?:\bfinal answer[*_ ]{0,3}(?:is\b|[:=])|####)[^\n]{1,200}\n|\bfinal answer[*_: ]{0,4}\n{1,3}[^\n]{1,200}\n",
    re.IGNORECASE,
)


def _plain(text: str) -> str:
    """Full-width characters, and the spaces and the minus sign of typesetting, as their plain forms."""
    return text.translate(_PLAIN)


_PLAIN = str.maketrans(
    {
        **{chr(wide): chr(wide - 0xFEE0) for wide in range(0xFF01, 0xFF5F)},
        **dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f\u3000", " "),
        **{"\u2212": "-", "\u3002": ". "},
    }
)


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


# A number that is no part of a word or an expression; a letter of another script beside it is a word's end.
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


LETTERS = {"A": "yes", "B": "no", "C": "maybe"}


def decision(text: str, letters: Mapping[str, str] = LETTERS) -> str | None:
    """The decision yes, no or maybe that a text comes to (PubMedQA).

    In this order: an answer field of a JSON object; the last box or ``<answer>``; the last announcement
    (``Final Answer: B``, ``the answer is "maybe"``, ``I choose B``, a heading *Answer*) that is not a
    condition; a last or first line that is a decision or a letter, or begins with one; the
    only decision that the last line names. Prose that names several without deciding has
    no answer.

    Args:
        letters: what the options stand for, where a letter is answered.
    """
    text = _plain(text)
    whole = statements(text)
    text = re.sub(r"[ \t]+", " ", text[-WINDOW:]).strip()
    for value in _json_answers(text):
        if found := _choice(value, letters, announced=True):
            return found
    for _, _, box, content in reversed(whole):
        if found := _choice(content, letters, announced=True) or (None if box else decision(content, letters)):
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
    r"(?:\b(?:answer(?: choice)?|decision|conclusion|final|correct option)\b(?: to (?:the|this) question)?(?: ?\([^()\n]{1,40}\))?"
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
    "matharena": last_integer,
}
WHOLE_TEXT = ("exact", "digit")  # kinds whose answer is all of the text


def extract(kind: str, text: str | None, letters: Mapping[str, str] | None = None) -> str | None:
    """The final answer in `text` in its normal form, or None where there is none."""
    if text is None:
        return None
    if kind == "decision" and letters:
        return decision(text, letters)
    return EXTRACTORS[kind](text)


def extract_unfinished(kind: str, text: str | None, letters: Mapping[str, str] | None = None) -> str | None:
    """The final answer that a text stated before it was cut off; None where the kind takes the whole text for it."""
    return None if text is None or kind in WHOLE_TEXT else extract(kind, stated(text), letters)


def gold(kind: str, text: str) -> str | None:
    """The normal form of a published right answer, None if the kind cannot read it (`8/21` is no integer).

    It is the answer itself (`016`, `45.0`, `70^\\circ`, `yes`) or states it (`\\boxed{7}`, `… #### 80`);
    nothing is looked for in prose.
    """
    if kind not in ("integer", "matharena"):
        return EXTRACTORS[kind](text)
    text = _plain(text)
    if found := [content for *_, content in statements(text)] or re.findall(r"####([^\n#]+)\s*$", text):
        text = found[-1]
    return _number(text) or _worked_out(text)


def unread(kind: str, text: str) -> str:
    """What is wrong with a gold answer that `gold` cannot read, to stand inside a sentence."""
    return f"the gold answer {text[:80]!r} cannot be read as `{kind}`"


def majority(found: Sequence[str | None]) -> str | None:
    """The most frequent answer (the earliest of equals), None if there is none at all."""
    counts = Counter(a for a in found if a is not None)
    return counts.most_common(1)[0][0] if counts else None
