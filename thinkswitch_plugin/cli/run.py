"""Commands on a run: begin it, do its stages, look at it."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import closing
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from thinkswitch_plugin import console, places
from thinkswitch_plugin.answer_kinds import KINDS
from thinkswitch_plugin.cli.group import main
from thinkswitch_plugin.cli.options import (
    DOMAIN,
    ENGINE,
    FOLDER,
    INSTRUCT,
    OVERLAY,
    PRICE,
    RUNS,
    SEED,
    THINKING,
    number,
    told,
)
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.evaluation_args import REFERENCE_SAMPLES
from thinkswitch_plugin.run import MODES, TABLE, Given, execute, locked, open_run
from thinkswitch_plugin.run.table import Row


def add_stage(command: str, rows: dict[str | None, Row]) -> None:
    """A command for a stage of the table: RUN, ITERATION unless a run has it once, MODE if there are two (else both)."""
    first = next(iter(rows.values()))
    work = told(partial(do_stage, rows))
    if first.mode:
        work = click.argument("mode", required=False, type=click.Choice(list(MODES)))(work)
    if not first.single:
        work = click.argument("iteration", type=click.IntRange(min=0))(work)
    main.command(command, help=first.help)(click.argument("run", type=FOLDER)(work))


def do_stage(
    rows: dict[str | None, Row], run: Path, iteration: int = 0, mode: str | None = None, *, given: Given
) -> None:
    """Do one stage of a run, or both modes of it with one engine."""
    from thinkswitch_plugin.judging.served import Served
    from thinkswitch_plugin.loop import work

    opened = open_run(run, given)
    with locked(opened.folder), closing(Served(opened.recipe.keys.engine)) as served:
        for row in rows.values() if mode is None else [rows[mode]]:
            k = opened.iterations if row.when == "end" else iteration
            do = partial(getattr(work, row.work), opened, k, *([row.mode, served] if row.mode else []))
            execute(opened, row.name, k, do)


for name, group in groupby(TABLE, lambda row: row.command):
    add_stage(name, {row.mode: row for row in group})


@main.command()
@click.option("--domain", default="arithmetic", show_default=True, help="Name of a recipe; see `thinkswitch recipes`.")
@RUNS
@click.option("--seed", default=0, show_default=True, type=SEED)
@ENGINE
@click.option("--iterations", default=2, show_default=True, type=click.IntRange(min=1, max=20))
@click.option("--overlay", default="", help="Overlays to apply to the recipe: names or paths, separated by spaces.")
@click.option("--keep", default="all", show_default=True, help="Iterations that keep their weights: all, last or n.")
@PRICE
def iterate(**options: Any) -> None:
    """Run the whole method, or continue it after a kill or a change: `make iterate`, from any folder."""
    if shutil.which("make") is None:
        raise ThinkSwitchError("`thinkswitch iterate` needs GNU make, which is not installed (apt-get install make).")
    ours = f"'{sys.executable}' -m thinkswitch_plugin.cli"
    settings = [f"{name.upper()}={value}" for name, value in options.items()]
    os.execvp("make", ["make", "-f", str(places.HOME / "Makefile"), "iterate", f"INSTALLED={ours}", *settings])


@main.command()
@click.argument("name", default="mine")
@click.option("--gpu", type=click.Choice(["8gb", "24gb", "several"]), default="8gb", show_default=True)
@click.option("--prompts", required=True, help="JSONL, CSV or Parquet file with a prompt a row, or a hub dataset.")
@click.option("--column", default="", help="Column with the prompt (default: prompt, problem or question).")
@click.option("--gold", default="", help="Column with the right answer; without one, agreement is evaluated.")
@click.option("--kind", type=click.Choice(list(KINDS)), help="How a final answer is read (default: as --gold shows).")
@click.option("--config", help="Configuration of the dataset on the hub.")
@click.option("--split", default="train", show_default=True, help="Split of the dataset on the hub.")
@click.option("--held-out", type=click.IntRange(min=4), help="Rows for the evaluation (default: a fifth, at most 200).")
@click.option(
    "--held-out-file", default="", help="The rows for the evaluation, with --gold, instead of a part of --prompts."
)
def init(name: str, gpu: str, kind: str | None, **data: Any) -> None:
    """Write a recipe, prompts and an lm-eval task for a domain of your own, called NAME, into the current folder."""
    from thinkswitch_plugin.loop.new_domain import Data, write_domain

    write_domain(name, gpu, Data(kind=kind or "", **data))


@main.command()
@DOMAIN
@ENGINE
@OVERLAY
@click.option(
    "--samples", default=REFERENCE_SAMPLES, show_default=True, type=click.IntRange(min=1), help="Answers a question."
)
def reference(overlay: tuple[str, ...], **options: Any) -> None:
    """Store the thinking checkpoint's majority answer to each held-out question of a domain without gold answers."""
    from thinkswitch_plugin.loop.reference import make_reference

    make_reference(overlays=overlay, **options)


