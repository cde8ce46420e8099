"""Read the decision, yes, no or maybe, that a text comes to (PubMedQA)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import orjson

from thinkswitch_plugin.data.statements import WINDOW, plain, statements

LETTERS = {"A": "yes", "B": "no", "C": "maybe"}
OPTIONS = {letter: letter for letter in "ABCDEFGHIJ"}


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
    text = plain(text)
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


def choice(text: str) -> str | None:
    """The letter, A to J, of the option that a text comes to, by the rules for decisions."""
    found = decision(text, OPTIONS)
    return found if found in OPTIONS else None


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
