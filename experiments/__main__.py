"""Experiments on finished runs, as commands: `python -m experiments control shuffled runs/arithmetic`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from thinkswitch_plugin.cli import Group
from thinkswitch_plugin.cli.options import CLUSTER, DOMAIN, ENGINE, FOLDER, OVERLAY, RUNS
from thinkswitch_plugin.run import open_run


@click.group(cls=Group)
def main() -> None:
    """Controls, the adaptive experiment and the tables of docs/."""


@main.command()
@click.argument(
    "name", type=click.Choice(["shuffled", "own-answers", "true-labels", "undistilled", "rounded", "losses"])
)
@click.argument("run", type=FOLDER)
def control(name: str, run: Path) -> None:
    """A control experiment on iteration 1 of a finished run -> controls/NAME/."""
    from experiments.controls import run_control
    from experiments.losses import run_losses

    run_losses(open_run(run)) if name == "losses" else run_control(open_run(run), name)


@main.command()
@click.option("--part", type=click.Choice(["loop", "interpolation", "losses"]), default="loop", show_default=True)
@click.argument("runs", type=FOLDER, nargs=-1, required=True)
def results(part: str, runs: tuple[Path, ...]) -> None:
    """Print tables of several finished runs as Markdown: iterations and controls, sweeps and merges, or losses."""
    if part == "loop":
        from experiments.controls import print_results

        print_results(list(runs))
    elif part == "losses":
        from experiments.losses_table import print_losses

        print_losses(runs)
    else:
        from experiments.interpolation_results import print_interpolation

        print_interpolation(list(runs))


@main.command()
@DOMAIN
@RUNS
@click.option("--seeds", default="0 1 2", show_default=True, help="One whole experiment each, by spaces.")
@ENGINE
@click.option("--folds", type=int, help="K of the labels (default: the recipe's).")
@click.option(
    "--generations", default="", help="A generations.jsonl, instead of the recipe's or iteration 1 of the run."
)
@click.option("--conditions", default="", help="Some of the controls only, by spaces (default: all).")
@OVERLAY
@CLUSTER
def adaptive(
    domain: str, runs: Path, seeds: str, conditions: str, overlay: tuple[str, ...], cluster: str, **options: Any
) -> None:
    """Adaptive thinking with all its controls: labels, training, evaluation, table and picture -> adaptive/."""
    from experiments.adaptive import run_experiment
    from thinkswitch_plugin.perception.label_job import find_job

    words = seeds.split()
    numbers = [int(word) for word in words if word.isascii() and word.isdigit()]
    if not numbers or len(set(numbers)) < len(words):
        raise click.UsageError(f"--seeds {seeds!r}: give different whole numbers, by spaces.")
    jobs = [find_job(domain, runs, seed=number, overlays=overlay, **options) for number in numbers]
    run_experiment(jobs, conditions, cluster)


@main.command()
@DOMAIN
@RUNS
@OVERLAY
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--tokens", default=96, show_default=True, type=click.IntRange(min=64), help="Of an answer, at most.")
@click.option("--gpu-gb", default=0.0, type=click.FloatRange(min=0), help="Limit every process to so much GPU memory.")
def rehearse(domain: str, runs: Path, overlay: tuple[str, ...], seed: int, tokens: int, gpu_gb: float) -> None:
    """Every stage of a recipe with a random pair of its shape and small budgets -> RUNS/rehearsal-DOMAIN/."""
    from experiments.rehearse import Budgets
    from experiments.rehearse import rehearse as run_all

    run_all(domain, runs, seed, overlay, Budgets(tokens=tokens), gpu_gb)


if __name__ == "__main__":
    main(prog_name="experiments")
