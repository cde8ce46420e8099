"""What the stages of a run will take: as a rehearsal measured them on this machine, else by stated figures.

A stage takes `fixed` seconds, `unit` seconds for each token at most (or each row that the training learns from), and `memory` GB:

    rehearsal.json   {"hardware": {…}, "pairs": [["Qwen/…", "Qwen/…"], …], "costs": {"generate": {"fixed": 41.0, …}, …}, …}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from thinkswitch_plugin import environment, files
from thinkswitch_plugin.args import ThinkSwitchKeys, resolve_seed
from thinkswitch_plugin.data.task_files import repeats
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.evaluation_args import REFERENCE_SAMPLES
from thinkswitch_plugin.loop.reference import unanswered
from thinkswitch_plugin.recipe import Recipe
from thinkswitch_plugin.run.progress import duration
from thinkswitch_plugin.training.layout import rows_of_a_step

FIGURES = "rehearsal.json"
KV_GB = 1.0  # what a rehearsal on a CPU reserves for the answers under way


class Cost(NamedTuple):
    """Of one stage: seconds whatever the work, seconds a token or a row, GB of memory, GB written."""

    fixed: float
    unit: float = 0.0
    memory: float = 1.0
    written: float = 0.0


Costs = Mapping[str, Cost]  # by the names of stages


@dataclass(frozen=True)
class Foretold:
    """The costs of a machine, and where they are from."""

    costs: Costs
    basis: str
    measured: bool = False

    @property
    def tokens_per_second(self) -> float | None:
        """Of the thinking checkpoint, None if that is not known."""
        unit = self.costs["generate"].unit
        return 1 / unit if unit else None

    def stages(self, recipe: Recipe, questions: Mapping[str, int]) -> dict[str, tuple[float, Cost]]:
        """Seconds and cost of each stage of an iteration, by name; see `work`."""
        return {
            name: (cost.fixed + cost.unit * work(recipe, name, questions), cost) for name, cost in self.costs.items()
        }


def folder_of(runs: Path, domain: str) -> Path:
    """Where the rehearsal of a domain lies."""
    return runs / f"rehearsal-{domain}"


def measured(runs: Path, recipe: Recipe) -> Foretold | None:
    """What a rehearsal of this pair measured on this machine, by this domain if there is one; None if there was none."""
    pair, own = [recipe.keys.pair.instruct, recipe.keys.pair.thinking], folder_of(runs, recipe.path.stem)
    for folder in (own, *sorted(set(runs.glob(folder_of(Path(), "*").name)) - {own})):
        with suppress(ThinkSwitchError, OSError, KeyError, TypeError):
            found = files.read_json(folder / FIGURES)
            if pair in found["pairs"] and found["hardware"] == environment.hardware():
                costs = {name: Cost(**cost) for name, cost in found["costs"].items()}
                domain = folder.name.partition("-")[2]
                return Foretold(costs, f"measured on this machine by `make rehearse DOMAIN={domain}`", measured=True)
    return None


def stated(weights: float) -> Foretold:
    """Rough figures of two CPU cores for a pair of checkpoints.

    Args:
        weights: GB of one checkpoint in bfloat16.
    """
    start, token, vllm = 25 + 3.5 * weights, 0.03 * weights, 2.2 + weights + min(KV_GB, weights / 4)
    heads = min(3.1, 2.7 * weights)  # copies of a tied embedding, while weights are loaded into a running server too
    vllm += heads
    costs = {
        "pair": Cost(5 + weights),
        "requests": Cost(2),
        "generate": Cost(start, token, vllm),
        "pairs": Cost(2),
        "train": Cost(15 + 10 * weights, 9.0 * weights, 1.5 + 0.8 * weights),
        "merge-lora": Cost(10 + 8.5 * weights, 0, min(2.5, 1 + weights), weights),
        "rebuild": Cost(start + 14 * weights, token, vllm, weights),
        "eval-instruct": Cost(start, token, vllm),
        "eval-thinking": Cost(10 + 4 * weights, token, vllm),
        "report": Cost(5),
    }
    return Foretold(costs, "rough figures of two CPU cores")


def foretell(runs: Path, recipe: Recipe, seed: int) -> Foretold | None:
    """Measured costs, else stated ones for a pair that is here on a machine without a GPU; None if there are neither."""
    if (found := measured(runs, recipe)) is not None:
        return found
    folder = Path(resolve_seed(recipe.keys.pair.instruct, seed))
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
    return stated(weights) if weights and not environment.has_cuda() else None


def work(recipe: Recipe, stage: str, questions: Mapping[str, int]) -> float:
    """Tokens that a stage generates at most, or rows that it learns from; 0 for a stage whose time depends on neither.

    Args:
        questions: of each evaluation task.
    """
    keys = recipe.keys
    asked = keys.prompts.count * keys.sampling.samples
    longest = keys.sampling.max_tokens + (keys.retry_budget or 0)
    if stage in ("generate", "rebuild"):
        return longest * (asked if stage == "generate" else min(asked, keys.rebuild.check_prompts))
    if stage == "train":
        kept = asked if keys.answers.selection == "all" else keys.prompts.count
        try:
            epochs = float(recipe.axolotl.get("num_epochs") or 1)
        except (TypeError, ValueError):
            raise ThinkSwitchError(f"{recipe.path}: `num_epochs` has to be a number.") from None
        rows = rows_of_a_step(recipe.axolotl)
        steps = math.ceil(kept / rows) * epochs
        return rows * min(steps, recipe.axolotl.get("max_steps") or steps)
    if stage.startswith("eval"):
        modes = 2 if keys.pair.hybrid else 1
        return (
            modes
            * sum(answers(keys, task, number) for task, number in questions.items())
            * (keys.evaluation.max_tokens or 0)
        )
    return 0


def answers(keys: ThinkSwitchKeys, task: str, questions: int) -> int:
    """How many answers a checkpoint gives to a task with so many questions."""
    judged = keys.evaluation
    limit = judged.limit if task == judged.task else judged.guard_limit
    return min(questions, limit or questions) * repeats(task)


def tokens_at_most(keys: ThinkSwitchKeys, iterations: int, questions: Mapping[str, int]) -> dict[str, int]:
    """The tokens that a run generates at most, by what they are for, in words.

    Args:
        questions: of each evaluation task; none if they could not be loaded, or are not made yet.
    """
    asked, longest = keys.prompts.count * keys.sampling.samples, keys.sampling.max_tokens
    again = keys.retry_budget or 0
    parts = {
        f"for the pairs ({keys.prompts.count} prompts × {keys.sampling.samples} samples × {longest + again}, each iteration)": (
            asked * (longest + again) * iterations
        ),
        "for trying λ once an iteration": min(asked, keys.rebuild.check_prompts) * (longest + again) * iterations,
    }
    judged = keys.evaluation
    if unanswered(keys):
        each = REFERENCE_SAMPLES if keys.sampling.temperature > 0 else 1
        number = questions.get(judged.task, 0)
        parts[f"for the reference answers, once ({number} questions × {each} samples × {longest})"] = (
            number * each * longest
        )
    for task, number in questions.items() if judged.max_tokens else ():
        each = answers(keys, task, number)
        evaluated = 2 + (4 if keys.pair.hybrid else 2) * iterations  # a hybrid in both modes
        what = "evaluating" if task == judged.task else f"the guard {task} on"
        parts[f"for {what} {evaluated} checkpoints ({each} answers × {judged.max_tokens})"] = (
            evaluated * each * (judged.max_tokens or 0)
        )
    return parts


def describe(found: Foretold | None, recipe: Recipe, questions: Mapping[str, int], iterations: int) -> str:
    """The time of a run and its largest stage, in words, as far as they are known."""
    if found is None:
        return (
            f"not measured on this machine; `make rehearse DOMAIN={recipe.path.stem}` measures them with random weights"
        )
    stages = found.stages(recipe, questions)
    once = sum(stages[name][0] for name in ("pair", "report", "eval-instruct", "eval-thinking"))
    each = {name: seconds for name, (seconds, _) in stages.items() if name not in ("pair", "report")}
    largest = max(found.costs, key=lambda name: found.costs[name].memory)
    listed = ", ".join(f"{name} {duration(seconds)}" for name, seconds in each.items() if seconds >= 1)
    return (
        f"about {duration(once + iterations * sum(each.values()))}, {found.basis}; at most "
        f"{found.costs[largest].memory:.1f} GB of memory ({largest})\n          an iteration: {listed}"
    )
