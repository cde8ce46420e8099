"""Is a training prompt also an evaluation question? Checked before anything is generated.

Two texts overlap if they are equal after normalisation, or if the runs of `n` words they share
make up a stated share of the shorter one. Runs of words alone would not do: abstracts of
one field share stock phrases.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from thinkswitch_plugin.args import EvaluationKeys
from thinkswitch_plugin.data import task_files
from thinkswitch_plugin.data.answers import gold, unread
from thinkswitch_plugin.errors import ThinkSwitchError, reason

SHOWN = 5  # offending pairs in the message
SHORTEST = 6  # words from which on a short question inside a prompt counts


@dataclass(frozen=True)
class Overlap:
    """A training prompt and an evaluation question that are too much alike."""

    prompt_id: str
    question: int
    share: float
    excerpt: str


def words(text: str) -> list[str]:
    """A text as lower-case words and single symbols, without regard to white space or width."""
    return re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFKC", text).lower())


def runs_of(tokens: Sequence[str], n: int) -> set[tuple[str, ...]]:
    """Every run of n words."""
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def overlaps(
    prompts: Iterable[tuple[str, str]], questions: Sequence[str], *, n: int = 13, share: float = 0.2
) -> list[Overlap]:
    """Every (prompt, question) pair that overlaps; memory grows with the evaluation set only.

    Args:
        prompts: (id, text) of the training prompts.
        n: length of a shared run, in words.
        share: shared runs over the runs of the shorter text, from which on it counts.
    """
    exact: dict[tuple[str, ...], int] = {}
    short_questions: dict[int, str] = {}  # those with no run of n words, to be looked for whole
    holders: dict[tuple[str, ...], list[int]] = {}
    for number, question in enumerate(questions):
        tokens = words(question)
        exact.setdefault(tuple(tokens), number)
        if SHORTEST <= len(tokens) < n:
            short_questions[number] = f" {' '.join(tokens)} "
        for run in runs_of(tokens, n):
            holders.setdefault(run, []).append(number)
    # What many questions share is the task's own wording ("Please reason step by step").
    common = max(2, len(questions) // 50)
    wording = {run for run, numbers in holders.items() if len(numbers) > common}
    lengths: Counter[int] = Counter()
    for run, numbers in holders.items():
        if run not in wording:
            lengths.update(numbers)
    found = []
    for prompt_id, text in prompts:
        tokens = words(text)
        if tuple(tokens) in exact:
            found.append(Overlap(prompt_id, exact[tuple(tokens)], 1.0, text.strip()[:80]))
            continue
        runs = runs_of(tokens, n) - wording
        hits: Counter[int] = Counter()
        for run in runs:
            hits.update(holders.get(run, ()))
        shares = {number: count / min(len(runs), lengths[number]) for number, count in hits.items()}
        flat = f" {' '.join(tokens)} "
        shares |= {number: 1.0 for number, short in short_questions.items() if short in flat}
        worst = max(shares, key=shares.__getitem__, default=None)
        if worst is not None and shares[worst] >= share:
            found.append(Overlap(prompt_id, worst, shares[worst], text.strip()[:80]))
    return found


def evaluation_questions(task: str, *, asked: bool = False) -> list[str]:
    """The text of every question of an lm-eval task, as the task itself renders it.

    Args:
        asked: checkpoints are asked these questions, so the task must generate text.

    Raises `ThinkSwitchError` if lm-eval knows no such task or its data cannot be loaded.
    """
    import logging

    from datasets.utils.logging import disable_progress_bar

    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # its errors are reported by us
    disable_progress_bar()
    try:
        loaded = task_files.load(task).get(task)
        if loaded is None:
            raise ThinkSwitchError(f"{task} is a group of lm-eval tasks; name one task of it.")
        if asked and loaded.OUTPUT_TYPE != "generate_until":
            raise ThinkSwitchError(
                f"lm-eval's task {task} compares likelihoods (`output_type: {loaded.OUTPUT_TYPE}`), which a chat does not "
                "give; name a task with `output_type: generate_until`."
            )
        questions = [(str(loaded.doc_to_text(doc)), loaded.doc_to_target(doc)) for doc in loaded.eval_docs]
    except ThinkSwitchError:
        raise
    except Exception as error:  # whatever a task file and the libraries that load its data raise
        raise ThinkSwitchError(f"The questions of lm-eval's task {task} cannot be loaded: {reason(error)}.") from None
    kind = task_files.kind_of_task(task)
    for number, (question, target) in enumerate(questions):
        if not question.strip() or target is None or not str(target).strip():
            raise ThinkSwitchError(f"Question {number} of lm-eval's task {task} (from 0) is empty, or its answer is.")
        if kind and gold(kind, str(target)) is None:
            raise ThinkSwitchError(
                f"Question {number} of lm-eval's task {task} (from 0) cannot be graded: {unread(kind, str(target))}; "
                "correct it in the task's data."
            )
    if not questions:
        raise ThinkSwitchError(f"lm-eval's task {task} has no questions.")
    return [question for question, _ in questions]


def require_uncontaminated(
    prompts: Sequence[tuple[str, str]], keys: EvaluationKeys, known: Mapping[str, Sequence[str]] | None = None
) -> dict[str, int]:
    """How many questions the evaluation set has, and those of the guard tasks, by task.

    Args:
        known: the questions of tasks that lm-eval cannot load yet.

    Raises `ThinkSwitchError`, showing the pairs, if a training prompt is in one of them.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    known = known or {}
    every = ((task, known[task] if task in known else evaluation_questions(task, asked=True)) for task in keys.tasks)
    return {task: _require_apart(prompts, task, questions, keys) for task, questions in every}


def _require_apart(
    prompts: Sequence[tuple[str, str]], task: str, questions: Sequence[str], keys: EvaluationKeys
) -> int:
    found = overlaps(prompts, questions, n=keys.contamination_ngram, share=keys.contamination_share)
    if found:
        shown = "\n".join(
            f"    prompt {o.prompt_id} and question {o.question} ({100 * o.share:.0f} % shared): {o.excerpt!r}"
            for o in found[:SHOWN]
        )
        raise ThinkSwitchError(
            f"{len(found)} training prompt(s) overlap with the evaluation set of {task}; remove them, or, if they "
            f"only share the sentences of a template, raise `thinkswitch.evaluation.contamination_share`:\n{shown}"
        )
    return len(questions)
