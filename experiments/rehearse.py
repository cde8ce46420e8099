"""`make rehearse`: every stage of a recipe with a random pair of its own shape, before anyone pays for a GPU.

A random pair, as near each other as a real one, goes through the stages of `make iterate` with the recipe itself and an
overlay: few prompts, tens of tokens, two steps of the training, a handful of questions. vLLM's structured outputs hold
the completions to a form: trace, closing tag, answer. What the hub does not give (config, tokenizer, prompts, questions) is
made here. Weights are deleted as soon as no stage that is left reads them (`KEEP=none`).

    runs/rehearsal-aime/rehearsal.json    the figures; `make check` reads them
    runs/rehearsal-aime/overlay.yaml      what differs from the recipe
    runs/rehearsal-aime/aime/             the run
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from psutil import virtual_memory

from experiments import rehearse_figures, rehearse_form, rehearse_material
from experiments.rehearse_watch import Watch, gpu_memory
from thinkswitch_plugin import console, environment, files, places
from thinkswitch_plugin.data import batch
from thinkswitch_plugin.engine_args import option_values
from thinkswitch_plugin.engines import servers
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.loop import check, foretell
from thinkswitch_plugin.recipe import Recipe, recipe_of
from thinkswitch_plugin.run import locked, open_run, stamp, versions
from thinkswitch_plugin.run.execution import work_path
from thinkswitch_plugin.run.hashes import read_stamp
from thinkswitch_plugin.run.table import TRACKING
from thinkswitch_plugin.training.layout import rows_of_a_step

# How an answer of each kind is written; see `answer_kinds`.
ANSWERS = {
    "integer": r"\\boxed\{[0-9]{1,3}\}",
    "matharena": r"\\boxed\{[0-9]{1,3}\}",
    "decision": r"\\boxed\{(yes|no|maybe)\}",
    "choice": r"\\boxed\{[A-D]\}",
    "digit": "[0-9]",
}
BOXED = r"\\boxed"
DISK = 3.2  # checkpoints that are on the disk at once, with KEEP=none


@dataclass(frozen=True)
class Budgets:
    """How little is asked: tokens of an answer, prompts at least, steps of the training, questions."""

    tokens: int = 96
    prompts: int = 4
    steps: int = 2
    questions: int = 3


def rehearse(domain: str, runs: Path, seed: int, overlays: tuple[str, ...], budgets: Budgets, gpu_gb: float) -> None:
    """Rehearse a recipe, or continue a rehearsal that was stopped; print the table and write `rehearsal.json`.

    Args:
        gpu_gb: limit every process to so much GPU memory; 0 for no limit.

    Raises `ThinkSwitchError` for a recipe that needs none, a lack of disk or memory, and whatever stops a stage.
    """
    recipe = recipe_of(domain, overlays)
    if recipe.keys.pair.demo:
        raise ThinkSwitchError(
            f"{recipe.path}: the pair is made on the spot, so `make iterate DOMAIN={domain}` runs it at its own size; "
            "rehearse a recipe whose pair is downloaded, such as aime."
        )
    if servers.vllm_python() is None:
        raise ThinkSwitchError(
            f"A rehearsal needs vLLM, whose structured outputs give the answers a form. {servers.NO_VLLM}"
        )
    if gpu_gb and not environment.has_cuda():
        raise ThinkSwitchError(f"GPU_GB={gpu_gb:g} limits a GPU, and this machine has none; leave it out.")
    shape = rehearse_material.shape_of(recipe.keys.pair, seed)
    outer = foretell.folder_of(runs, domain)
    key = {
        "recipe": [recipe.axolotl, recipe.keys.model_dump(mode="json", by_alias=True)],
        **{"seed": seed, "budgets": asdict(budgets), "gpu_gb": gpu_gb, "config": dict(shape.config)},
        **{"versions": versions(), "hardware": environment.hardware()},
    }
    with locked(outer):
        stamp.once(
            outer / ".rehearsed.json",
            key,
            (outer / domain, outer / foretell.FIGURES),
            lambda _: _carry_out(recipe, outer, shape, key),
        )
    rehearse_figures.show(files.read_json(outer / foretell.FIGURES), outer)


def _carry_out(recipe: Recipe, outer: Path, shape: rehearse_material.Shape, key: Mapping[str, Any]) -> None:
    domain, seed, weights = recipe.path.stem, key["seed"], shape.bytes / 1e9
    here, budgets, on_gpu = outer / domain, Budgets(**key["budgets"]), environment.has_cuda()
    made = rehearse_material.prepare(recipe, shape, here / "rehearsal", seed, budgets.prompts)
    overlay, changes = outer / "overlay.yaml", derived(recipe, made, budgets, key["gpu_gb"], shape.bytes)
    foretold = foretell.measured(outer.parent, recipe) or foretell.stated(weights)
    memory = max(cost.memory for cost in foretold.costs.values())

    def write_overlay() -> Recipe:
        needs = {
            "gpu_gb": (key["gpu_gb"] or recipe.keys.needs.gpu_gb) if on_gpu else 0,
            "ram_gb": recipe.keys.needs.ram_gb if on_gpu else round(memory, 1),
            "disk_gb": max(1.0, round(DISK * weights + 1 - files.size(here) / 1e9, 1)),  # less what is there already
        }
        header = f"What a rehearsal of {recipe.path} changes."
        files.write_yaml(overlay, {**changes, "thinkswitch": {**changes["thinkswitch"], "needs": needs}}, header=header)
        return recipe_of(domain, (*map(str, recipe.overlays), str(overlay)))

    told = write_overlay()
    questions = dict.fromkeys(told.keys.evaluation.tasks, budgets.questions)
    console.say(
        f"A rehearsal of {recipe.path} with two random checkpoints of {weights:.1f} GB: "
        f"{foretell.describe(foretold, told, questions, 1)}"
    )
    check.enough(files.free_space(outer), told.keys.needs.disk_gb, "the rehearsal needs")
    check.enough(virtual_memory().available, told.keys.needs.ram_gb, "its stages take")
    made.make_pair(shape)
    _write_form(made.vllm, recipe, made.pair["thinking"], budgets.tokens)
    told, env = write_overlay(), _environment(made, key["gpu_gb"])
    os.environ.update({name: env[name] for name in ("THINKSWITCH_DATA",) if name in env})
    check.check_domain(told, outer.parent, "vllm", seed, 1, None, "")
    used = _iterate(told, outer, env, seed)
    figures = rehearse_figures.figures(open_run(here), recipe.keys.pair, foretold, used)
    files.write_json(outer / foretell.FIGURES, figures)


def derived(
    recipe: Recipe, made: rehearse_material.Material, budgets: Budgets, gpu_gb: float, size: int
) -> dict[str, Any]:
    """The overlay that makes a recipe a rehearsal: another pair, small budgets, and the form of the answers."""
    keys, form = recipe.keys, ["--middleware", f"{rehearse_form.__name__.rpartition('.')[2]}.Form"]
    if environment.has_cuda():
        options = [*keys.engine.vllm_args, *form]
        if gpu_gb:
            share = float(dict(option_values(keys.engine.vllm_args)).get("--gpu-memory-utilization", 0.9))
            options += ["--gpu-memory-utilization", f"{share * _fraction(gpu_gb):.4f}"]
    else:
        cache = int(min(foretell.KV_GB * 1e9, max(2**28, size / 4)))
        options = ["--dtype", "bfloat16", "--max-num-seqs", str(min(8, keys.engine.concurrency))]
        options += ["--kv-cache-memory-bytes", str(cache), *form]
    return {
        "base_model": made.pair["instruct"],
        "max_steps": budgets.steps,
        # neither trackers nor the hub hear of a random pair
        **{key: None for key in recipe.axolotl if TRACKING.match(key) or key.startswith("hub_")},
        **made.axolotl,
        "thinkswitch": {
            "pair": {**made.pair, "base": None, "revision_instruct": None, "revision_thinking": None},
            "prompts": {**made.prompts, "count": max(budgets.prompts, min(8, rows_of_a_step(recipe.axolotl)))},
            "sampling": {"samples": min(2, keys.sampling.samples), "max_tokens": budgets.tokens},
            "answers": {"min_agreement": None, "unfinished": "drop"},
            "engine": {"vllm_args": options},
            "rebuild": {"check_prompts": budgets.prompts},
            "evaluation": {
                **{"limit": budgets.questions, "max_tokens": budgets.tokens},
                **({"guard_limit": budgets.questions, "guard_margin": None} if keys.evaluation.guard else {}),
            },
        },
    }


def _write_form(folder: Path, recipe: Recipe, thinking: str, tokens: int) -> None:
    """The middleware and its form, of about `tokens` tokens: digits are a token each."""
    from transformers import AutoTokenizer

    keys = recipe.keys
    how = batch.asked_of(AutoTokenizer.from_pretrained(thinking), keys.convention, keys.pair.arguments("thinking"))
    close = how.convention.closes[0] if how.convention else "</think>"
    opening = "" if how.opened else f"{how.convention.opens[0] if how.convention else '<think>'}\n"
    answer = ANSWERS.get(keys.answers.kind, "[0-9]{1,3}")
    words = f"[0-9]{{{tokens // 4}}}\n\n" if answer.startswith(BOXED) else ""
    trace = re.escape(opening) + f"[0-9]{{{tokens * 2 // 5}}}" + re.escape(close)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(str(rehearse_form.__file__), folder)
    files.write_json(folder / "form.json", {"structured_outputs": {"regex": f"{trace}\n\n{words}{answer}"}})


def _fraction(gpu_gb: float) -> float:
    """A limit of GPU memory as a share of the GPU's."""
    return min(1.0, gpu_gb * 1e9 / (gpu_memory("total") or gpu_gb * 1e9))


