"""The functions that the task files in this folder name. They do not need axolotl.

To work offline, set THINKSWITCH_DATA to a folder that contains `aime_2026`, `aime25`, `pubmedqa`, `gpqa_diamond` and
`ifeval`, or those of them that are used, as .jsonl, .csv or .parquet, with the columns of the hub's datasets.

lm-eval passes the model arguments of the run to each `NAME_dataset`. A `grade_KIND` reads answers by the
rules for that kind in docs/grading.md; an `agreement_KIND` does so for a domain without gold answers.
"""

import hashlib
import logging
import math
import os
import random
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkswitch_plugin.answer_kinds import KINDS
from thinkswitch_plugin.data import answers, benchmarks, sources
from thinkswitch_plugin.data.benchmarks import AimeRow, GpqaRow, IfevalRow, PubMedQARow, check_rows
from thinkswitch_plugin.data.task_files import AGREEMENT
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.figures import question_metrics
from thinkswitch_plugin.judging.samples import completions
from thinkswitch_plugin.judging.verdict import final_answer, split, verdict_on
from thinkswitch_plugin.judging.verdict import think_ratio as closed_of_whole

if TYPE_CHECKING:
    from datasets import Dataset
    from pydantic import BaseModel

log = logging.getLogger("lm_eval")
TRACE_REMOVED = "trace_removed"  # a column of the questions, if lm-eval removes the traces before grading

DATA_VARIABLE = "THINKSWITCH_DATA"
PUBMEDQA_ROWS, PUBMEDQA_SUBSET = 1000, 30
# sha256 of the sorted test ids, one a line: proof that the split below is the official one.
PUBMEDQA_TEST_SHA256 = "406e3b89eff577ed38571eca5a5819734a6f49ac0437d171b6c64e5c3cd195f8"


def arithmetic_dataset(**arguments: Any) -> dict[str, Any]:
    """The held-out questions of the demo domain."""
    from datasets import Dataset

    from thinkswitch_plugin.demo import task

    rows = [{"question": q, "answer": task.answer(q)} for q in task.held_out()]
    return _test(Dataset.from_list(rows), arguments)


def arithmetic_two_dataset(**arguments: Any) -> dict[str, Any]:
    """All chains of two operands, which are no questions of the demo domain: a guard task for it."""
    from datasets import Dataset

    from thinkswitch_plugin.demo import task

    rows = [{"question": q, "answer": task.answer(q)} for q in task.two_operands()]
    return _test(Dataset.from_list(rows), arguments)


def arithmetic_mixed_dataset(**arguments: Any) -> dict[str, Any]:
    """The held-out questions of the mixed domain, with their strata."""
    from datasets import Dataset

    from thinkswitch_plugin.demo import mixed

    return _test(Dataset.from_list(mixed.rows()), arguments)


def words_dataset(**arguments: Any) -> dict[str, Any]:
    """The held-out questions of the domain `words`, half of them in words and phrasings that are new."""
    from datasets import Dataset

    from thinkswitch_plugin.demo import words

    return _test(Dataset.from_list(words.rows(words.held_out())), arguments)


def words_one_step_dataset(**arguments: Any) -> dict[str, Any]:
    """Questions of one step, which are not questions of the domain `words`: a guard task for it."""
    from datasets import Dataset

    from thinkswitch_plugin.demo import words

    return _test(Dataset.from_list(words.rows(words.one_step())), arguments)


def aime_dataset(**arguments: Any) -> dict[str, Any]:
    """AIME 2026: 30 problems from MathArena/aime_2026, or from THINKSWITCH_DATA."""
    return _test(aime_rows(), arguments)


def aime25_dataset(**arguments: Any) -> dict[str, Any]:
    """AIME 2025: 30 problems from math-ai/aime25, or from THINKSWITCH_DATA."""
    return _test(evaluation_rows("aime25", "math-ai/aime25", None, AimeRow, "problem", "test"), arguments)


def gpqa_diamond_dataset(**arguments: Any) -> dict[str, Any]:
    """GPQA Diamond: 198 questions from Idavidrein/gpqa, or from THINKSWITCH_DATA."""
    from datasets import Dataset

    rows = evaluation_rows("gpqa_diamond", "Idavidrein/gpqa", "gpqa_diamond", GpqaRow, "Question")
    return _test(Dataset.from_list([benchmarks.gpqa_question(row) for row in rows]), arguments)


