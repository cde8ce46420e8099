"""lm-eval's samples files: found, read in one way, and graded.

lm-eval writes text only. How each answer ended and its tokens stand in `generations.jsonl` beside the files where our
own model class answered; for files of another lm-eval run they are estimated from the text with the checkpoint's tokenizer.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from thinkswitch_plugin import files
from thinkswitch_plugin.args import ThinkSwitchKeys
from thinkswitch_plugin.conventions import Convention
from thinkswitch_plugin.data import answers, batch
from thinkswitch_plugin.data.task_files import kind_of_task
from thinkswitch_plugin.data.traces import LENGTH
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.figures import Sample
from thinkswitch_plugin.judging.verdict import convention_read, how_read, is_cut, verdict_on

LM_EVAL_BUDGET = 256  # tokens, if a task names none
DATE = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]T*"  # with which lm-eval ends the names of its files
REQUESTS, GENERATIONS = "requests.jsonl", "generations.jsonl"  # what our model class asked, and the stored answers


class Ended(NamedTuple):
    """How a completion ended, and its tokens, that which ended it included."""

    finish_reason: str | None
    tokens: int

    @classmethod
    def estimated(cls, tokens: int, budget: int) -> Ended:
        """From the tokens of a completion's text; one that was not cut has one more, which ended it."""
        return cls(LENGTH, tokens) if is_cut(tokens, budget) else cls(None, tokens + 1)


@dataclass(frozen=True, slots=True)
class Row:
    """One question of a samples file: its document, gold answer and k completions.

    Attributes:
        sent: what lm-eval sent: rendered text, or the messages of a chat as JSON in a list.
        settings: how the completions were generated, lm-eval's `generation_kwargs`.
    """

    doc_id: int
    doc: dict[str, Any]
    gold: str
    texts: list[str]
    sent: Any
    settings: dict[str, Any]

    @property
    def budget(self) -> int:
        """Tokens that each completion could have."""
        return int(self.settings.get("max_gen_toks", LM_EVAL_BUDGET))

    @classmethod
    def of(cls, row: dict[str, Any], where: str) -> Row:
        """A row as lm-eval wrote it. Raises `ThinkSwitchError` naming the question if it is of another shape."""
        try:
            sent, settings = (row["arguments"]["gen_args_0"][name] for name in ("arg_0", "arg_1"))
            texts = completions(row["resps"])
            found = cls(row["doc_id"], dict(row["doc"]), str(row["target"]), texts, sent, dict(settings))
        except (KeyError, TypeError, ValueError):
            found = None
        if found is None or not found.texts:
            raise ThinkSwitchError(
                f"{where}, question {row.get('doc_id')}: not a row of lm-eval's samples; delete the folder and "
                "evaluate again."
            )
        return found


def completions(results: list[Any]) -> list[str]:
    """The k completions of one question in `resps`, or as lm-eval hands them to a task: k texts, or a list of them."""
    return results[0] if results and isinstance(results[0], list) else results


def newest(folder: Path, pattern: str) -> Path:
    """The newest of lm-eval's files that match. Raises `ThinkSwitchError` if there is none."""
    matches = sorted(folder.rglob(pattern), key=lambda p: p.name)
    if not matches:
        raise ThinkSwitchError(
            f"{folder} holds no {pattern}; delete that folder and run `make iterate`, or the evaluation, again."
        )
    return matches[-1]


def samples_file(folder: Path, task: str) -> Path:
    """lm-eval's newest samples file of a task, ignoring tasks whose name only starts the same (`TASK_k8`).

    Raises `ThinkSwitchError` if there is none.
    """
    return newest(folder, f"samples_{glob.escape(task)}_{DATE}.jsonl")


def read_rows(path: Path) -> Iterator[Row]:
    """The questions of a samples file, in the order of its lines. Raises `ThinkSwitchError` for another shape.

    A task with several filters (GSM8K) has each question once for every filter; all hold the same completions.
    """
    chosen: Any = None
    for number, row in files.read_jsonl(path):
        chosen = chosen or row.get("filter")
        if row.get("filter") == chosen:
            yield Row.of(row, f"{path}, line {number}")


