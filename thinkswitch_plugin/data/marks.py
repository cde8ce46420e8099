"""Find the marks of every convention in a text: what opens and ends a trace, what encloses an answer.

Linear in the text: every pattern begins with its one literal character, and a tag is looked up by what it comes to
without case, white space, invisible and full-width characters, escapes and attributes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from enum import Enum, auto
from typing import NamedTuple

from thinkswitch_plugin.conventions import CONVENTIONS, LEFTOVERS, TRACE_WORDS, WRAPPERS, Convention


class Kind(Enum):
    """What a mark does."""

    OPEN = auto()  # opens a trace
    CLOSE = auto()  # ends a trace
    WRAP = auto()  # begins a whole answer
    UNWRAP = auto()  # ends it
    GUARD = auto()  # of another convention, quoted, or like a tag of a trace: it splits nothing, and is in no answer


_RANK = {Kind.OPEN: 0, Kind.CLOSE: 0, Kind.WRAP: 1, Kind.UNWRAP: 1, Kind.GUARD: 2}  # of marks in one place


class Mark(NamedTuple):
    """One mark and the convention, or wrapper, it belongs to."""

    start: int
    end: int
    kind: Kind
    name: str


_INVISIBLE = "\u00ad\u180e\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"
_PLAIN: dict[int, int | str | None] = {0xFF01 + n: 0x21 + n for n in range(94)}
_PLAIN |= {ord(c): None for c in _INVISIBLE + "\\"} | {ord("▁"): "_"}
# After `<` and white space, mathematics and code continue in ways that no tag does.
_TAG = re.compile(r"<\s{0,4}[^\s\d<>=.,;:()+*~\[-][^<>\[]{0,63}>?")
_BRACKET = re.compile(r"\[[^\[\]\d]{3,40}\]")
_ESCAPED = (
    re.compile(r"&(?:amp;)*(?:[lL][tT]|#0*60|#[xX]0*3[cC]);([^&<>]{1,64})&(?:amp;)*(?:[gG][tT]|#0*62|#[xX]0*3[eE]);"),
    re.compile(r"\\u003[cC]([^<>]{1,64}?)\\u003[eE]"),
)
_NOT_ASCII = tuple(re.compile(rf"{a}([^<>{a}{b}]{{1,64}})[{b}>]") for a, b in ("＜＞", "⟨⟩", "【】"))
_KIMI = re.compile(r"◁([^<>◁▷]{1,64})▷")
_NAME = re.compile(r"<\s*[/\\]?\s*([A-Za-z][\w:-]{2,24})\b")
_ATTRIBUTES = re.compile(r"(\s*/?\s*[\w:.-]+)\s+[\w:-]+\s*=", re.DOTALL)
_SUFFIX = re.compile(r"(</?think):[\w-]+>")  # Hunyuan: <think:6124c78e>
_LIKE_A_TRACE = re.compile("|".join(TRACE_WORDS))
_SPOKEN = ("assistantfinal", "assistantanalysis", "assistantcommentary")  # harmony without its special tokens
_SPACE = re.compile(rf"[\s{_INVISIBLE}]*")
_EMPHASIS = re.compile(r"[*_>\s]{0,8}")
_QUOTES = frozenset(("``", '""', "''", "“”", "‘’", "„“", "«»", "「」", "『』", "()"))


@functools.lru_cache(4096)
def key(tag: str) -> str:
    """What a tag is looked up by: `< / Think >` and `</think foo="1">` are both `</think>`."""
    tag = tag.translate(_PLAIN)
    if attributes := _ATTRIBUTES.match(tag, 1):
        tag = f"{tag[0]}{attributes[1]}{tag[-1]}"
    tag = "".join(tag.split()).lower()
    if tag.endswith("/>"):
        tag = tag[:-2] + ">"
    return _SUFFIX.sub(r"\1>", tag)


class _Entry(NamedTuple):
    kind: Kind
    name: str
    before: str
    after: re.Pattern[str] | None


def _loose(text: str) -> str:
    """A pattern for a text: any white space, and up to 80 characters of the line for `…`."""
    pieces = [r"\s*".join(re.escape(word) for word in piece.split()) for piece in text.split("…")]
    return r"[^\n]{0,80}?".join(pieces)


def _first_tag(entry: str) -> tuple[int, int] | None:
    found = _TAG.search(entry) or _BRACKET.search(entry) or _KIMI.search(entry)
    return found.span() if found else None


@functools.cache
def _table() -> dict[str, list[_Entry]]:
    """By the key of an entry's first tag, all that may begin there, the longest first."""
    table: dict[str, list[_Entry]] = {}

    def add(entry: str, kind: Kind, name: str) -> None:
        if span := _first_tag(entry):
            before, rest = entry[: span[0]], entry[span[1] :]
            after = re.compile(r"\s*" + _loose(rest), re.IGNORECASE) if rest.strip() else None
            table.setdefault(key(entry[slice(*span)]), []).append(_Entry(kind, name, before, after))

    for each in CONVENTIONS:
        if not each.anchored:
            for kind, entries in ((Kind.OPEN, each.opens), (Kind.CLOSE, each.closes)):
                for entry in entries:
                    add(entry, kind, each.name)
    for begin, end in WRAPPERS:
        add(begin, Kind.WRAP, begin)
        add(end, Kind.UNWRAP, begin)
    for entry in LEFTOVERS:
        add(entry, Kind.GUARD, entry)
    for places in table.values():
        places.sort(key=lambda e: not (e.before or e.after))
    return table


