"""The table of `make bad-input`: each broken file is refused in one sentence, each harmless one works."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests import bad_input

FORMS = list(bad_input.forms())
FEW = {form.kind: form for form in FORMS if not form.works}  # the last broken form of every kind
FEW |= {f"{form.kind}, harmless": form for form in FORMS if form.works}
ENGINES = ("merge config", "task data")  # kinds that mergekit or lm-eval reads


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name.split(",")[0] in ENGINES else []) for name in sorted(FEW)],
)
def test_a_broken_file_of_every_kind(name: str) -> None:
    found = bad_input.run(FEW[name], fork=name.split(",")[0] in ENGINES)
    assert bad_input.is_right(FEW[name], found), (FEW[name].defect, found)


@pytest.mark.slow
def test_every_other_form_of_the_table() -> None:
    others = [form for form in FORMS if form not in FEW.values()]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(partial(bad_input.run, fork=True), others))
    wrong = [(form.kind, form.defect, found) for form, found in zip(others, results, strict=True)
             if not bad_input.is_right(form, found)]  # fmt: skip
    assert wrong == []


def test_the_forms_cover_every_file_and_are_told_apart() -> None:
    assert {form.kind for form in FORMS} == {
        "prompts",
        "recipe",
        "merge config",
        "requests",
        "generations",
        "task data",
        "outputs",
    }
    names = [(form.kind, form.defect) for form in FORMS]
    assert len(set(names)) == len(names) and all(form.says or form.works for form in FORMS)
