"""The functions that the task files in this folder name. They do not need axolotl.

To work offline, set THINKSWITCH_DATA to a folder that contains `aime_2026` and `pubmedqa` as
.jsonl, .csv or .parquet, with the columns of the hub's datasets.

lm-eval passes the model arguments of the run to each `NAME_dataset`. A `grade_KIND` reads answers by the
rules for that kind in docs/grading.md.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from thinkswitch_plugin.data import answers
from thinkswitch_plugin.judging.evaluation import completions, grade, grade_repeats

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("lm_eval")
TRACE_REMOVED = "trace_removed"  # a column of the questions, if lm-eval removes the traces before grading


def arithmetic_dataset(**arguments: Any) -> dict[str, Any]:
    """The held-out questions of the embedded domain."""
    from datasets import Dataset

    from thinkswitch_plugin.demo import task

    rows = [{"question": q, "answer": task.answer(q)} for q in task.held_out()]
    return _test(Dataset.from_list(rows), arguments)


def arithmetic_mixed_dataset(**arguments: Any) -> dict[str, Any]:
    """The held-out questions of the mixed domain, with their strata."""
    from datasets import Dataset

    from thinkswitch_plugin.demo import mixed

    return _test(Dataset.from_list(mixed.rows()), arguments)


def aime_dataset(**arguments: Any) -> dict[str, Any]:
    """AIME 2026: 30 problems from MathArena/aime_2026, or from THINKSWITCH_DATA."""
    from thinkswitch_plugin.data.sources import aime_rows

    return _test(aime_rows(), arguments)


def pubmedqa_dataset(**arguments: Any) -> dict[str, Any]:
    """The fixed 30-question subset of PubMedQA's official test half."""
    from thinkswitch_plugin.data.sources import pubmedqa_subset

    return _test(pubmedqa_subset(), arguments)


def pubmedqa_full_dataset(**arguments: Any) -> dict[str, Any]:
    """All 500 questions of PubMedQA's official test half."""
    from thinkswitch_plugin.data.sources import pubmedqa_half

    return _test(pubmedqa_half("test"), arguments)


def _test(rows: Dataset, arguments: dict[str, Any]) -> dict[str, Dataset]:
    """The questions as a test split, with a mark if a model argument of the run removes the traces."""
    if arguments.get("think_end_token") is not None:
        log.warning(
            "`think_end_token` in the model arguments removes the traces before they are graded, so no think ratio "
            "is reported and a trace that was cut is read as an answer; leave it out: the task splits traces itself."
        )
        rows = rows.add_column(TRACE_REMOVED, [True] * len(rows))
    return {"test": rows}


def _gold(doc: dict[str, Any]) -> str:
    """A question's gold answer: its `answer`, or PubMedQA's `final_decision`."""
    return str(doc["final_decision"] if "final_decision" in doc else doc["answer"])


def _graded(kind: str, doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """The metrics of one question."""
    gold = _gold(doc)
    reported = grade_repeats(kind, results, gold)
    if answers.gold(kind, gold) is None:
        question = next((value for value in doc.values() if isinstance(value, str) and " " in value), "")
        log.error(
            "The question %r is not graded and counts in no score: %s.", question[:80], answers.unread(kind, gold)
        )
    if doc.get(TRACE_REMOVED):
        del reported["think_ratio"]
    return reported


def grade_digit(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """One digit."""
    return _graded("digit", doc, results)


def grade_arithmetic_mixed(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """One digit, in either format. `accuracy_<stratum>` is reported for the stratum of the question only.

    lm-eval averages each metric over the questions that have it. A checkpoint that knows no format (one of
    the loop) is graded as in `thinkswitch_arithmetic`.
    """
    from thinkswitch_plugin.data import formats

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


def grade_integer(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """An integer."""
    return _graded("integer", doc, results)


def grade_matharena(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """An integer, as MathArena reads it."""
    return _graded("matharena", doc, results)


def grade_decision(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """Yes, no or maybe. `macro_f1` is the gold decision, followed by the decision read from each completion."""
    reported, gold = _graded("decision", doc, results), _gold(doc)
    if "mean@k" in reported:
        found = [grade("decision", text, gold)["answer"] for text in completions(results)]
        reported["macro_f1"] = [gold, *found]
    return reported


def grade_exact(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """The whole answer, compared as text."""
    return _graded("exact", doc, results)


def macro_f1(questions: Sequence[Sequence[str | None]]) -> float:
    """Macro-F1 over the decisions, the mean of k runs: the j-th completions of all questions are one run.

    Computed as by PubMedQA's authors (pubmedqa/pubmedqa, evaluation.py). A completion without a
    readable answer is a miss of its gold decision, and is not a decision itself.

    Args:
        questions: for each question its gold decision, followed by the decision read from each of its k completions.
    """
    from sklearn.metrics import f1_score

    gold, *runs = zip(*questions, strict=True)
    scores = []
    for run in runs:
        decisions = sorted({one for one in (*gold, *run) if one is not None})
        read = ["unread" if one is None else one for one in run]
        scores.append(f1_score(gold, read, labels=decisions, average="macro", zero_division=0.0))
    return float(sum(scores) / len(scores))
