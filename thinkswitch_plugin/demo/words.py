"""English questions with exact answers, for a real pretrained model: two small steps each, in many phrasings.

steps   Tom has 8 apples. Tom buys 5 more. Then he eats 3. How many apples does Tom have now?
        8+5=13. 13-3=10.   ->  10
order   Ann is taller than Ben. Eva is shorter than Ben. Who is the tallest?
        Ann > Ben > Eva.   ->  Ann

Easy questions take one step. `novel` ones use names, objects and phrasings of which no other question has any.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from thinkswitch_plugin import files

HELD_OUT_SIZE = 480
ONE_STEP_SIZE = 120


class Question(NamedTuple):
    """One question with its worked steps and its answer."""

    family: str
    prompt: str
    trace: str
    answer: str
    novel: bool


@dataclass(frozen=True)
class Material:
    """The words that questions are made of; training questions and novel ones share none."""

    names: list[str]
    things: list[str]
    gains: list[str]
    losses: list[str]
    openings: list[str]
    totals: list[str]
    scales: list[list[str]]
    comparisons: list[str]
    extremes: list[str]


def material(name: str) -> Material:
    """The `seen` or the `novel` words of words.yaml."""
    return Material(**files.read_yaml(Path(__file__).with_suffix(".yaml"))[name])


SEEN, NOVEL = material("seen"), material("novel")


def steps(rng: random.Random, words: Material, hard: bool) -> tuple[str, str, str]:
    """A number that goes up or down twice (once if easy), between 1 and 20."""
    name, other = rng.sample(words.names, 2)
    thing, value = rng.choice(words.things), rng.randint(2, 9)
    said, trace = [rng.choice(words.openings).format(n=name, a=value, t=thing)], []
    for _ in range(2 if hard else 1):
        up = value < 3 or (value < 12 and rng.random() < 0.5)
        change = rng.randint(2, 8) if up else rng.randint(2, min(8, value - 1))
        after = value + change if up else value - change
        phrase = rng.choice(words.gains if up else words.losses)
        said.append(phrase.format(n=name, o=other, a=change, t=thing))
        trace.append(f"{value}{'+' if up else '-'}{change}={after}.")
        value = after
    said.append(rng.choice(words.totals).format(n=name, t=thing))
    return " ".join(said), " ".join(trace), str(value)


def order(rng: random.Random, words: Material, hard: bool) -> tuple[str, str, str]:
    """Who is first or last of three (two if easy) people of whom neighbours are compared."""
    people = rng.sample(words.names, 3 if hard else 2)
    more, less, most, least = rng.choice(words.scales)
    facts = []
    for high, low in itertools.pairwise(people):
        x, y, c = (high, low, more) if rng.random() < 0.5 else (low, high, less)
        facts.append(rng.choice(words.comparisons).format(x=x, y=y, c=c))
    rng.shuffle(facts)
    first = rng.random() < 0.5
    question = rng.choice(words.extremes).format(s=most if first else least)
    return " ".join([*facts, question]), f"{' > '.join(people)}.", people[0 if first else -1]


FAMILIES: dict[str, Callable[[random.Random, Material, bool], tuple[str, str, str]]] = {
    "steps": steps,
    "order": order,
}


def questions(
    seed: str,
    count: int,
    *,
    hard: bool = True,
    novel: bool = False,
    exclude: Collection[str] = (),
) -> list[Question]:
    """`count` different questions, the families in turn, shuffled; none whose prompt is in `exclude`."""
    rng, seen = random.Random(seed), set(exclude)
    found: list[Question] = []
    names = list(FAMILIES)
    while len(found) < count:
        family = names[len(found) % len(names)]
        prompt, trace, answer = FAMILIES[family](rng, NOVEL if novel else SEEN, hard)
        if prompt not in seen:
            seen.add(prompt)
            found.append(Question(family, prompt, trace, answer, novel))
    rng.shuffle(found)
    return found


def held_out() -> list[Question]:
    """The evaluation questions: the same for every run; half of them novel."""
    return half_novel("held out", HELD_OUT_SIZE)


def one_step() -> list[Question]:
    """Held-out easy questions, half of them novel: what a guard task asks."""
    return half_novel("one step", ONE_STEP_SIZE, hard=False)


def half_novel(seed: str, count: int, *, hard: bool = True) -> list[Question]:
    """`count` different questions, the second half of them novel."""
    half = count // 2
    return questions(seed, half, hard=hard) + questions(f"{seed}, novel", half, hard=hard, novel=True)


def rows(asked: Iterable[Question]) -> list[dict[str, str]]:
    """Questions as the lm-eval tasks read them; `stratum` is the family, with `_novel` for novel ones."""
    return [{"question": q.prompt, "answer": q.answer, "stratum": f"{q.family}{'_novel' * q.novel}"} for q in asked]
