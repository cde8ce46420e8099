"""The figures of a finished rehearsal, beside what was foretold: `rehearsal.json`, and a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, environment
from thinkswitch_plugin.args import PairKeys
from thinkswitch_plugin.loop import foretell
from thinkswitch_plugin.loop.foretell import Cost, Foretold
from thinkswitch_plugin.run import Run, stages, versions
from thinkswitch_plugin.run.hashes import read_stamp
from thinkswitch_plugin.run.progress import duration
from thinkswitch_plugin.run.table import stamp_path


def figures(run: Run, real: PairKeys, foretold: Foretold, used: Mapping[str, Any]) -> dict[str, Any]:
    """What `rehearsal.json` holds.

    Args:
        real: the pair that was rehearsed.
        used: see `rehearse_watch.Watch`.
    """
    keys = run.recipe.keys
    questions = dict.fromkeys(keys.evaluation.tasks, keys.evaluation.limit or 0)  # a task has more than the limit
    expected = foretold.stages(run.recipe, questions)
    stamps = {stage.key: read_stamp(stamp_path(run, stage)) or {} for stage in stages(run)}
    done = stamps["generate", 1]
    speed = done["notes"]["tokens_per_second"]  # 0 if a rehearsal was stopped between the last answer and the stamp
    speed = speed or foretell.work(run.recipe, "generate", questions) / max(done["seconds"], 1.0)
    training, steps = seconds_of_training(run.iteration(1) / "logs" / "train.log"), run.recipe.axolotl["max_steps"]
    rows: list[dict[str, Any]] = []
    costs: dict[str, Cost] = {}
    for (name, k), done in stamps.items():
        most = used.get(f"{name}-{k}", {"memory": 0, "gpu": 0, "written": 0})
        memory, gpu, written = (round(most[part] / 1e9, 3) for part in ("memory", "gpu", "written"))
        work = foretell.work(run.recipe, name, questions)
        unit = 0.0 if not work else training / work if name == "train" else 1 / speed
        before, (seconds, cost) = costs.get(name, Cost(0, 0, 0)), expected[name]
        fixed = max(before.fixed, done["seconds"] - unit * work, 0.0)
        costs[name] = Cost(fixed, unit, max(before.memory, memory), written)
        told = {"seconds": round(seconds, 1), "memory_gb": round(cost.memory, 2), "written_gb": round(cost.written, 2)}
        row = {"stage": name, "iteration": k, "seconds": done["seconds"], "memory_gb": memory, "gpu_gb": gpu}
        rows.append({**row, "written_gb": written, "foretold": told})
    return {
        "pairs": [[pair.instruct, pair.thinking] for pair in (real, keys.pair)],
        **{"hardware": environment.hardware(), "versions": versions(), "basis": foretold.basis},
        **{
            "tokens_per_second": speed,
            "seconds_a_step": round(training / steps, 2),
            "disk_gb": round(used["disk"] / 1e9, 2),
        },
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "stages": rows,
        "costs": {name: cost._asdict() for name, cost in costs.items()},
    }


def seconds_of_training(log: Path) -> float:
    """The time of the trainer's steps as it logged it; 0 if it did not."""
    found = re.findall(r"'train_runtime': '?([\d.]+)", log.read_text(errors="replace"))
    return float(found[-1]) if found else 0.0


def show(figures: Mapping[str, Any], outer: Path) -> None:
    """Print the table."""
    gpu = figures["hardware"]["gpu"]

    def row(found: Mapping[str, Any]) -> Sequence[str]:
        told = found["foretold"]
        cells = [f"{found['stage']} {found['iteration']}", f"{found['seconds']:.1f}", f"{told['seconds']:.0f}"]
        cells += [f"{found['memory_gb']:.2f}", f"{told['memory_gb']:.1f}"]
        cells += [f"{found['gpu_gb']:.2f}"] if gpu else []
        return [*cells, f"{found['written_gb']:.2f}", f"{told['written_gb']:.1f}"]

    header = ["stage", "seconds", "foretold", "memory GB", "foretold", *(["GPU GB"] if gpu else []), "written GB"]
    print("\n".join(console.table([*header, "foretold"], map(row, figures["stages"]))))
    console.say(
        f"{duration(figures['seconds'])}, at most {figures['disk_gb']:g} GB of disk, {figures['tokens_per_second']:g} "
        f"tokens/s, {figures['seconds_a_step']:g} s a step of the training. Foretold: {figures['basis']}. "
        f"See {outer / foretell.FIGURES} and {outer / outer.name.partition('-')[2] / 'report.html'}"
    )
