"""`thinkswitch reference`: what a domain without gold answers is compared with.

The thinking checkpoint answers each question that is held out several times; its majority answer takes the place of a
gold answer, so the score is called `agreement`. Nobody labels anything.

    recipes/mine/reference.jsonl
    {"id": "p00003", "prompt": "What is …?", "answer": "113", "votes": 7, "samples": 8}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import PromptKeys, ThinkSwitchKeys, resolve_seed
from thinkswitch_plugin.data import answers, prompts, task_files
from thinkswitch_plugin.engines import servers
from thinkswitch_plugin.engines.generate import generate
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.verdict import final_answers
from thinkswitch_plugin.recipe import Recipe, recipe_of
from thinkswitch_plugin.run import checkpoint, locked
from thinkswitch_plugin.run.hashes import Hashes, read_stamp
from thinkswitch_plugin.run.stamp import once

STAMP = "reference.json"


def make_reference(domain: str, engine: str, samples: int, overlays: Sequence[str] = (), seed: int = 0) -> None:
    """Write the reference answers of a domain's evaluation task, unless they are there and still true.

    Args:
        samples: answers a question; one if the recipe decodes greedily, as they would all be the same.

    Raises `ThinkSwitchError` if the task has gold answers.
    """
    recipe = recipe_of(domain, overlays)
    keys = recipe.keys
    if not task_files.measures_agreement(keys.evaluation.task):
        raise ThinkSwitchError(
            f"{recipe.path}: the task {keys.evaluation.task} has gold answers and needs no reference."
        )
    questions, out = task_files.reference_files(keys.evaluation.task)
    if keys.pair.demo:
        from thinkswitch_plugin.demo import cache

        cache.ensure(keys, seed)
    name = resolve_seed(keys.pair.thinking, seed)
    teacher, _ = checkpoint.resolve(name, keys.pair.revision_thinking, "thinking")
    work, hashes = folder(out), Hashes(folder(out))
    asked = keys.model_copy(
        update={
            "prompts": asking(keys.prompts, questions),
            "sampling": keys.sampling.model_copy(update={"samples": samples if keys.sampling.temperature > 0 else 1}),
        }
    )
    with locked(work):
        key = {
            "thinking": name,
            "weights": hashes.of(teacher),
            "questions": hashes.of(questions),
            "prompts": asked.prompts.model_dump(),
            "sampling": asked.sampling.model_dump(),
            "answer": task_files.kind_of_task(keys.evaluation.task),
            "trace": keys.trace,
            **keys.pair.asked_with("thinking"),
        }
        hashes.save()
        scratch = (work / "requests.jsonl", work / "generations.jsonl")
        answer = partial(answer_questions, asked, str(teacher), servers.choose(engine), out, seed)
        done = once(work / STAMP, key, (out,), lambda _: answer(), scratch=scratch)
    left_out = done["questions"] - done["answered"]
    dropped = f"; {left_out} left out, as no answer to them can be read" if left_out else ""
    console.say(f"{out}: the majority answers of {name} to {done['answered']} questions{dropped}")


def answer_questions(keys: ThinkSwitchKeys, teacher: str, engine: str, out: Path, seed: int) -> dict[str, int]:
    """Ask a checkpoint the questions that `keys.prompts` names and write its majority answers to `out`; return counts."""
    work, questions = folder(out), Path(str(keys.prompts.path))
    requests, generations = work / "requests.jsonl", work / "generations.jsonl"
    every, _ = prompts.read_prompts(keys.prompts, seed)
    prompts.ask_in_mode(requests, every, teacher, "thinking", keys, seed)
    generate(requests, generations, teacher, engine, keys.engine, log=work / "reference.log")
    rows = {prompts.id_of(keys.prompts, row, n): row for n, (_, row) in enumerate(files.read_jsonl(questions), 1)}
    found = list(majorities(requests, generations, keys))
    answered = (
        {**rows[prompt_id], "answer": winner, "votes": votes, "samples": keys.sampling.samples}
        for prompt_id, winner, votes in found
        if winner is not None
    )
    files.write_jsonl(out, answered)
    return {"questions": len(found), "answered": sum(winner is not None for _, winner, _ in found)}


def majorities(requests: Path, generations: Path, keys: ThinkSwitchKeys) -> Iterator[tuple[str, str | None, int]]:
    """Each question's id, majority answer (None if no answer can be read) and how many samples gave it.

    Free text has no majority; its first answers are the reference, and a message says what that is worth.
    """
    votes, kind = answers.Votes(), task_files.kind_of_task(keys.evaluation.task) or keys.answers.kind
    for prompt_id, answered in final_answers(requests, generations, kind, keys.convention):
        found = [answer for answer, _ in answered]
        votes.count(found)
        winner = answers.majority(found)
        yield prompt_id, winner, found.count(winner) if winner is not None else 0
    if votes.free_text(kind):
        console.say(
            "  no two answers to a question are alike: this is free text, and the agreement with it says nothing; "
            "after the run, compare the answers by `thinkswitch judge`"
        )


def folder(reference: Path) -> Path:
    """Where the requests and answers behind a file of reference answers lie."""
    return reference.with_suffix("")


def asking(keys: PromptKeys, questions: Path) -> PromptKeys:
    """The keys that ask the questions of a file as a recipe asks its prompts."""
    return keys.model_copy(update={"path": str(questions), "hub": None, "outside": None, "shuffle": False})


def unanswered(keys: ThinkSwitchKeys) -> Path | None:
    """The questions that `thinkswitch reference` has yet to answer; None if it has, or if the task has gold answers."""
    if not task_files.measures_agreement(keys.evaluation.task):
        return None
    questions, out = task_files.reference_files(keys.evaluation.task)
    return None if out.is_file() and _made_by(out) else questions


def _made_by(reference: Path) -> str | None:
    return (read_stamp(folder(reference) / STAMP) or {}).get("thinking")


def require_reference(recipe: Recipe, seed: int) -> None:
    """Raise `ThinkSwitchError` unless the reference answers, if the task needs them, are those of the recipe's checkpoint."""
    task = recipe.keys.evaluation.task
    if not task_files.measures_agreement(task):
        return
    out = task_files.reference_files(task)[1]
    command = f"`thinkswitch reference --domain {recipe.keys.domain}`"
    if unanswered(recipe.keys):
        raise ThinkSwitchError(f"{out} is not there yet: {task} has no gold answers; run {command} first.")
    if (made := _made_by(out)) != resolve_seed(recipe.keys.pair.thinking, seed):
        raise ThinkSwitchError(
            f"{out} holds answers of {made}, which is not the recipe's thinking checkpoint; run {command}."
        )