def _is_phrase(convention: Convention, entry: str) -> bool:
    return convention.anchored or _first_tag(entry) is None


def _phrase(entry: str) -> str:
    end = r"[*_:]*[^\S\n]*(?:\n|\Z)" if entry.endswith("\n") else ""
    if entry.startswith("#"):
        return rf"(?:(?<=\n)|(?<![^\s]))#{{1,6}}[^\S\n]*[*_]*{_loose(entry[1:])}{end}"
    emphasis = r"[*_]{0,3}" if entry.endswith(":") else ""
    return emphasis + _loose(entry) + emphasis + end


@functools.cache
def _anchored() -> list[tuple[re.Pattern[str], Convention]]:
    """What opens a trace at the very start of a completion, behind white space and emphasis."""
    return [
        (re.compile(_phrase(entry)), each) for each in CONVENTIONS for entry in each.opens if _is_phrase(each, entry)
    ]


@functools.cache
def _any_anchored() -> re.Pattern[str]:
    return re.compile("|".join(pattern.pattern for pattern, _ in _anchored()))


def phrase_at_start(text: str, start: int = 0) -> tuple[int, Convention] | None:
    """Where a phrase that opens a trace ends, if the text begins with one at `start`, and its convention."""
    begin = _SPACE.match(text, start)
    places = {begin.end(): None, _EMPHASIS.match(text, begin.end()).end(): None}  # type: ignore[union-attr]
    for place in places:
        if not _any_anchored().match(text, place):
            continue
        for pattern, convention in _anchored():
            if found := pattern.match(text, place):
                return found.end(), convention
    return None


@functools.cache
def _own(convention: Convention, *, closes: bool) -> re.Pattern[str] | None:
    """The phrases of a convention (all of a user's own), wherever they stand."""
    entries = convention.closes if closes else convention.opens
    if convention.name == "custom":
        return re.compile("|".join(re.escape(entry.strip()) for entry in entries))
    found = [_phrase(entry) for entry in entries if _is_phrase(convention, entry)]
    return re.compile("|".join(found)) if found else None


def _phrases(text: str, convention: Convention) -> Iterator[Mark]:
    """The phrases of the one convention that splits a text."""
    opens, closes = _own(convention, closes=False), _own(convention, closes=True)
    if opens and (convention.anchored or convention.name == "custom"):
        yield from (Mark(*m.span(), Kind.OPEN, convention.name) for m in opens.finditer(text))
    elif opens and (found := opens.match(text, _SPACE.match(text).end())):  # type: ignore[union-attr]
        yield Mark(0, found.end(), Kind.OPEN, convention.name)
    if closes:
        yield from (Mark(*m.span(), Kind.CLOSE, convention.name) for m in closes.finditer(text))