def samples_of(folder: Path, keys: ThinkSwitchKeys, checkpoint: str) -> list[Sample]:
    """The graded samples of one evaluation by a domain's task, read as its recipe says; see `graded`."""
    return list(graded(folder, keys.evaluation.task, checkpoint, keys.answers.kind, keys.convention)[1])


def graded(
    folder: Path, task: str, checkpoint: str, kind: str, convention: Convention | None = None, *, guard: bool = False
) -> tuple[batch.Asked, Iterator[Sample]]:
    """How the completions of one evaluation are read, and its graded samples in the order of the file.

    Args:
        folder: what was written for one checkpoint: lm-eval's files, and the stored answers where there are any.
        checkpoint: its folder or hub id; its tokenizer is read if there are no stored answers.
        kind: how the final answer is read, a key of `KINDS`; a task of ours that grades by a kind
            is graded by that.
        convention: how traces are written, as the recipe says; None goes by what was stored, or the chat template.
        guard: it was evaluated as a guard task.

    Raises `ThinkSwitchError` if there is no samples file, or one of another shape.
    """
    path = samples_file(folder, task)
    kind = kind_of_task(task) or kind
    if (folder / REQUESTS).is_file():
        _, request = next(batch.read_requests(folder / REQUESTS, 1))
        how, ends_of = batch.asked(request, convention_read(convention)), as_stored(folder, path, task if guard else "")
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        how, ends_of = how_read(tokenizer, convention), _estimated(tokenizer)
    return how, (grade_question(row, ends_of(row), kind, how) for row in read_rows(path))


def grade_question(row: Row, ended: list[Ended], kind: str, how: batch.Asked) -> Sample:
    """The verdicts on one question's completions. Raises `ThinkSwitchError` if its gold answer cannot be read."""
    if answers.gold(kind, row.gold) is None:
        raise ThinkSwitchError(
            f"Question {row.doc_id} (from 0) cannot be graded: {answers.unread(kind, row.gold)}; correct it in the "
            "task's data."
        )
    sample = Sample(row.doc_id, stratum=row.doc.get("stratum"))
    for text, (finish_reason, tokens) in zip(row.texts, ended, strict=True):
        sample.add(verdict_on(kind, how.split({"content": text}, finish_reason), row.gold), tokens)
    return sample


def question_id(doc_id: int, sample: int, guard: str = "") -> str:
    """The id of the request for one sample of a question; those of a guard task begin with its name."""
    return f"{guard and f'{guard}-'}q{doc_id:05}-s{sample}"


def as_stored(folder: Path, path: Path, guard: str = "") -> Callable[[Row], list[Ended]]:
    """The end of each completion of a question, as reported by the engine.

    Args:
        folder: of the evaluation, with the stored answers.
        path: lm-eval's samples file.
        guard: the task, if it is a guard task.
    """
    generations = folder / GENERATIONS
    ended: dict[str, Ended] = {}
    for name, line in batch.read_stored(generations, torn_end=True):
        if body := batch.completion_body(line):
            finish_reason = body["choices"][0].get("finish_reason")
            ended[name] = Ended(finish_reason, batch.tokens_of(body))

    def ends_of(row: Row) -> list[Ended]:
        ids = [question_id(row.doc_id, j, guard) for j in range(len(row.texts))]
        if missing := next((one for one in ids if one not in ended), None):
            raise ThinkSwitchError(
                f"{generations} has no answer {missing}, which {path} holds; delete {generations.parent} and run "
                "`make iterate`, or the evaluation, again."
            )
        return [ended[one] for one in ids]

    return ends_of


def _estimated(tokenizer: Any) -> Callable[[Row], list[Ended]]:
    """The end of each completion of a question, estimated from its text."""

    def ends_of(row: Row) -> list[Ended]:
        encoded = tokenizer(row.texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [Ended.estimated(len(ids), row.budget) for ids in encoded["input_ids"]]

    return ends_of
