"""Chain arithmetic over the digits 0-9, strictly left to right, modulo 10.

question  7*3+4*2                    three or four operands, `+ - *`
direct    0                          what the instruct checkpoint answers
thinking  <think>                    what the thinking checkpoint writes
          7*3=1
          1+4=5
          5*2=0
          </think>

          0
"""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

Draw = Callable[[random.Random], str]
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
SIGNS = tuple(OPERATORS)
HELD_OUT_SEED = 20_260_600  # one fixed evaluation set for every run, whatever its SEED
HELD_OUT_SIZE = 400


def steps(question: str, slip: Callable[[int], int] = int) -> list[str]:
    """The worked steps of `7*3+4*2`: ``["7*3=1", "1+4=5", "5*2=0"]``; `slip` may change each result."""
    value, lines = int(question[0]), []
    for sign, digit in zip(question[1::2], question[2::2], strict=True):
        result = slip(OPERATORS[sign](value, int(digit)) % 10)
        lines.append(f"{value}{sign}{digit}={result}")
        value = result
    return lines


def answer(question: str) -> str:
    """The final digit of a chain, as text."""
    return steps(question)[-1][-1]


def trace(question: str) -> str:
    """The completion of the thinking checkpoint, opening tag included."""
    return "<think>\n" + "\n".join(steps(question)) + "\n</think>\n\n" + answer(question)


def draw(rng: random.Random, operands: int) -> str:
    """One random chain with that many operands."""
    parts = [str(rng.randrange(10))]
    for _ in range(operands - 1):
        parts += [rng.choice(SIGNS), str(rng.randrange(10))]
    return "".join(parts)


def distinct(
    rng: random.Random,
    count: int,
    exclude: Collection[str] = (),
    draws: Sequence[Draw] = (partial(draw, operands=3), partial(draw, operands=4)),
    allowed: Callable[[str], bool] = bool,
) -> list[str]:
    """`count` different chains, none of them in `exclude`, by each of `draws` in turn; shuffled."""
    seen, found = set(exclude), []
    for draw_one in itertools.islice(itertools.cycle(draws), count):
        question = draw_one(rng)
        while question in seen or not allowed(question):
            question = draw_one(rng)
        seen.add(question)
        found.append(question)
    rng.shuffle(found)
    return found


def held_out(count: int = HELD_OUT_SIZE) -> list[str]:
    """The evaluation questions: the same for every run, never trained on."""
    return distinct(random.Random(HELD_OUT_SEED), HELD_OUT_SIZE)[:count]


def two_operands() -> list[str]:
    """All chains of two operands, in one fixed order; the domain's own have three or four."""
    digits = range(10)
    chains = [f"{one}{sign}{other}" for one in digits for sign in SIGNS for other in digits]
    random.Random(HELD_OUT_SEED).shuffle(chains)
    return chains


def training_prompts(seed: int, count: int) -> list[str]:
    """Questions for distillation: never held out, never in the pair's own training data."""
    return distinct(random.Random(f"prompts-{seed}"), count, exclude=held_out())


def stream(rng: random.Random, operand_choices: tuple[int, ...], exclude: Collection[str]) -> Iterator[str]:
    """Endless random chains outside `exclude`, with operand counts drawn from the choices."""
    while True:
        question = draw(rng, rng.choice(operand_choices))
        if question not in exclude:
            yield question
