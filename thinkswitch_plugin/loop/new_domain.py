"""`thinkswitch init`: a recipe, its prompts and an lm-eval task for a domain of the user's own.

recipes/mine.yaml                      the recipe: that of `aime`, with the user's prompts in it
recipes/mine/prompts.jsonl, test.jsonl the rows to train on, and those held out for the evaluation
lm_eval_tasks/mine.yaml                the task that evaluates
"""

from __future__ import annotations

import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, files, places
from thinkswitch_plugin.args import PromptKeys
from thinkswitch_plugin.data import answers, contamination, prompts, sources, task_files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.recipe import load_recipe, overlay, overlay_path, require_domain_name

GPU_RECIPE, GPU_TASK, TASK = "aime", "thinkswitch_aime", "thinkswitch_template"
OVERLAYS: dict[str, list[str]] = {"8gb": [], "24gb": ["24gb"], "several": ["24gb", "several"]}  # by `--gpu`
OPTIONS = {*"abcdefghij", "options", "choices"}  # columns that hold the options of a multiple-choice question
GUESSED_KINDS = ("choice", "decision", "integer")  # in this order; what none of them reads is compared as it stands
ENDINGS = {
    "decision": "Please reason step by step, and put your final answer (yes, no or maybe) within \\boxed{}.",
    "choice": "Please reason step by step, and put the letter of your final answer within \\boxed{}.",
    "integer": "Please reason step by step, and put your final answer within \\boxed{}.",
}
FEWEST, FEWEST_HELD_OUT, MOST_HELD_OUT = 10, 4, 200  # rows
MANY = 60  # training prompts from which on three epochs do what eight do for the fifteen of `aime`
TASK_FUNCTIONS = '''"""The functions that the tasks in this folder name; ThinkSwitch's own tasks have them too."""

from lm_eval.tasks.thinkswitch.thinkswitch_tasks import __getattr__, think_ratio  # noqa: F401
'''


@dataclass(frozen=True)
class Data:
    """Where the rows of a domain come from, as the user named it.

    Attributes:
        prompts: a JSONL, CSV or Parquet file, or a dataset on the hub.
        column: holds the prompt; empty if its name says so.
        gold: the column with the right answers; empty if there are none.
        kind: how a final answer is read, a key of `KINDS`; empty if the right answers show it.
        config, split: of a dataset on the hub.
        held_out: rows for the evaluation; None for a fifth of them, at most 200.
        held_out_file: the rows for the evaluation, in a file of their own with the same columns; empty for a part of `prompts`.
    """

    prompts: str
    column: str = ""
    gold: str = ""
    kind: str = ""
    config: str | None = None
    split: str = "train"
    held_out: int | None = None
    held_out_file: str = ""

    @property
    def source(self) -> dict[str, Any]:
        """The keys under `thinkswitch.prompts` that name the rows."""
        path = Path(self.prompts)
        if path.exists() or path.suffix in sources.SUFFIXES or self.prompts.startswith((".", "/", "~")):
            return {"path": self.prompts}
        return {"hub": self.prompts, "config": self.config, "split": self.split}


def write_domain(name: str, gpu: str, data: Data) -> None:
    """Write the files of a new domain into the current folder and print what to do next.

    Args:
        gpu: `8gb`, `24gb` or `several`.

    Raises `ThinkSwitchError`: a bad name, a file that exists, or rows that cannot be used.
    """
    require_domain_name(name)
    if data.held_out and data.held_out_file:
        raise ThinkSwitchError("Give --held-out or --held-out-file, not both.")
    recipe, rows = Path(places.RECIPES, f"{name}.yaml"), Path(places.RECIPES, name)
    task = Path(places.TASKS, f"{name}.yaml")
    for path in (recipe, rows, task):
        if path.exists():
            raise ThinkSwitchError(f"{path} exists already; give another name, or delete it first.")
    train, test, kind, dropped = split(data)
    ending = f"\n\n{ENDINGS[kind]}" if kind in ENDINGS else ""
    for file, part in (("prompts.jsonl", train), ("test.jsonl", test)):
        files.write_jsonl(rows / file, part)
    text = recipe_text(name, kind, ending, len(train), overlays=OVERLAYS[gpu])
    files.write_text(recipe, text)
    budget = load_recipe(recipe).keys.evaluation.max_tokens
    files.write_text(task, task_text(name, kind, ending, rows / "test.jsonl", bool(data.gold), budget))
    functions = Path(places.TASKS, f"{task_files.MODULE}.py")
    if not functions.is_file():
        files.write_text(functions, TASK_FUNCTIONS)
    written = [f"{recipe}: Qwen3-4B Instruct and Thinking; change `base_model` and `thinkswitch.pair` for another pair"]
    written += [f"{rows}/prompts.jsonl: {len(train)} prompts", f"{rows}/test.jsonl: {len(test)} held out{dropped}"]
    written += [f"{task}: reads final answers as `{kind}`"]
    for line in (*written, "Next:", *next_commands(name, reference=not data.gold)):
        console.say(f"  {line}")


