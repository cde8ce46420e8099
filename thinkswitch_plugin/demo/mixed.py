"""The demo domain `arithmetic-mixed`: chains of 2 to 6 operands that differ in what they need, not in length only.

question  7*3+4*2-5      four operands and more: *easy* where one of the last two steps is `*0`, else *hard*;
          7*3+4*0-5      half of each length are easy. Two and three operands: *short*.

The student of this domain is the common base of the pair of `arithmetic`, which that pair's making trained on
clean traces and answers of random chains of two to four operands. Held-out questions of this domain with two
to four operands may have been among them; chains of five and six operands never were. Held out means here:
not among the training questions of this domain.

The synthetic teacher slips: each step of a training rationale comes out wrong with probability `NOISE`, drawn
once a question, and the next step continues from there; the final answer is still right.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from thinkswitch_plugin import files
from thinkswitch_plugin.data import batch, formats
from thinkswitch_plugin.demo import task

STRATA = ("short", "easy", "hard")
OPERANDS = (2, 3, 3, 3, 4, 4, 5, 5, 6, 6)  # few of two operands: there are only 300
HELD_OUT_SEED = 20_240_409
HELD_OUT_SIZE = 660
TRAINING_SIZE = 2000
NOISE = 1 / 3
TEACHER = "synthetic-teacher"


def stratum(question: str) -> str:
    """`short`, `easy` or `hard`."""
    if operands(question) < 4:
        return "short"
    return "easy" if "*0" in (question[-4:-2], question[-2:]) else "hard"


def operands(question: str) -> int:
    """How many digits a chain has."""
    return len(question) // 2 + 1


def draw(rng: random.Random, count: int, *, easy: bool) -> str:
    """One random chain with `count` operands; from four operands on, easy or hard as asked."""
    while True:
        question = task.draw(rng, count)
        if easy:
            place = len(question) - rng.choice((2, 4))
            question = question[:place] + "*0" + question[place + 2 :]
        if count < 4 or stratum(question) == ("easy" if easy else "hard"):
            return question


def distinct(rng: random.Random, count: int, exclude: Collection[str] = ()) -> list[str]:
    """`count` different chains, lengths as in `OPERANDS`, half of the long ones easy; shuffled.

    None of them is in `exclude`, or holds one of it that is four operands long or longer.
    """
    excluded = set(exclude)
    kinds = [(length, easy and length >= 4) for easy in (False, True) for length in OPERANDS]
    draws = [partial(draw, count=length, easy=easy) for length, easy in kinds]
    return task.distinct(rng, count, exclude, draws, lambda question: _parts(question).isdisjoint(excluded))


def _parts(question: str) -> set[str]:
    """Every chain of four operands or more inside a chain."""
    ends = range(7, len(question) + 1)
    return {question[start:end] for end in ends for start in range(0, end - 6, 2) if (end - start) % 2}


def held_out() -> list[str]:
    """The evaluation questions: the same for every run and seed."""
    return distinct(random.Random(HELD_OUT_SEED), HELD_OUT_SIZE)


def training_questions(seed: int, count: int = TRAINING_SIZE) -> list[str]:
    """The training questions of a seed, without held-out ones."""
    return distinct(random.Random(f"mixed-{seed}"), count, exclude=held_out())


def noisy_trace(rng: random.Random, question: str) -> str:
    """The worked steps of a chain, each one's result wrong with probability `NOISE` and carried on."""

    def slip(result: int) -> int:
        return rng.choice([other for other in range(10) if other != result]) if rng.random() < NOISE else result

    return "\n".join(task.steps(question, slip))


def rows() -> list[dict[str, Any]]:
    """The held-out questions as the lm-eval task reads them: question, answer, stratum, operands."""
    return [
        {"question": q, "answer": task.answer(q), "stratum": stratum(q), "operands": operands(q)} for q in held_out()
    ]


def settings() -> dict[str, Any]:
    """Every number that shapes the training files; a change of one makes new ones."""
    return {"held_out": HELD_OUT_SIZE, "questions": TRAINING_SIZE, "operands": list(OPERANDS), "noise": NOISE}


def write_training_files(folder: Path, seed: int, *, count: int = TRAINING_SIZE) -> None:
    """Write `prompts.jsonl`, `requests.jsonl` and the synthetic teacher's `generations.jsonl`."""
    rng = random.Random(f"teacher-{seed}")
    with (
        files.atomic_file(folder / "prompts.jsonl") as prompts,
        files.atomic_file(folder / "requests.jsonl") as requests,
        files.atomic_file(folder / "generations.jsonl") as generations,
    ):
        for number, question in enumerate(training_questions(seed, count)):
            prompt_id = f"p{number:05d}"
            text = formats.render(formats.PRE, noisy_trace(rng, question), task.answer(question))
            turns, metadata = [{"role": "user", "content": question}], {"prompt_id": prompt_id, "trace": "inline"}
            asked = {"model": TEACHER, "messages": turns, "max_tokens": 64, "metadata": metadata}
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            body = {"object": "chat.completion", "model": TEACHER, "choices": [choice]}
            response = {"status_code": 200, "body": body}
            prompts.write(files.dumps_line({"id": prompt_id, "prompt": question}))
            requests.write(files.dumps_line(batch.request(f"{prompt_id}-s0", asked)))
            generations.write(files.dumps_line({"custom_id": f"{prompt_id}-s0", "response": response, "error": None}))