def ifeval_dataset(**arguments: Any) -> dict[str, Any]:
    """IFEval: 541 prompts from google/IFEval, or from THINKSWITCH_DATA."""
    from datasets import Dataset

    rows = evaluation_rows("ifeval", "google/IFEval", None, IfevalRow, "prompt")
    benchmarks.require_checkable((f"IFEval, row {number}", row) for number, row in enumerate(rows, 1))
    return _test(Dataset.from_list([benchmarks.ifeval_question(row) for row in rows]), arguments)


def pubmedqa_dataset(**arguments: Any) -> dict[str, Any]:
    """The fixed 30-question subset of PubMedQA's official test half."""
    return _test(pubmedqa_subset(), arguments)


def pubmedqa_full_dataset(**arguments: Any) -> dict[str, Any]:
    """All 500 questions of PubMedQA's official test half."""
    return _test(pubmedqa_half("test"), arguments)


def _test(rows: "Dataset", arguments: dict[str, Any]) -> dict[str, "Dataset"]:
    """The questions as a test split; they note if a model argument of the run removes the traces."""
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
    """The metrics of one question; `mean@k_<stratum>` as well if the question has a `stratum`."""
    gold = _gold(doc)
    reported = question_metrics(kind, completions(results), gold)
    if answers.gold(kind, gold) is None:
        question = next((value for value in doc.values() if isinstance(value, str) and " " in value), "")
        log.error(
            "The question %r is not graded and counts in no score: %s.", question[:80], answers.unread(kind, gold)
        )
    elif "stratum" in doc:
        reported[f"mean@k_{doc['stratum']}"] = reported["mean@k"]
    if doc.get(TRACE_REMOVED):
        del reported["think_ratio"]
    return reported


