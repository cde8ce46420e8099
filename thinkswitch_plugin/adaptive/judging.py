"""Judge one adaptive model by lm-eval, in this process, and keep what became of every question.

A completion's tokens are those up to the answer: for an answer that
comes first the `</answer>` that stops inference is counted, as the end of turn is for the other format.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkswitch_plugin import answers, files
from thinkswitch_plugin.adaptive.formats import PRE, parse
from thinkswitch_plugin.args import EvaluationKeys
from thinkswitch_plugin.engines import has_cuda
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.evaluation import LM_EVAL_BUDGET, newest
from thinkswitch_plugin.in_process import Sampling, evaluate, quiet


@dataclass(frozen=True)
class Question:
    """One held-out question as one model answered it."""

    stratum: str
    correct: bool
    tokens: int
    think: bool
    answer: str | None


def judge(
    model: Any,
    tokenizer: Any,
    out: Path,
    keys: EvaluationKeys,
    kind: str,
    *,
    log: Path,
    prefix: str = "",
    within: AbstractContextManager[Any] | None = None,
) -> dict[str, Any]:
    """Answer the task's questions with a loaded model; lm-eval's files go to `out`, whole or not at all.

    Args:
        model: a transformers model; a perception module in it is at work.
        kind: how the final answer is read, a key of `answers.EXTRACTORS`.
        prefix: what every answer is made to begin with.
        within: entered while the model answers.

    Returns:
        Column by column what became of the questions: the fields of `Question`.
    """
    from lm_eval.models.huggingface import HFLM

    with files.atomic_folder(out) as building:
        with quiet(log), within or nullcontext():
            lm = HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=keys.batch_size,
                device="cuda" if has_cuda() else "cpu",
            )
            evaluate(lm, keys, Sampling(), building, name=out.name, prefix=prefix)
        rows = list(read_questions(newest(building, f"samples_{keys.task}_*.jsonl"), tokenizer, kind, prefix))
        columns = {name: [getattr(row, name) for row in rows] for name in Question.__dataclass_fields__}
    return columns


def read_questions(samples: Path, tokenizer: Any, kind: str, prefix: str = "") -> Iterator[Question]:
    """The verdicts on the rows of lm-eval's samples file, in the order of the questions.

    Raises `ThinkSwitchError` if a row is of another shape.
    """
    rows = sorted((row for _, row in files.read_jsonl(samples)), key=lambda row: row["doc_id"])
    for row in rows:
        try:
            text, gold, doc = row["resps"][0][0], str(row["target"]), row["doc"]
            budget = row["arguments"]["gen_args_0"]["arg_1"].get("max_gen_toks", LM_EVAL_BUDGET)
        except (KeyError, IndexError, TypeError):
            raise ThinkSwitchError(
                f"{samples}, question {row.get('doc_id')}: not a row of lm-eval; delete the folder and run it again."
            ) from None
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        cut = tokens >= budget
        done = parse(prefix + text, cut=cut)
        found = answers.extract(kind, done.answer)
        yield Question(
            stratum=str(doc.get("stratum", "all")),
            correct=found is not None and found == answers.gold(kind, gold),
            tokens=tokens + (not cut) + (1 if prefix else 0),
            think=done.form == PRE,
            answer=found,
        )
