"""Features of a question's text that may say how hard it is.

`words` needs nothing. `readability` is the Automated Readability Index by textstat: it counts
letters, words and sentences, where textstat's indices that count syllables fetch a dictionary
over the network. `dependency_distance` is the mean distance of a word to its head, by spaCy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from thinkswitch_plugin.errors import ThinkSwitchError

SPACY_MODEL = "en_core_web_sm"
_WORD = re.compile(r"\w+(?:['’]\w+)*")


def words(text: str) -> float:
    """How many words; `7*3+4*2` has four."""
    return float(len(_WORD.findall(text)))


def readability(text: str) -> float:
    """Automated Readability Index (about a US school grade; of a short text also below 0).

    Raises `ThinkSwitchError` if textstat is not installed.
    """
    return float(_textstat().automated_readability_index(text)) if text.strip() else 0.0


def dependency_distance(text: str) -> float:
    """Mean distance, in tokens, between a word and its syntactic head; 0 for a text of single words.

    Raises `ThinkSwitchError` if spaCy or its model is not installed.
    """
    return mean_distance(_spacy()(text))


def mean_distance(parsed: Any) -> float:
    """The mean over the words of a spaCy document, roots left out."""
    distances = [abs(token.i - token.head.i) for token in parsed if token.head.i != token.i]
    return sum(distances) / len(distances) if distances else 0.0


FEATURES: dict[str, Callable[[str], float]] = {
    found.__name__: found for found in (words, readability, dependency_distance)
}


def read(text: str, names: Sequence[str]) -> list[float]:
    """The named features of a text, on one scale: sign(x) · log(1 + |x|)."""
    return [math.copysign(math.log1p(abs(value)), value) for value in (FEATURES[name](text) for name in names)]


def _missing(feature: str, needs: str) -> ThinkSwitchError:
    return ThinkSwitchError(
        f"The feature `{feature}` needs {needs}, or remove it from `thinkswitch.perception.features`."
    )


@cache
def _textstat() -> Any:
    try:
        import textstat
    except ImportError:
        raise _missing("readability", "textstat: `pip install textstat`") from None
    return textstat


@cache
def _spacy() -> Any:
    try:
        import spacy

        return spacy.load(SPACY_MODEL)
    except (ImportError, OSError):
        needs = f"spaCy and its model: `pip install spacy` and `python -m spacy download {SPACY_MODEL}`"
        raise _missing("dependency_distance", needs) from None