def _agreeing(kind: str, doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """The metrics of one question that has no gold answer, only the majority answer of the thinking checkpoint."""
    reported = _graded(kind, doc, results)
    agreement = {AGREEMENT: reported["mean@k"]} if "mean@k" in reported else {}
    return agreement | {name: reported[name] for name in ("think_ratio", "answered") if name in reported}


def __getattr__(name: str) -> Any:
    """`grade_KIND` and `agreement_KIND` for each kind of answer: the metrics of one question."""
    function, _, kind = name.partition("_")
    if function not in ("grade", AGREEMENT) or kind not in KINDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(_graded if function == "grade" else _agreeing, kind)


def grade_arithmetic_mixed(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """One digit, in either format. `accuracy_<stratum>` is reported for the stratum of the question only.

    lm-eval averages each metric over the questions that have it. A checkpoint that knows no format (one of
    the loop) is graded as in `thinkswitch_arithmetic`.
    """
    from thinkswitch_plugin.data import formats

    text, gold = str(results[0]), str(doc["answer"])
    done = formats.parse(text)
    if done.form is None:
        read = verdict_on("digit", split(results[0]), gold)
        found, thinks = read.answer, read.closed_trace
    else:
        found, thinks = answers.extract("digit", done.answer), done.form == formats.PRE
    accuracy = float(found == gold)
    return {
        "accuracy": accuracy,
        "think_share": float(thinks),
        "answered": float(found is not None),
        f"accuracy_{doc['stratum']}": accuracy,
    }


def grade_decision(doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
    """Yes, no or maybe. `macro_f1` is the gold decision, followed by the decision read from each completion."""
    reported, gold = _graded("decision", doc, results), _gold(doc)
    if "mean@k" in reported:
        found = [final_answer("decision", split(text)) for text in completions(results)]
        reported["macro_f1"] = [gold, *found]
    return reported


def think_ratio(questions: Sequence[Sequence[int]]) -> float:
    """The think ratio over all questions: closed traces ÷ completions that were not cut.

    Args:
        questions: for each question its completions with a closed trace, and those that were not cut.
    """
    closed, whole = map(sum, zip(*questions, strict=True))
    return closed_of_whole(closed, whole)


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


def evaluation_rows(
    file_name: str, hub: str, config: str | None, shape: type["BaseModel"], name: str, split: str = "train"
) -> "Dataset":
    """An evaluation set from THINKSWITCH_DATA where that is set, else from the hub.

    Args:
        shape: what every row must hold; other columns are kept.
        name: the column that tells one question from another.

    Raises `ThinkSwitchError` naming what is missing, or the row and field that is wrong.
    """
    from datasets import Dataset
    from pyarrow import ArrowInvalid, ArrowTypeError

    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        rows = sources.load_hub(hub, config, split, None)[0]
        check_rows(((f"{hub}, row {n}", row) for n, row in enumerate(rows, 1)), hub, shape, name)
        return rows
    for suffix in sources.SUFFIXES:
        path = Path(folder) / f"{file_name}{suffix}"
        if path.exists():
            unit = "line" if suffix == ".jsonl" else "row"
            found = [(f"{path}, {unit} {n}", row) for n, row in sources.read_file(path)]
            check_rows(found, str(path), shape, name)
            try:
                return Dataset.from_list([row for _, row in found])
            except (ArrowInvalid, ArrowTypeError) as error:
                raise ThinkSwitchError(f"{path}: a column holds values of different types: {error}.") from None
    raise ThinkSwitchError(f"{DATA_VARIABLE}={folder} holds no {file_name} as {', '.join(sources.SUFFIXES)}.")


def aime_rows() -> "Dataset":
    """AIME 2026: 30 problems."""
    return evaluation_rows("aime_2026", "MathArena/aime_2026", None, AimeRow, "problem")


def pubmedqa_rows() -> "Dataset":
    """All labelled rows of PubMedQA."""
    return evaluation_rows("pubmedqa", "qiaojin/PubMedQA", "pqa_labeled", PubMedQARow, "pubid")


def pubmedqa_half(half: str) -> "Dataset":
    """The rows of PubMedQA's official `test` half, or of the other one (`train`), in the set's order.

    A set of another size than the official 1,000 rows has no halves: all of it is the
    test set, and there is no training half.
    """
    rows = pubmedqa_rows()
    test = pubmedqa_test_ids(zip((str(i) for i in rows["pubid"]), rows["final_decision"], strict=True))
    chosen = [n for n, pubid in enumerate(rows["pubid"]) if (str(pubid) in test) == (half == "test")]
    return rows.select(chosen)


def pubmedqa_test_ids(labelled: Iterable[tuple[str, str]]) -> set[str]:
    """The official test ids, worked out by the published rule from (id, decision) in the set's order.

    The authors (pubmedqa/pubmedqa, preprocess/split_dataset.py) shuffle the ids of each decision, in the
    order yes, no, maybe, with Python's generator seeded 0, and take the second half of each.
    Raises `ThinkSwitchError` if 1,000 rows do not give the published ids.
    """
    by_decision: dict[str, list[str]] = {"yes": [], "no": [], "maybe": []}
    for pubid, decision in labelled:
        if decision not in by_decision:
            raise ThinkSwitchError(f"PubMedQA row {pubid}: `final_decision` is {decision!r}; use yes, no or maybe.")
        by_decision[decision].append(pubid)
    total = sum(len(ids) for ids in by_decision.values())
    if total != PUBMEDQA_ROWS:
        return {pubid for ids in by_decision.values() for pubid in ids}
    generator = random.Random(0)
    test: set[str] = set()
    for ids in by_decision.values():
        generator.shuffle(ids)
        test.update(ids[math.ceil(len(ids) / 2) :])
    if hashlib.sha256("\n".join(sorted(test)).encode()).hexdigest() != PUBMEDQA_TEST_SHA256:
        raise ThinkSwitchError(
            "PubMedQA's rows are not in their published order, so the official test half cannot be told; "
            "use the file as it comes from qiaojin/PubMedQA, config pqa_labeled."
        )
    return test


def pubmedqa_subset() -> "Dataset":
    """The fixed 30 questions: those of the test half whose ids have the smallest sha256."""
    rows = pubmedqa_half("test")
    order = sorted(range(len(rows)), key=lambda n: hashlib.sha256(str(rows[n]["pubid"]).encode()).hexdigest())
    return rows.select(sorted(order[:PUBMEDQA_SUBSET]))