def _environment(made: rehearse_material.Material, gpu_gb: float) -> dict[str, str]:
    """The environment of the run: where vLLM finds the form and lm-eval the questions, and the limit of GPU memory."""
    hidden = ("MAKEFLAGS", "MFLAGS")
    found = {n: v for n, v in os.environ.items() if n not in hidden and not n.startswith("THINKSWITCH_")}
    # A stage watches this process, so that it ends if we are killed.
    found |= {"MAKELEVEL": "1", "THINKSWITCH_OWNER": str(os.getpid())}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(made.vllm.resolve()), found.get("PYTHONPATH"))))
    if data := made.data or os.environ.get("THINKSWITCH_DATA"):
        found["THINKSWITCH_DATA"] = str(data)
    if gpu_gb:
        limit = f"per_process_memory_fraction:{_fraction(gpu_gb):.4f}"
        found["PYTORCH_CUDA_ALLOC_CONF"] = ",".join(filter(None, (found.get("PYTORCH_CUDA_ALLOC_CONF"), limit)))
    return found


def _iterate(told: Recipe, outer: Path, env: Mapping[str, str], seed: int) -> dict[str, Any]:
    """`make iterate` on the derived recipe, watched; what its stages used. Raises `ThinkSwitchError` if it stops."""
    domain = told.path.stem
    words = ["make", "--no-print-directory", "-f", str(places.HOME / "Makefile"), "iterate", f"DOMAIN={domain}"]
    words += [f"RUNS={outer}", "ITERATIONS=1", "ENGINE=vllm", "KEEP=none", f"SEED={seed}"]
    words += [f"OVERLAY={' '.join(map(str, told.overlays))}", f"VENV={Path(sys.executable).parents[1]}"]
    process = subprocess.Popen(words, env=dict(env))

    def at_work() -> str | None:
        found = read_stamp(work_path(outer / domain)) or {}
        return f"{found['stage']}-{found['iteration']}" if "stage" in found else None

    watch = Watch(process.pid, at_work, outer / domain, outer / domain / "rehearsal" / "used.json")
    watch.start()
    try:
        code = process.wait()
    except BaseException:
        process.terminate()
        raise
    finally:
        measured = watch.end()
    if code:
        raise ThinkSwitchError(
            "The rehearsal stopped, as the real run would have; mend what is named above, and run the same command again to continue."
        )
    return measured
