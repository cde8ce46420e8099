"""Judge one adaptive model by lm-eval, in this process, and read what became of every question.

lm-eval's files are kept; verdicts are read from them each time, so they never outlive the rules that made them.
A completion's tokens are those up to the answer: for an answer that
comes first the `</answer>` that stops inference is counted, as the end of turn is for the other format.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkswitch_plugin import files
from thinkswitch_plugin.args import EngineKeys, EvaluationKeys
from thinkswitch_plugin.data import answers
from thinkswitch_plugin.data.formats import PRE, STOP, parse
from thinkswitch_plugin.judging.evaluation import Sampling, batch_size, evaluate, quiet
from thinkswitch_plugin.judging.samples import read_rows, samples_file
from thinkswitch_plugin.judging.verdict import how_read, is_cut


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
    *,
    log: Path,
    prefix: str = "",
    within: AbstractContextManager[Any] | None = None,
) -> None:
    """Answer the task's questions with a loaded model, greedily; lm-eval's files go to `out`, whole or not at all.

    An answer that comes first ends at its closing tag, also where the task's own stop strings do not say so.

    Args:
        model: a transformers model, on the device that it is to answer on; a perception module in it is at work.
        prefix: what every answer is made to begin with.
        within: entered while the model answers.
    """
    from thinkswitch_plugin.engines.embedded import EmbeddedEngine
    from thinkswitch_plugin.judging.model import ThinkSwitchLM

    asked = EngineKeys.model_validate({})
    with files.atomic_folder(out) as building, quiet(log), within or nullcontext():
        engine = EmbeddedEngine(tokenizer.name_or_path, model, batch_size(keys, asked))
        lm = ThinkSwitchLM(building, out.name, engine, asked, tokenizer, how_read(tokenizer, None), log)
        evaluate(lm, keys, Sampling(temperature=0.0), name=out.name, prefix=prefix, stop=STOP)


def read_columns(out: Path, keys: EvaluationKeys, tokenizer: Any, kind: str, prefix: str = "") -> dict[str, Any]:
    """What became of the questions that `judge` asked, column by column: the fields of `Question`.

    Args:
        kind: how the final answer is read, a key of `KINDS`.
        prefix: as `judge` was told.
    """
    rows = list(read_questions(samples_file(out, keys.task), tokenizer, kind, prefix))
    return {name: [getattr(row, name) for row in rows] for name in Question.__dataclass_fields__}


def read_questions(samples: Path, tokenizer: Any, kind: str, prefix: str = "") -> Iterator[Question]:
    """The verdicts on the rows of lm-eval's samples file, in the order of the questions.

    Raises `ThinkSwitchError` if a row is of another shape.
    """
    for row in sorted(read_rows(samples), key=lambda row: row.doc_id):
        text = row.texts[0]
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        cut = is_cut(tokens, row.budget)
        done = parse(prefix + text, cut=cut)
        found = answers.extract(kind, done.answer)
        yield Question(
            stratum=str(row.doc.get("stratum", "all")),
            correct=found is not None and found == answers.gold(kind, row.gold),
            tokens=tokens + (not cut) + (1 if prefix else 0),
            think=done.form == PRE,
            answer=found,
        )
