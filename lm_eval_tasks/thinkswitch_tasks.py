"""The functions that the task files beside this one name. Importing them needs no axolotl.

Off line, set THINKSWITCH_DATA to a folder that holds `aime_2026` and `pubmedqa` as
.jsonl, .csv or .parquet, with the columns of the hub's datasets.
"""

from __future__ import annotations

from typing import Any

from thinkswitch_plugin.evaluation import grade, grade_repeats


def arithmetic_dataset(**_: Any) -> dict[str, Any]:
    """The held-out questions of the embedded domain."""
    from datasets import Dataset

    from thinkswitch_plugin.demo import task

    rows = [{"question": q, "answer": task.answer(q)} for q in task.held_out()]
    return {"test": Dataset.from_list(rows)}


def arithmetic_mixed_dataset(**_: Any) -> dict[str, Any]:
    """The held-out questions of the mixed domain, with their strata."""
    from datasets import Dataset

    from thinkswitch_plugin.demo import mixed

    return {"test": Dataset.from_list(mixed.rows())}


def aime_dataset(**_: Any) -> dict[str, Any]:
    """AIME 2026: 30 problems from MathArena/aime_2026, or from THINKSWITCH_DATA."""
    from thinkswitch_plugin.sources import aime_rows

    return {"test": aime_rows()}


def pubmedqa_dataset(**_: Any) -> dict[str, Any]:
    """The fixed 30-question subset of PubMedQA's official test half."""
    from thinkswitch_plugin.sources import pubmedqa_subset

    return {"test": pubmedqa_subset()}


def pubmedqa_full_dataset(**_: Any) -> dict[str, Any]:
    """All 500 questions of PubMedQA's official test half."""
    from thinkswitch_plugin.sources import pubmedqa_half

    return {"test": pubmedqa_half("test")}


def grade_arithmetic(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """One digit."""
    return grade_repeats("digit", results, doc["answer"])


def grade_arithmetic_mixed(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """One digit, in whichever format; `accuracy_<stratum>` is there for the question's own stratum only.

    lm-eval takes each metric's mean over the questions that have it. A checkpoint that knows no format (one of
    the loop's) is read as in `thinkswitch_arithmetic`.
    """
    from thinkswitch_plugin import answers
    from thinkswitch_plugin.adaptive import formats

    text, gold = str(results[0]), str(doc["answer"])
    done = formats.parse(text)
    if done.form is None:
        read = grade("digit", text, gold)
        right, thinks, answered = read["accuracy"], read["think_ratio"], read["answered"]
    else:
        found = answers.extract("digit", done.answer)
        right, thinks, answered = found == gold, done.form == formats.PRE, found is not None
    accuracy = float(right)
    return {
        "accuracy": accuracy,
        "think_share": float(thinks),
        "answered": float(answered),
        f"accuracy_{doc['stratum']}": accuracy,
    }


def grade_aime(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """An integer."""
    return grade_repeats("integer", results, str(doc["answer"]))


def grade_pubmedqa(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """Yes, no or maybe."""
    return grade_repeats("decision", results, doc["final_decision"])


def grade_exact(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """The whole answer, letter by letter."""
    return grade_repeats("exact", results, str(doc["answer"]))
