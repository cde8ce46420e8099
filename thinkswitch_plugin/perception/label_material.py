"""What `make labels` reads from the generations: questions with a reference answer, and rationales to learn from.

The reference is the right answer, if the recipe names the field that holds it, else the majority of the thinking
checkpoint's own answers. The latter needs no labels, and assumes that the majority is right often enough: a
question it gets wrong is labelled by agreement with a wrong answer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from thinkswitch_plugin.args import AnswerKeys, resolve_seed
from thinkswitch_plugin.data import answers, batch, pairs
from thinkswitch_plugin.data.prompts import read_field
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.perception.label_job import LabelJob

RATIONALES = "rationales.jsonl"
Source = Literal["gold", "majority"]
ASSUMES: dict[Source, str] = {
    "gold": "The field of the prompts that the recipe names holds the right answer.",
    "majority": "The majority of the thinking checkpoint's answers to a question counts as right; where it is "
    "wrong, the label says whether the baseline agrees with a wrong answer.",
}


@dataclass(frozen=True)
class Question:
    """One question and what counts as its right answer, in the normal form of the domain's answers."""

    prompt_id: str
    turns: list[dict[str, Any]]
    reference: str

    @property
    def prompt(self) -> str:
        """The text of the last user turn."""
        return next((str(turn["content"]) for turn in reversed(self.turns) if turn["role"] == "user"), "")


@dataclass(frozen=True)
class Material:
    """Everything read from the generations: questions that can be labelled, and the rationales to learn from."""

    questions: list[Question]
    rationales: Path  # of every question, in a file, since traces are long
    report: pairs.PairReport
    without_reference: int
    repeated: int  # questions whose text also occurs under another id


def read_material(job: LabelJob) -> Material:
    """Read the generations: what each question's reference is, and which rationales to train on.

    Raises:
        ThinkSwitchError: a file is broken, or there is no complete answer, no rationale, no reference, or
            fewer questions than folds.
    """
    keys = job.recipe.keys
    turns: dict[str, list[dict[str, Any]]] = {}
    for _, request in batch.read_requests(job.requests):
        turns.setdefault(batch.prompt_id(request), request["body"]["messages"])
    rationales = job.work / "labels" / RATIONALES
    report = pairs.write_pairs(
        job.requests,
        job.generations,
        rationales,
        keys=keys.answers,
        keep_trace=True,
        convention=keys.convention,
    )
    references = gold_references(job, turns) if keys.adaptive.gold else majority_references(job)
    questions = [Question(name, asked, references[name]) for name, asked in turns.items() if name in references]
    texts = Counter(question.prompt for question in questions)
    if len(texts) < job.folds:
        raise ThinkSwitchError(
            f"FOLDS={job.folds}, but {job.generations} has only {len(texts)} questions with a reference answer; "
            "lower FOLDS=, or generate more answers."
        )
    return Material(
        questions,
        rationales,
        report,
        without_reference=len(turns) - len(questions),
        repeated=sum(n for n in texts.values() if n > 1),
    )


def majority_references(job: LabelJob) -> dict[str, str]:
    """The majority of all complete answers to each question (the earliest of equals); none if none can be read."""
    kind, convention = job.recipe.keys.answers.kind, job.recipe.keys.convention
    read: dict[str, list[str | None]] = {}
    report = pairs.PairReport()
    every = AnswerKeys.model_validate({"selection": "all"})
    for row in pairs.build_pairs(job.requests, job.generations, keys=every, convention=convention, report=report):
        read.setdefault(row["prompt_id"], []).append(answers.extract(kind, row["messages"][-1]["content"]))
    majorities = ((prompt_id, answers.majority(found)) for prompt_id, found in read.items())
    return {prompt_id: winner for prompt_id, winner in majorities if winner is not None}


def gold_references(job: LabelJob, prompts: Mapping[str, Any]) -> dict[str, str]:
    """The right answer of each question, from the field of the prompts that the recipe names.

    Raises `ThinkSwitchError` where a prompt has no row, the row no such field, or the field no answer.
    """
    keys = job.recipe.keys
    field = str(keys.adaptive.gold)
    rows = read_field(keys.prompts, job.seed, field)
    where = keys.prompts.hub or resolve_seed(str(keys.prompts.path), job.seed)
    found = {}
    for prompt_id in prompts:
        if prompt_id not in rows:
            raise ThinkSwitchError(
                f"{where} has no row for the prompt {prompt_id!r} of {job.requests}, so its right answer is not known; "
                "use the prompts these generations were made of, or leave `thinkswitch.adaptive.gold` out."
            )
        read = answers.gold(keys.answers.kind, rows[prompt_id])
        if read is None:
            raise ThinkSwitchError(
                f"{where}: `{field}` of the prompt {prompt_id!r} is {rows[prompt_id][:80]!r}, in which "
                f"`thinkswitch.answers.kind: {keys.answers.kind}` reads no answer; correct one of the two."
            )
        found[prompt_id] = read
    return found


def assign_folds(questions: Sequence[Question], folds: int, seed: int) -> dict[str, int]:
    """The fold of each question, 1 to K, by prompt id; sizes differ by one text at most.

    One text lies in one fold, under however many ids it is asked. The same questions, folds and seed give the same
    result, in whatever order the questions come.
    """
    ids: dict[str, list[str]] = {}
    for question in questions:
        ids.setdefault(question.prompt, []).append(question.prompt_id)
    shuffled = sorted(map(min, ids.values()))
    random.Random(f"folds-{seed}").shuffle(shuffled)
    fold = {prompt_id: place % folds + 1 for place, prompt_id in enumerate(shuffled)}
    return {prompt_id: fold[min(alike)] for alike in ids.values() for prompt_id in alike}
