"""The invariants of `make fuzz`, tested with hypothesis, which minimises counterexamples."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import fuzz
from tests import invariants
from tests.invariants import CLOSINGS, FILLERS, OPENINGS, SECRET
from thinkswitch_plugin.answer_kinds import KINDS

# The same examples every time; `make fuzz` looks further.
HERE = settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
_pieces = st.lists(st.sampled_from((*FILLERS, SECRET, *CLOSINGS, *OPENINGS)), max_size=12).map(fuzz.whole)
_text = st.one_of(st.text(), st.lists(st.sampled_from(fuzz.MATHS)).map("".join))


@HERE
@given(_pieces, st.booleans(), st.booleans())
def test_only_what_follows_the_last_closing_tag_can_be_an_answer(pieces: list[str], opened: bool, cut: bool) -> None:
    invariants.check_split(pieces, opened, cut)


@HERE
@given(st.sampled_from(sorted(KINDS)), _text)
def test_an_extracted_answer_is_a_normal_form(kind: str, text: str) -> None:
    invariants.check_answer(kind, text)


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_ids = [f"p{p}-s{s}" for p in range(3) for s in range(2)]


@st.composite
def _line(draw: st.DrawFn) -> Any:
    if draw(st.integers(0, 9)) == 0:
        return draw(_json.map(lambda value: {"custom_id": "p0-s0", "response": value}))
    return fuzz.stored_line(draw(st.randoms(use_true_random=False)), _ids)


@HERE
@given(st.lists(_line(), max_size=8), st.sampled_from(("first", "all", "vote")))
def test_counts_add_up_order_is_kept_and_no_trace_is_in_a_pair(lines: list[Any], selection: str) -> None:
    samples = [(f"p{p}", s) for p in range(3) for s in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        invariants.check_pairs(samples, lines, selection, Path(folder))


_yaml = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.sampled_from(fuzz.ODD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@HERE
@given(st.sampled_from(("domain", "pair", "prompts", "sampling", "answers", "engine", "rebuild", "evaluation")), _yaml)
def test_a_recipe_is_read_or_refused_in_one_sentence(section: str, value: Any) -> None:
    values = yaml.safe_load(fuzz.TEMPLATE.read_text(encoding="utf-8"))
    values["thinkswitch"][section] = value
    with tempfile.TemporaryDirectory() as folder:
        invariants.check_recipe(yaml.safe_dump(values).encode("utf-8", "replace"), Path(folder))


@HERE
@given(st.binary(max_size=60))
def test_any_bytes_as_a_recipe_or_as_prompts_are_refused_in_one_sentence(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert not invariants.check_recipe(data, Path(folder))
        invariants.check_prompts(data, "{{prompt}}", Path(folder))


@HERE
@given(st.lists(st.dictionaries(st.sampled_from(("prompt", "id", "question", "x")), _json, max_size=3), max_size=5))
def test_prompts_are_read_in_order_or_refused_in_one_sentence(rows: list[dict[str, Any]]) -> None:
    data = b"\n".join(orjson.dumps(row) for row in rows)
    with tempfile.TemporaryDirectory() as folder:
        invariants.check_prompts(data, "{{prompt}}", Path(folder))


@pytest.mark.parametrize("kind", list(fuzz.KINDS))
def test_a_slice_of_the_fuzz_command_finds_nothing(kind: str) -> None:
    assert fuzz.run(kind, 60, seed=random.Random(0).randrange(1000))[3] == []


def test_the_checks_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinkswitch_plugin.data.marks.find", lambda *_: [])
    with pytest.raises(AssertionError):
        invariants.check_split([SECRET, "</think>", "5"], False, False)
