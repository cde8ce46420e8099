"""The files of a run -> what `report.json` holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, files
from thinkswitch_plugin.data.batch import Asked
from thinkswitch_plugin.data.task_files import AGREEMENT, measures_agreement
from thinkswitch_plugin.environment import hardware
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.figures import Sample, summarize
from thinkswitch_plugin.judging.guard import against_start
from thinkswitch_plugin.judging.paired import compare
from thinkswitch_plugin.judging.samples import graded, samples_file, samples_of
from thinkswitch_plugin.run import MODES, TABLE, Run, stages, stamp_path, versions
from thinkswitch_plugin.run.folder import EVALUATED
from thinkswitch_plugin.run.hashes import Hashes, read_stamp
from thinkswitch_plugin.run.table import control_files, find_stage

TIMED = {row.name: row.timed for row in TABLE}


@dataclass(frozen=True)
class Evaluation:
    """One judged checkpoint of a run.

    Attributes:
        mode: which checkpoint in which mode, a name of `EVALUATED`.
        path: lm-eval's samples file.
        how: how its completions are read.
        samples: one a question, in the order of the file's lines.
    """

    iteration: int
    mode: str
    path: Path
    how: Asked
    samples: list[Sample]


def evaluations(run: Run) -> list[Evaluation]:
    """Every judged checkpoint, by iteration and mode. Raises `ThinkSwitchError` if one is missing or damaged."""
    keys = run.recipe.keys
    found = []
    for k in range(run.iterations + 1):
        for name, (mode, _) in run.evaluated(k).items():
            folder = run.iteration(k) / "eval" / name
            how, samples = graded(
                folder, keys.evaluation.task, run.checkpoint(mode, k), keys.answers.kind, keys.convention
            )
            path = samples_file(folder, keys.evaluation.task)
            found.append(Evaluation(k, name, path, how, list(samples)))
    return found


def build_report(run: Run, judged: Sequence[Evaluation]) -> dict[str, Any]:
    """Everything `report.json` holds, read from the files of a run.

    Args:
        judged: what `evaluations` returns.
    """
    seconds = stage_seconds(run)
    samples = {(e.iteration, e.mode): e.samples for e in judged}
    names = run.evaluated(run.iterations)
    samples |= {(0, name): samples[0, asked_as] for name, (_, asked_as) in names.items()}
    score = AGREEMENT if measures_agreement(run.recipe.keys.evaluation.task) else "accuracy"
    iterations = []
    for k in range(run.iterations + 1):
        here = run.iteration(k)
        entry: dict[str, Any] = {"iteration": k}
        for mode in MODES:
            entry[mode] = summarize(samples[k, mode])
        if run.recipe.keys.pair.hybrid:
            for name, (mode, asked_as) in EVALUATED.items():
                entry[mode][asked_as] = summarize(samples[k, name])
        if k > 0:
            pairs, rebuilt = files.read_json(here / "pairs.json"), files.read_json(here / "rebuild.json")
            shown = ("prompts", "samples", "kept", "dropped", "disagreed", "selection", "min_agreement")
            entry["pairs"] = {key: pairs[key] for key in shown if key in pairs}
            entry["merge"] = rebuilt
            entry["paired"] = {
                name: [
                    {"against": earlier, **compare(samples[earlier, name], samples[k, name], score)}
                    for earlier in sorted({k - 1, 0}, reverse=True)
                ]
                for name in names
            }
            if losses := training_losses(run, k):
                entry["losses"] = losses
        if run.recipe.keys.evaluation.guard:
            by_name = {name: against_start(run, k, name) for name in run.evaluated(k)}
            entry["guard"] = {
                task: {name: by_name[name][task] for name in by_name} for task in run.recipe.keys.evaluation.guard
            }
        entry["seconds"] = seconds.get(k, {})
        iterations.append(entry)
    total = sum(sum(stage.values()) for stage in seconds.values())
    price = price_per_hour(run.given.price)
    return {
        "domain": run.recipe.keys.domain,
        "seed": run.seed,
        "engine": run.engine,
        **({} if score == "accuracy" else {"score": score}),
        "iterations": iterations,
        **({"controls": found} if (found := controls(run, samples, score)) else {}),
        "versions": versions(),
        "hardware": hardware(),
        "cost": {"hours": total / 3600, "price_per_hour": price, "total": price * total / 3600},
    }


def controls(run: Run, samples: dict[tuple[int, str], list[Sample]], score: str) -> list[dict[str, Any]]:
    """The control experiments beside the run, each paired with the run's own checkpoint of iteration 1.

    One whose checkpoint of iteration 1 has been made again since is left out, with a message.

    Args:
        samples: of the run's evaluations, by iteration and mode.
        score: what Mean@1 is called.
    """
    found, hashes = [], Hashes(run.folder)
    for path in control_files(run):
        result = files.read_json(path)
        mode, name = result["mode"], path.parent.name
        if result.get("beside") != hashes.of(run.iteration(1) / mode):
            console.say(
                f"  {path.parent} is of an earlier {mode} checkpoint and not shown; repeat it: make control CONTROL={name}"
            )
            continue
        checkpoint = str(path.parent / mode)
        own = samples_of(path.parent / "eval" / mode, run.recipe.keys, checkpoint)
        found.append({**result, "paired": compare(samples[1, mode], own, score)})
    hashes.save()
    return found


def price_per_hour(text: str) -> float:
    """What PRICE_PER_HOUR= says, 0 without one. Raises `ThinkSwitchError` if it is not an amount of money."""
    try:
        price = float(text or 0)
    except ValueError:
        price = math.nan
    if not (math.isfinite(price) and price >= 0):
        raise ThinkSwitchError(f"PRICE_PER_HOUR={text} is not a price; write it as 0.35.")
    return price


def stage_seconds(run: Run) -> dict[int, dict[str, float]]:
    """Seconds of every finished stage by iteration, from the stamps."""
    found: dict[int, dict[str, float]] = {}
    for stage in stages(run):
        path = stamp_path(run, stage)
        if stage.name == "report" or not path.is_file():
            continue
        times = found.setdefault(stage.iteration, {})
        name = TIMED[stage.name]
        times[name] = round(times.get(name, 0.0) + files.read_json(path)["seconds"], 2)
    return found


def training_losses(run: Run, k: int) -> list[list[float]]:
    """(step, training loss) of iteration k, from the stamp of its training; empty if that has none."""
    stamp = read_stamp(stamp_path(run, find_stage(run, "train", k))) or {}
    return (stamp.get("notes") or {}).get("losses") or []


def write_report(run: Run) -> None:
    """Write `report.json`, `report.md`, `report.html` and the pictures, and print the headline table."""
    from thinkswitch_plugin.report import beside, page, pictures, templates, tracking

    judged = evaluations(run)
    report = build_report(run, judged)
    shown = beside.shown(report)
    text = templates.markdown("report.md.j2", **shown)
    files.write_json(run.folder / "report.json", report)
    files.write_text(run.folder / "report.md", text)
    for name, draw in pictures.OF_REPORT.items():
        pictures.save(draw(report), run.folder / name)
    page.write_page(run, report, judged, run.folder / "report.html")
    title = f"{report['domain']}, seed {report['seed']}: {report['iterations'][0]['instruct']['n']} held-out questions"
    console.print_table(title, shown["header"], shown["rows"], left=("checkpoint",))
    console.say(f"  {shown['headline']}")
    for table in shown["beside"]:
        console.print_table(table.title, table.header, table.rows, left=table.header[: table.words])
        console.say(f"  {table.sentence}")
    console.say(f"  {run.folder / 'report.html'}, report.md, report.json")
    tracking.log_report(report, run.recipe.axolotl, run.folder)
