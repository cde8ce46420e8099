"""The files of a finished run with random answers, for the tests of the report and `make bench-report`.

The questions are chains of digits and the tokenizers those of the demo domain; which answers are
right is drawn, and a few texts are hostile on purpose.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from thinkswitch_plugin import files, run
from thinkswitch_plugin.data import batch
from thinkswitch_plugin.demo import task
from thinkswitch_plugin.demo.tokenizer import build_tokenizer
from thinkswitch_plugin.judging import samples as stored
from thinkswitch_plugin.judging.verdict import is_cut

TASK = "thinkswitch_arithmetic"
GUARD = "thinkswitch_arithmetic_two"
RIGHT = {"instruct": (0.50, 0.86, 0.88), "thinking": (0.97, 0.975, 0.97)}
BUDGET = 64
HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    '<img src="https://example.org/x.png" onerror="window.hacked = 1">',
    "<!-- </pre> \u2028 {{ 7 * 7 }} ${window.hacked = 1} &lt;b&gt;",
    "\u202eright to left\u202c \x07 é 中文 🙂 \ufeff",
)


def make_run(
    folder: Path,
    *,
    questions: int,
    samples: int = 1,
    iterations: int = 2,
    characters: int = 0,
    answers: bool = True,
    domain: str = "arithmetic",
) -> Path:
    """Write a run under `folder`, without a report; return its folder.

    Args:
        characters: of a thinking completion; 0 leaves it as short as the demo domain's.
        answers: with the stored answers, as the evaluation stage leaves them.
    """
    here = folder / domain
    pair = {mode: {"name": mode, "path": str(here / "pair" / mode), "revision": None} for mode in run.MODES}
    for mode in run.MODES:
        for place in (here / "pair", *(here / f"iter-{k}" for k in range(1, iterations + 1))):
            build_tokenizer(mode).save_pretrained(place / mode)
    files.write_json(here / "iter-0" / "pair.json", pair)
    settings = {"domain": domain, "recipe": f"recipes/{domain}.yaml", "overlays": [], "seed": 0}
    files.write_json(here / "run.json", {**settings, "engine": "embedded", "iterations": iterations})
    chains = task.distinct(random.Random(0), questions)
    for k in range(iterations + 1):
        if k:
            write_counts(here / f"iter-{k}")
        for name, (_, mode) in run.open_run(here).evaluated(k).items():
            out = here / f"iter-{k}" / "eval" / name / f"runs__arithmetic__iter-{k}__{name}"
            write_samples(out, chains, samples, k, mode, characters)
            if answers:
                store_answers(out.parent, mode)
    opened = run.open_run(here)
    for number, stage in enumerate(run.stages(opened)):
        if stage.name != "report":
            stamp = {"stage": stage.name, "iteration": stage.iteration, "seconds": 2.5 * (number % 7 + 1)}
            stamp |= {"command": f"thinkswitch {stage.name} {here} {stage.iteration}", "inputs": {}, "outputs": {}}
            if stage.name == "train":
                stamp["notes"] = {"losses": [[step, 2 / step] for step in range(1, 9)]}
            files.write_json(run.stamp_path(opened, stage), stamp)
    return here


def write_samples(
    out: Path, chains: list[str], samples: int, k: int, mode: str, characters: int, task_name: str = TASK
) -> None:
    """lm-eval's two files of one evaluation."""
    draw = random.Random(f"{k} {mode} {samples}")
    padding = [" ".join(draw.choices(("3+4=7", "so", "x < 7", "again", "[1]", "**no**"), k=characters // 4 + 1))
               for _ in range(64)] if characters else [""]  # fmt: skip
    stamp = "2026-01-01T00-00-00.000000"
    with files.atomic_file(out / f"samples_{task_name}_{stamp}.jsonl") as handle:
        for doc_id, chain in enumerate(chains):
            gold = task.answer(chain)
            texts = [complete(draw, chain, gold, k, mode, padding[(doc_id + j) % len(padding)], characters)
                     for j in range(samples)]  # fmt: skip
            arguments = {"until": ["<|im_end|>"], "do_sample": samples > 1, "max_gen_toks": max(BUDGET, characters)}
            sent = f"<|im_start|>user\n{chain}<|im_end|>\n<|im_start|>assistant\n"
            row = {
                "doc_id": doc_id,
                "doc": {"question": chain, "answer": gold},
                "target": gold,
                "arguments": {"gen_args_0": {"arg_0": sent, "arg_1": arguments}},
                "resps": [texts],
                "filtered_resps": texts,
            }
            handle.write(files.dumps_line(row))
    config = {"task": task_name, "doc_to_text": "{{question}}"}
    files.write_json(out / f"results_{stamp}.json", {"configs": {task_name: config}})


def store_answers(folder: Path, mode: str, guard: str = "") -> None:
    """What was asked for one evaluation, and the answers as an engine ended them; of a guard task behind the others."""
    tokenizer = build_tokenizer(mode)
    metadata = batch.asked_of(tokenizer).metadata()
    with (
        (folder / stored.REQUESTS).open("ab") as requests,
        (folder / stored.GENERATIONS).open("ab") as generations,
    ):
        for row in stored.read_rows(stored.samples_file(folder, guard or TASK)):
            for j, text in enumerate(row.texts):
                name = {"custom_id": stored.question_id(row.doc_id, j, guard)}
                turn = {"role": "user", "content": row.doc["question"]}
                requests.write(files.dumps_line({**name, "body": {"messages": [turn], "metadata": metadata}}))
                tokens = len(tokenizer.encode(text, add_special_tokens=False))
                cut = is_cut(tokens, row.budget)
                choice = {"message": {"content": text}, "finish_reason": "length" if cut else "stop"}
                body = {"choices": [choice], "usage": {"completion_tokens": tokens if cut else tokens + 1}}
                generations.write(files.dumps_line({**name, "response": {"body": body}, "error": None}))


def complete(
    draw: random.Random, chain: str, gold: str, k: int, mode: str, padding: str, characters: int
) -> str:  # fmt: skip
    """One completion, right with probability `RIGHT`; one thinking trace in forty is cut, and a few texts are hostile."""
    right = draw.random() < RIGHT[mode][min(k, 2)]
    answer = gold if right else str((int(gold) + draw.randrange(1, 10)) % 10)
    hostile = HOSTILE[draw.randrange(len(HOSTILE))] if draw.random() < 0.02 else ""
    if mode == "instruct":
        return hostile or answer
    trace = "\n".join(task.steps(chain)) + (f"\n{padding}"[: max(0, characters - 40)]) + hostile
    if draw.random() < 0.025:
        return (trace + " 1" * max(BUDGET, characters))[: max(BUDGET, characters) + 8]
    return f"{trace}\n</think>\n\n{answer}"


def write_guard(here: Path, iterations: int = 2, **keys: Any) -> None:
    """A guard task in a run of `make_run`, on which instruct falls in the last iteration."""
    set_guard(here, **keys)
    chains = task.two_operands()[:200]
    for k in range(iterations + 1):
        for mode in run.MODES:
            drawn_as = 0 if (k, mode) == (iterations, "instruct") else 2  # an iteration of RIGHT
            out = here / f"iter-{k}" / "eval" / mode
            write_samples(out / "guard", chains, 1, drawn_as, mode, 0, GUARD)
            store_answers(out, mode, GUARD)


def set_guard(here: Path, **keys: Any) -> run.Run:
    """Name the guard task in an overlay of a run, and open the run."""
    overlay = here / "guard.yaml"
    files.write_yaml(overlay, {"thinkswitch": {"evaluation": {"guard": [GUARD], **keys}}})
    begun = files.read_json(here / "run.json")
    files.write_json(here / "run.json", begun | {"overlays": [str(overlay)]})
    return run.open_run(here)


def write_counts(here: Path) -> None:
    """What the stages `pairs` and `rebuild` leave for the report."""
    dropped = {"answer_cut": 1, "unclosed_trace": 4}
    counts = {"prompts": 512, "samples": 512, "kept": 507, "dropped": dropped, "selection": "first"}
    files.write_json(here / "pairs.json", counts)
    tried = [{"lambda": 0.9, "think_ratio": 0.953, "prompts": 64, "cut": 0},
             {"lambda": 0.95, "think_ratio": 1.0, "prompts": 64, "cut": 0}]  # fmt: skip
    files.write_json(
        here / "rebuild.json",
        {
            "method": "slerp",
            "lambda": 0.95,
            "anchor": "pair/thinking",
            "think_ratio": 1.0,
            "think_ratio_original": 1.0,
            "tried": tried,
            "sigma": 0.086,
            "angle": {"min": 0.0076, "median": 0.1628, "max": 0.2634},
        },
    )


def write_sweep(here: Path, questions: int = 60) -> Path:
    """A drawn sweep of iteration 1, its stages and λ* found by the real rules."""
    from thinkswitch_plugin.search import stages

    draw = random.Random(1)
    stored: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for step in range(6):
        weight = step / 5
        score = [float(draw.random() < 0.5 + 0.49 * weight) for _ in range(questions)]
        closed = [int(draw.random() < 2.5 * weight - 0.6) for _ in range(questions)]
        tokens = [2.0 + 17.0 * c + 2.0 * weight for c in closed]
        known = {"score": score, "tokens": tokens, "closed": closed, "whole": [1] * questions}
        stored.append({"lambda": weight, "questions": {"doc_id": list(range(questions)), **known}})
        mean, ratio = sum(score) / questions, sum(closed) / questions
        row = {"lambda": weight, "temperature": None, "top_p": None, "n": questions, "k": 1, "think_ratio": ratio}
        row |= dict.fromkeys(("mean@k", "pass@k", "vote@k"), mean)
        row |= {"ci95": [max(0.0, mean - 0.1), min(1.0, mean + 0.1)], "tokens": sum(tokens) / questions}
        rows.append({**row, "truncated": 0.0})
    curve = stages.Curve.of(stored)
    found = stages.stages(curve)
    words = {"sampling": "the task's own", "temperature": None, "top_p": None, "stages": found}
    words |= {"stages_in_words": stages.describe(found, curve), "sweet_spot": stages.sweet_spot(curve)}
    result = {"domain": "arithmetic", "iteration": 1, "seed": 0, "method": "slerp", "template": "instruct"}
    path = here / "iter-1" / "sweep" / "sweep.json"
    files.write_json(path, {**result, "points": rows, "curves": [words]})
    return path
