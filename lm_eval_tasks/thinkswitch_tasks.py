"""The functions that the task files beside this one name. Importing them needs no axolotl."""

from __future__ import annotations

from typing import Any

from thinkswitch_plugin.evaluation import grade


def arithmetic_dataset(**_: Any) -> dict[str, Any]:
    """The held-out questions of the embedded domain as the split `test`."""
    from datasets import Dataset

    from thinkswitch_plugin.demo import task

    rows = [{"question": q, "answer": task.answer(q)} for q in task.held_out()]
    return {"test": Dataset.from_list(rows)}


def grade_arithmetic(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """lm-eval hands over one completion; see `evaluation.grade`."""
    verdict = grade("digit", results[0], doc["answer"])
    return {name: float(verdict[name]) for name in ("accuracy", "think_ratio", "answered")}