def _candidates(text: str) -> Iterator[tuple[int, int, str]]:
    """Start, end and text of all that may be a tag, in plain brackets."""
    for sign, pattern in (("<", _TAG), ("[", _BRACKET)):
        for m in pattern.finditer(text) if sign in text else ():
            yield m.start(), m.end(), m[0]
    for sign, pattern in zip(("&", "\\u003"), _ESCAPED, strict=True):
        for m in pattern.finditer(text) if sign in text else ():
            yield m.start(), m.end(), f"<{m[1]}>"
    if not text.isascii():
        for pattern in _NOT_ASCII:
            for m in pattern.finditer(text):
                yield m.start(), m.end(), f"<{m[1]}>"
        for m in _KIMI.finditer(text):
            yield m.start(), m.end(), m[0]


def tags(text: str) -> Iterator[Mark]:
    """Every tag of the table in a text, in no order, and what looks like a tag of a trace."""
    table = _table()
    for start, end, tag in _candidates(text):
        if tag[-1] not in ">]▷":  # `</think` at the end of a line
            name = _NAME.match(tag)
            if name and any(e.kind in (Kind.OPEN, Kind.CLOSE) for e in table.get(key(f"<{name[1]}>"), ())):
                yield Mark(start, start + name.end(), Kind.GUARD, name[0])
            continue
        found = key(tag)
        for entry in table.get(found, ()):
            if not text.endswith(entry.before, 0, start):
                continue
            after = entry.after.match(text, end) if entry.after else None
            if entry.after is None or after:
                yield Mark(start - len(entry.before), after.end() if after else end, entry.kind, entry.name)
                break
        else:
            if " " not in tag.strip() and "\n" not in tag and _LIKE_A_TRACE.search(found):
                yield Mark(start, end, Kind.GUARD, tag)


def find(text: str, convention: Convention | None = None) -> list[Mark]:
    """Every mark in a text, in order, none within another.

    Args:
        convention: the one that splits this text, so that every other's marks are `GUARD`s; None for any.
    """
    found = list(tags(text))
    for word in _SPOKEN if "assistant" in text else ():
        if word in text:
            found += (Mark(*m.span(), Kind.GUARD, word) for m in re.finditer(word, text))
    splits = (Kind.OPEN, Kind.CLOSE)
    if convention is not None:
        found = [m._replace(kind=Kind.GUARD) if m.kind in splits and m.name != convention.name else m for m in found]
        found += _phrases(text, convention)
    elif phrase := phrase_at_start(text):
        end, opening = phrase
        if opening.closes or not any(m.kind in splits for m in found):
            found = [m for m in found if m.start >= end]
            found.append(Mark(0, end, Kind.OPEN, opening.name))
            if pattern := _own(opening, closes=True):
                found += (Mark(*m.span(), Kind.CLOSE, opening.name) for m in pattern.finditer(text, end))
    return _without_mentions(text, _apart(found))


def _apart(found: list[Mark]) -> list[Mark]:
    """In order, the longest where several begin at one place, and none within another."""
    kept: list[Mark] = []
    for mark in sorted(found, key=lambda m: (m.start, -m.end, _RANK[m.kind])):
        if not kept or mark.start >= kept[-1].end:
            kept.append(mark)
    return kept


def _without_mentions(text: str, found: list[Mark]) -> list[Mark]:
    """A mark in quotes or in a block of code is spoken of: it opens and ends nothing."""
    if not found:
        return found
    fences = [m.start() for m in re.finditer("```|~~~", text)] if "`" in text or "~~~" in text else []
    kept, passed = [], 0
    for mark in found:
        while passed < len(fences) and fences[passed] < mark.start:
            passed += 1
        after = mark.end + text.startswith("\\", mark.end)  # in a JSON string the quote is escaped
        quoted = text[mark.start - 1 : mark.start] + text[after : after + 1] in _QUOTES
        spoken_of = quoted or passed % 2
        if spoken_of and mark.kind in (Kind.OPEN, Kind.CLOSE):
            mark = mark._replace(kind=Kind.GUARD)
        if not spoken_of or mark.kind is Kind.GUARD:
            kept.append(mark)
    return kept