def next_commands(name: str, reference: bool) -> list[str]:
    """What to type after `init`; with its folder if the command is not on the PATH."""
    typed = Path(sys.argv[0])
    command = "thinkswitch" if shutil.which("thinkswitch") or typed.name != "thinkswitch" else str(typed)
    words = ["check", *(["reference"] if reference else []), "iterate"]
    return [f"  {command} {word} --domain {name}" for word in words]


def split(data: Data) -> tuple[list[dict[str, str]], list[dict[str, str]], str, str]:
    """The rows to train on, those held out, the kind of answer, and what was left out, in words.

    Raises `ThinkSwitchError` naming the row that cannot be used, or that there are too few.
    """
    judged = replace(data, prompts=data.held_out_file or data.prompts)
    found = read_prompts(data, gold=not data.held_out_file)
    test = read_prompts(judged) if data.held_out_file else []
    if len(found) < FEWEST:
        raise ThinkSwitchError(f"{data.prompts} has {len(found)} prompts; give at least {FEWEST}.")
    golds = read_golds(judged) if data.gold else {}
    kind = data.kind or guessed_kind(list(golds.values()))
    for prompt_id, value in golds.items():
        if answers.gold(kind, value) is None:
            raise ThinkSwitchError(f"{judged.prompts}, prompt {prompt_id}: {answers.unread(kind, value)}; use --kind.")
    if not data.held_out_file:
        held = data.held_out or min(MOST_HELD_OUT, max(FEWEST_HELD_OUT, len(found) // 5))
        if held >= len(found):
            raise ThinkSwitchError(
                f"--held-out {held} leaves none of the {len(found)} prompts to train on; hold out fewer."
            )
        chosen = set(random.Random(0).sample(range(len(found)), held))
        test = [found[place] for place in sorted(chosen)]
        found = [one for place, one in enumerate(found) if place not in chosen]
    elif len(test) < FEWEST_HELD_OUT:
        raise ThinkSwitchError(f"{judged.prompts} has {len(test)} questions; give at least {FEWEST_HELD_OUT}.")
    ending = ENDINGS.get(kind, "")
    asked = [(name, f"{text} {ending}") for name, text in found]
    alike = {one.prompt_id for one in contamination.overlaps(asked, [f"{text} {ending}" for _, text in test])}
    train = [{"id": name, "prompt": text} for name, text in found if name not in alike]
    if not train:
        raise ThinkSwitchError(f"{data.prompts}: every prompt repeats one that is held out; give prompts that differ.")
    left_out = f" ({len(alike)} rows left out: they repeat one of these)" if alike else ""
    held_rows = [{"id": name, "prompt": text, **({"answer": golds[name]} if golds else {})} for name, text in test]
    return train, held_rows, kind, left_out


def read_prompts(data: Data, gold: bool = True) -> list[tuple[str, str]]:
    """Id and text of every row; `gold`: the rows have the column with the right answers."""
    keys = PromptKeys(**data.source, template="{{" + prompt_column(data, gold) + "}}")
    return prompts.read_prompts(keys, 0)[0]


def read_golds(data: Data) -> dict[str, str]:
    """The right answers by prompt id. Raises `ThinkSwitchError` naming the first row without one."""
    try:
        return prompts.read_field(PromptKeys(**data.source, template="-"), 0, data.gold)
    except ThinkSwitchError as problem:
        if data.held_out_file:
            raise
        advice = "or put the rows that have it into a file of their own and name that file with --held-out-file"
        raise ThinkSwitchError(f"{str(problem).rstrip('.')}, {advice}.") from None


def prompt_column(data: Data, gold: bool) -> str:
    """The column that holds the prompt. Raises `ThinkSwitchError` if that is not clear, or a named column is missing."""
    if "path" in data.source:
        row = next((row for _, row in sources.read_file(Path(data.source["path"]))), None)
    else:
        row = next(iter(sources.load_hub(data.prompts, data.config, data.split, None)[0]), None)
    if row is None:
        raise ThinkSwitchError(f"{data.prompts} has no rows.")
    texts = [name for name, value in row.items() if isinstance(value, str) and name != data.gold]
    named = data.column or next((name for name in prompts.QUESTION_FIELDS if name in texts), None)
    column = named or (texts[0] if len(texts) == 1 else None)
    for option, name in (("--column", column), ("--gold", data.gold if gold else "")):
        if name is None or (name and name not in row):
            fault = f"no column {name!r}" if name else "several columns that may hold the prompt"
            raise ThinkSwitchError(f"{data.prompts} has {fault}; name one by {option}: {', '.join(row)}.")
    if not re.fullmatch(r"[A-Za-z_]\w*", str(column)):
        raise ThinkSwitchError(f"{data.prompts}: rename the column {column!r} to letters, digits and `_`.")
    if left_out := [name for name in row if name.lower() in OPTIONS and name not in (column, data.gold)]:
        console.say(
            f"  {data.prompts}: {', '.join(left_out)} look like the options of a question and are left out; "
            "put them into the text of the prompt"
        )
    return str(column)


def guessed_kind(golds: list[str]) -> str:
    """The first kind that reads every right answer; `exact` if none does or there are none."""
    every = ((kind, all(answers.gold(kind, value) is not None for value in golds)) for kind in GUESSED_KINDS)
    return next((kind for kind, reads in every if reads and golds), "exact")


def recipe_text(name: str, kind: str, ending: str, count: int, overlays: Sequence[str] = ()) -> str:
    """The recipe of `aime` with these overlays, for a GPU, and the prompts, the answers and the task of a domain."""
    source = places.find(f"{places.RECIPES}/{GPU_RECIPE}.yaml")
    ours: dict[str, Any] = {"domain": name, "answers": {"kind": kind}, "evaluation": {"task": name}}
    if kind == "exact":  # a vote over free text has no majority
        ours = overlay(ours, {"answers": {"selection": "first"}, "sampling": {"samples": 1}})
    plain = f"runs/{name}/plain-axolotl"
    changes = {"output_dir": f"{plain}/adapter", "dataset_prepared_path": f"{plain}/prepared", "thinkswitch": ours}
    values = files.read_yaml(source)
    for extra in (*(files.read_yaml(overlay_path(one)) for one in overlays), changes):
        values = overlay(values, extra)
    values |= {"num_epochs": 3} if count >= MANY else {}
    values["datasets"][0]["path"] = f"runs/{name}/iter-1/pairs.jsonl"
    rows = f"{places.RECIPES}/{name}/prompts.jsonl"
    values["thinkswitch"]["prompts"] = {"path": rows, "template": "{{prompt}}" + ending, "count": count}
    commented = source.read_text(encoding="utf-8").splitlines()
    notes = Counter(
        line.partition("  #")[0].rstrip() for line in commented
    )  # a line that occurs once keeps its comment
    kept = {plain: line for line in commented if notes[plain := line.partition("  #")[0].rstrip()] == 1}
    lines = [kept.get(line, line) for line in task_files.dumps(values).splitlines()]
    made_from = " and the overlay ".join(f"`{one}`" for one in (GPU_RECIPE, *overlays))
    return "\n".join(
        [f"# {name}: made from the recipe {made_from}. All keys: docs/recipes.md, `thinkswitch keys`.", *lines, ""]
    )


def task_text(name: str, kind: str, ending: str, rows: Path, gold: bool, budget: int | None) -> str:
    """The task of the template with the questions of a domain; without right answers it reports agreement."""
    values = task_files.read(task_files.place(TASK))
    graded = f"grade_{kind}" if gold else f"{task_files.AGREEMENT}_{kind}"
    values |= {
        "task": name,
        "dataset_kwargs": {"data_files": {"test": str(rows if gold else rows.with_name("reference.jsonl"))}},
        "doc_to_text": "{{prompt}}" + ending,
        "generation_kwargs": task_files.read(task_files.place(GPU_TASK))["generation_kwargs"]
        | {"max_gen_toks": budget},
        "process_results": {"function": f"{task_files.MODULE}.{graded}"},
    }
    if not gold:
        values["metadata"]["questions"] = str(rows)  # `thinkswitch reference` answers them
        scores = [{"metric": task_files.AGREEMENT, "aggregation": "mean", "higher_is_better": True}]
        values["metric_list"] = scores + [one for one in values["metric_list"] if not one["metric"].endswith("@k")]
    return f"# The task of recipes/{name}.yaml.\n{task_files.dumps(values)}"
