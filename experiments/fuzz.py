"""`make fuzz INPUTS=1000000`: random inputs through trace splitting, answers, pairs, recipes and prompts.

The invariants are those of the hypothesis tests (invariants.py); this draws faster and without
shrinking. An input that breaks one is printed, and the command fails.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests import invariants
from tests.invariants import CLOSINGS, CONTROL, FILLERS, OPENINGS, SECRET
from thinkswitch_plugin import answer_kinds
from thinkswitch_plugin.errors import ThinkSwitchError

TEMPLATE = Path(__file__).parent.parent / "recipes" / "template.yaml"
SHOWN = 10
ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    3,
    1e400,
    float("nan"),
    2**70,
    "",
    "text",
    "{seed}",
    "a\u2028b",
    "\x00",
    "!!python/object:os.system",
    [],
    [[]],
    {},
    {"a": {"b": 1}},
    "2024-13-45",
)
MATHS = (
    r"\boxed{", "}", "{", r"\frac{1}{2}", r"\sqrt", "^", "2", "055", "45.0", "1,000", "=", "**", "Answer:", "the answer is",
    "yes", "no", "maybe", "(A)", "B.", '{"answer": "no"}', "$", "\n", " ", ".", "-", "- ", "٣", "½", "x", "!", "if", r"\text{ cm}",
    "e999", "0x10", "1e5", "_", r"\pi", "°",
)  # fmt: skip


def completion_text(draw: random.Random) -> str:
    """A trace with SECRETs, mostly closed, and an answer without."""
    trace = "".join(whole([draw.choice((SECRET, *FILLERS, *OPENINGS[:1])) for _ in range(draw.randrange(5))]))
    answer = "".join(whole([draw.choice((*FILLERS, "5", "7", *CONTROL[:2])) for _ in range(draw.randrange(4))]))
    return draw.choice(
        (trace, trace + draw.choice(CLOSINGS) + answer, trace + CLOSINGS[0] + SECRET + CLOSINGS[1] + answer)
    )


def stored_line(draw: random.Random, ids: list[str]) -> Any:
    """A line of a batch output: mostly a completion of one of the ids, sometimes anything."""
    chance = draw.random()
    if chance < 0.01:
        return draw.choice(
            (b"not json\n", b"[]\n", b'{"custom_id": 7}\n', b"\n", b'{"custom_id": "torn', b"\xff\xfe\n")
        )
    message: dict[str, Any] = {"role": "assistant", "content": completion_text(draw)}
    if chance < 0.15:
        message = {
            "content": draw.choice((None, "5", " 7", "", 3, ["x"])),
            "reasoning": draw.choice((SECRET, "", None, 4)),
        }
        if message["reasoning"] != SECRET and draw.random() < 0.5:
            message["reasoning_content"] = SECRET
    choice: Any = {"message": message, "finish_reason": draw.choice(("stop", "stop", "length", None))}
    if chance > 0.95:
        choice = draw.choice((None, {}, {"message": None}, {"message": message, "finish_reason": 5}, "x"))
    body: Any = {"choices": [choice]}
    if chance > 0.98:
        body = draw.choice((None, {}, {"choices": []}, {"choices": {}}, [], "x", {"choices": [choice], "usage": 3}))
    row = {"custom_id": draw.choice(ids), "response": {"status_code": 200, "body": body}, "error": None}
    if 0.9 < chance < 0.95:
        row |= draw.choice(({"response": None, "error": {"message": "no"}}, {"response": 5}, {"custom_id": "nobody"}))
    return row


def split_input(draw: random.Random, folder: Path) -> None:
    """A completion, split."""
    pool = draw.choice(((*FILLERS, SECRET), (*FILLERS, SECRET, *CLOSINGS, *OPENINGS, *CONTROL)))
    pieces = [draw.choice(pool) for _ in range(draw.randrange(10))]
    if draw.random() < 0.7:
        pieces.insert(draw.randrange(len(pieces) + 1), draw.choice(CLOSINGS))
    invariants.check_split(whole(pieces), draw.random() < 0.5, draw.random() < 0.2)


def whole(pieces: list[str]) -> list[str]:
    """`pieces` with a digit where two fillers would meet and might make up a tag."""
    spaced: list[str] = []
    for piece in pieces:
        if spaced and spaced[-1] in FILLERS and piece in FILLERS:
            spaced.append("5")
        spaced.append(piece)
    return spaced


def answer_input(draw: random.Random, folder: Path) -> None:
    """A final answer, read."""
    text = "".join(draw.choice((*MATHS, *FILLERS[:6])) for _ in range(draw.randrange(12)))
    invariants.check_answer(draw.choice(list(answer_kinds.KINDS)), text)


def pairs_input(draw: random.Random, folder: Path) -> None:
    """Requests and generations, made into pairs."""
    samples = [(f"p{p}", s) for p in range(draw.randrange(1, 4)) for s in range(draw.randrange(1, 4))]
    ids = [f"{prompt}-s{number}" for prompt, number in samples]
    lines = [stored_line(draw, ids) for _ in range(draw.randrange(8))]
    invariants.check_pairs(samples, lines, draw.choice(("first", "all", "vote")), folder)


def recipe_input(draw: random.Random, folder: Path) -> None:
    """A recipe, loaded."""
    text = TEMPLATE.read_text(encoding="utf-8")
    chance = draw.random()
    if chance < 0.6:
        values = yaml.safe_load(text)["thinkswitch"]
        where = values
        while isinstance(where, dict) and where:
            key = draw.choice(list(where))
            if not isinstance(where[key], dict) or draw.random() < 0.3:
                where[draw.choice((key, key, "unknown", 7, None))] = draw.choice(ODD)
                break
            where = where[key]
        data = yaml.safe_dump({"base_model": "x", "thinkswitch": values}).encode("utf-8", "replace")
    else:
        place, length = draw.randrange(len(text)), draw.randrange(20)
        junk = draw.choice(
            ("\t", "{", "[", ":", "- ", "&a ", "*a", "!!python/name:os.system ", "\x00", "\u2028", "? ", "%", "'")
        )
        data = (text[:place] + junk + text[place + length :]).encode()
        if chance > 0.95:
            data = draw.randbytes(draw.randrange(40))
    invariants.check_recipe(data, folder)


def prompts_input(draw: random.Random, folder: Path) -> None:
    """A file of prompts, read."""
    rows = []
    for n in range(draw.randrange(6)):
        row: Any = {"prompt": "".join(draw.choice((*FILLERS, *CLOSINGS)) for _ in range(draw.randrange(1, 4)))}
        if draw.random() < 0.3:
            row["id"] = draw.choice((n, f"q{n}", None, "", [1], 1.5, True, "q0"))
        if draw.random() < 0.1:
            row[draw.choice(("prompt", "question", "extra"))] = draw.choice((None, 5, [], {}, "x", CONTROL[0]))
        line = json.dumps(row, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
        if draw.random() < 0.05:
            line = draw.choice(
                (line[:-3], b"", b"[1]", b"null", b"\xff", b'{"prompt": "\\ud800"}', b'{"prompt": NaN}', b"[" * 3000)
            )
        rows.append(line)
    data = draw.choice((b"", b"\xef\xbb\xbf")) + draw.choice((b"\n", b"\r\n")).join(rows)
    template = draw.choice(
        ("{{prompt}}", "{{prompt}}", "{{missing}}", "{{prompt", "{{1/0}}", "{{prompt.x.y}}", "{{ ''.__class__ }}")
    )
    invariants.check_prompts(data, template, folder)


KINDS: dict[str, tuple[Callable[[random.Random, Path], None], float]] = {
    "trace splitting": (split_input, 0.6),
    "answer extraction": (answer_input, 0.25),
    "pair building": (pairs_input, 0.1),
    "prompt parsing": (prompts_input, 0.04),
    "recipe parsing": (recipe_input, 0.01),
}


def run(kind: str, count: int, seed: int) -> tuple[str, int, float, list[str]]:
    """`count` inputs of a kind: name, count, seconds, and what broke an invariant."""
    function, broken = KINDS[kind][0], []
    started = time.monotonic()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as temporary:
        for n in range(count):
            draw = random.Random(f"{kind}-{seed}-{n}")
            try:
                function(draw, Path(temporary))
            except (Exception, ThinkSwitchError) as error:
                broken.append(f"{kind}, seed {seed}, input {n}: {type(error).__name__}: {str(error)[:400]}")
    return kind, count, time.monotonic() - started, broken


def main() -> None:
    """Print a table, and the same as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    parts = 20  # of each kind, so that the processes end together
    jobs = [
        (kind, round(options.inputs * share / parts), options.seed * parts + part)
        for kind, (_, share) in KINDS.items()
        for part in range(parts)
    ]
    counts, seconds, broken = Counter[str](), Counter[str](), list[str]()
    started = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for kind, count, spent, found in pool.starmap(run, jobs, chunksize=1):
            counts[kind] += count
            seconds[kind] += spent
            broken += found
    took = time.monotonic() - started
    print("| kind | inputs | inputs a second and core |\n|---|---|---|")
    for kind in KINDS:
        print(f"| {kind} | {counts[kind]:,} | {counts[kind] / max(seconds[kind], 1e-9):,.0f} |")
    for line in broken[:SHOWN]:
        print(line)
    result = {
        "inputs": counts.total(),
        "broken": len(broken),
        "seconds": round(took, 1),
        "inputs a second": round(counts.total() / took),
        "by kind": counts,
    }
    print(json.dumps(result))
    if broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
