"""The functions that the task files beside this one name. Importing them needs no axolotl.

Off line, set THINKSWITCH_DATA to a folder that holds `aime_2026` and `pubmedqa` as
.jsonl, .csv or .parquet, with the columns of the hub's datasets.
"""

from __future__ import annotations

from typing import Any

from thinkswitch_plugin.evaluation import grade_repeats


def arithmetic_dataset(**_: Any) -> dict[str, Any]:
    """The held-out questions of the embedded domain."""
    from datasets import Dataset

    from thinkswitch_plugin.demo import task

    rows = [{"question": q, "answer": task.answer(q)} for q in task.held_out()]
    return {"test": Dataset.from_list(rows)}


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


def grade_aime(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """An integer."""
    return grade_repeats("integer", results, str(doc["answer"]))


def grade_pubmedqa(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """Yes, no or maybe."""
    return grade_repeats("decision", results, doc["final_decision"])


def grade_exact(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """The whole answer, letter by letter."""
    return grade_repeats("exact", results, str(doc["answer"]))