@main.command()
def recipes() -> None:
    """List the recipes that can be run from here: those of the package, and those in ./recipes."""
    for name in places.names(places.RECIPES, ".yaml"):
        path = places.find(f"{places.RECIPES}/{name}.yaml")
        console.say(f"  {name:22} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")


@main.command()
@DOMAIN
@click.option("--runs", required=True, type=FOLDER, help="Folder that holds the runs.")
@click.option("--seed", default=0, show_default=True, type=SEED)
@ENGINE
@click.option("--iterations", default=2, show_default=True, type=click.IntRange(min=1, max=20))
@OVERLAY
@told
def begin(overlay: tuple[str, ...], **options: Any) -> None:
    """Check the recipe, record what the run depends on, and print what is left to do."""
    from thinkswitch_plugin.loop.begin import begin_run

    begin_run(overlays=overlay, **options)


@main.command()
@click.argument("run", type=FOLDER)
@told
def status(run: Path, given: Given) -> None:
    """Show what is done, running and left in a run; also works during a run or after a crash."""
    from thinkswitch_plugin.run.status import show_status

    show_status(run, given)


@main.command()
@click.argument("run", type=FOLDER)
@told
def verify(run: Path, given: Given) -> None:
    """Read every file of a run again and list what no longer matches its stamps."""
    from thinkswitch_plugin.run.verify import verify as verify_run

    verify_run(run, given)


@main.command()
@DOMAIN
@RUNS
@ENGINE
@OVERLAY
@click.option("--seed", default=0, show_default=True, type=SEED)
@click.option("--iterations", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--tokens-per-second", type=click.FloatRange(min=0, min_open=True), help="What your GPU generates.")
@told
def check(domain: str, overlay: tuple[str, ...], given: Given, **options: Any) -> None:
    """Check machine, engines, hub, recipe, pair and prompts before a run, and estimate its time and cost."""
    from thinkswitch_plugin.loop.check import check_domain
    from thinkswitch_plugin.recipe import recipe_of

    check_domain(recipe_of(domain, overlay), price=given.price, **options)


@main.command()
@click.argument("run", type=FOLDER)
@click.option("--question", default="", help="The question; it is asked with the template of the domain.")
@click.option(
    "--iteration", type=click.IntRange(min=0), help="Iteration of the checkpoints (default: the last finished one)."
)
@INSTRUCT
@THINKING
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    help="vllm, embedded (transformers in process), or a URL; auto is vLLM where the recipe needs a GPU.",
)
@OVERLAY
@click.option("--out", type=FOLDER, help="Write the answers there as JSON.")
def compare(run: Path, question: str, overlay: tuple[str, ...], **options: Any) -> None:
    """Instruct before, instruct after and thinking answer one question, side by side."""
    from thinkswitch_plugin.judging.compare import compare as compare_answers

    compare_answers(run, question, overlays=overlay, **options)


@main.command()
@click.argument("run", type=FOLDER)
@click.option("--judge", required=True, help="The judge: its name on the server, or a checkpoint.")
@ENGINE
@click.option("--iteration", type=click.IntRange(min=1), help="Iteration of the answers (default: the last).")
@click.option(
    "--mode",
    type=click.Choice(MODES),
    default="instruct",
    show_default=True,
    help="Checkpoint whose answers are compared.",
)
@click.option("--limit", type=number, help="Use only the first N questions.")
def judge(run: Path, judge: str, engine: str, iteration: int | None, mode: str, limit: int | None) -> None:
    """Have a judge model compare the answers of an iteration with those of iteration 0, in both orders -> judge/MODE/."""
    from thinkswitch_plugin.judging.pairwise import judge_run

    opened = open_run(run)
    judge_run(opened, judge, engine, mode=mode, iteration=iteration or opened.iterations, limit=limit)


@main.command("eval-model")
@DOMAIN
@click.option("--model", required=True, help="Checkpoint folder or hub id.")
@ENGINE
@click.option("--out", type=FOLDER, default="eval", show_default=True, help="Folder for lm-eval's files.")
@OVERLAY
def eval_model(overlay: tuple[str, ...], **options: Any) -> None:
    """Evaluate any checkpoint with a domain's lm-eval task."""
    from thinkswitch_plugin.loop.begin import evaluate_model

    evaluate_model(overlays=overlay, **options)
