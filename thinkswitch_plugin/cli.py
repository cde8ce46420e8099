"""The command `thinkswitch …`, also reached as `axolotl thinkswitch …`.

Each stage of the loop is one sub-command on a run folder, made from the table of stages; `make -n iterate`
shows their order. Heavy imports stay inside the commands, so help is instant.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import click

from thinkswitch_plugin import __version__, console
from thinkswitch_plugin.data.answers import EXTRACTORS
from thinkswitch_plugin.errors import AGAIN, ThinkSwitchError, with_next_command
from thinkswitch_plugin.run import MODES, TABLE, Given, execute, open_run, processes, progress
from thinkswitch_plugin.run.table import Row

NO_GPU_MEMORY = (
    "the GPU's memory does not hold the model and what it works on; end what else uses it (`nvidia-smi` shows it), lower "
    "`thinkswitch.engine.concurrency` or `evaluation.batch_size`, or have vLLM answer with the recipe's quantization (ENGINE=vllm, or `make serve` and --url), "
    f"and {AGAIN}."
)
F = TypeVar("F", bound=Callable[..., Any])
FOLDER = click.Path(path_type=Path, readable=False)  # whether it can be read is said in our own words
EXPORT_RANK = 64
OWNER_VARIABLE = "THINKSWITCH_OWNER"  # process id of the `make` that the user started
OVERLAY = click.option("--overlay", default="", help="Overlays put on the recipe: names or paths, by spaces.")


def disk_problem(error: OSError) -> str:
    """An error of the operating system as a sentence: what, where, what to do."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"the disk has no room left{where}: {error.strerror}; nothing half-written is kept. "
            "Make room and run the same command again: it goes on from here."
        )
    return f"{error.strerror or error}{where}; put that right and run the same command again."


def sentence_of(error: Exception) -> str | None:
    """What an error says to the user; None for one that is a defect of ours, or click's own."""
    if isinstance(error, ThinkSwitchError):
        return with_next_command(str(error))
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("thinkswitch_plugin"):
        return (
            f"{error.name.partition('.')[0]} is not installed here; `pip install 'thinkswitch[loop]'` brings all that the "
            f"commands need (from a checkout: `make setup`). Then {AGAIN}."
        )
    if isinstance(error, RuntimeError) and type(error).__name__ == "OutOfMemoryError":  # torch's, not imported here
        return NO_GPU_MEMORY
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        return disk_problem(error)
    return None


class Group(click.Group):
    """Prints our errors as one sentence and exits 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a sub-command."""
        processes.end_on_signals()
        processes.end_with_owner(os.environ.get(OWNER_VARIABLE, ""))
        try:
            try:
                return super().invoke(ctx)
            finally:
                progress.take_down()
        except processes.Interrupted as signal:
            click.echo("\nthinkswitch: stopped; the same command goes on from what is there.", err=True)
            ctx.exit(128 + signal.number)
        except Exception as error:
            sentence = sentence_of(error)
            if sentence is None or os.environ.get("THINKSWITCH_DEBUG"):
                raise
            click.echo(f"thinkswitch: {sentence}", err=True)
            ctx.exit(1)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="thinkswitch")
def main() -> None:
    """ThinkSwitch: move part of a reasoning model's trace into its weights.

    `make iterate DOMAIN=…` runs these stages in order; each can be run by itself.
    """
    prepare()


def prepare() -> None:
    """Keep engines that are imported later from writing of their own and from fetching code."""
    console.hush_engines()
    console.fetch_no_code()


def given() -> Given:
    """What the environment tells a command besides its own options; `make` hands these on."""
    from thinkswitch_plugin.data.sources import DATA_VARIABLE

    names = {"keep": "KEEP", "price": "PRICE_PER_HOUR", "data": DATA_VARIABLE}
    return Given(**{name: os.environ.get(variable, "") for name, variable in names.items()})


def add_stages() -> None:
    """A command for each stage of the table: RUN, ITERATION unless a run has it once, MODE if there are two."""
    for command, group in groupby(TABLE, lambda row: row.command):
        rows = {row.mode: row for row in group}
        first = next(iter(rows.values()))
        parameters: list[click.Parameter] = [click.Argument(["run"], type=FOLDER)]
        if not first.single:
            parameters.append(click.Argument(["iteration"], type=click.IntRange(min=0)))
        if first.mode:
            parameters.append(click.Argument(["mode"], type=click.Choice(list(MODES))))
        work = partial(do_stage, rows)
        main.add_command(click.Command(command, params=parameters, callback=work, help=first.help))


def do_stage(rows: dict[str | None, Row], run: Path, iteration: int = 0, mode: str | None = None) -> None:
    """Do one stage of a run."""
    from thinkswitch_plugin.loop import work
    from thinkswitch_plugin.run.prune import prune

    opened, row = open_run(run, given()), rows[mode]
    k = opened.iterations if row.when == "end" else iteration
    do = partial(getattr(work, row.work), opened, k, *([mode] if mode else []))
    execute(opened, row.name, k, do, after=prune)


@main.command()
@click.option("--domain", required=True, help="Name of a recipe in recipes/.")
@click.option("--runs", required=True, type=FOLDER, help="Folder that holds the runs.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--engine", default="auto", show_default=True, help="auto, vllm, embedded or a base URL.")
@click.option("--iterations", default=2, show_default=True, type=click.IntRange(min=1, max=20))
@OVERLAY
def begin(domain: str, runs: Path, seed: int, engine: str, iterations: int, overlay: str) -> None:
    """Check the recipe, settle what the run depends on, and say what is left to do."""
    from thinkswitch_plugin.loop.begin import begin_run

    begin_run(domain, runs, seed, engine, iterations, overlay.split(), given())


@main.command()
@click.argument("run", type=FOLDER)
def status(run: Path) -> None:
    """What of a run is done, at work and left; also while it runs, and after a crash."""
    from thinkswitch_plugin.run.status import show_status

    show_status(run, given())


@main.command()
@click.argument("run", type=FOLDER)
@click.option("--question", required=True, help="What is asked, as the domain asks its own questions.")
@click.option("--iteration", default="", help="Whose checkpoints (default: the last finished iteration).")
@click.option("--instruct", default="", help="Another instruct checkpoint (folder or hub id).")
@click.option("--thinking", default="", help="Another thinking checkpoint (folder or hub id).")
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    help="vllm, embedded (transformers in process), or a URL; auto is vLLM where the recipe needs a GPU.",
)
@OVERLAY
@click.option("--out", default="", help="Write the answers there as JSON.")
def compare(run: Path, question: str, iteration: str, overlay: str, out: str, **options: str) -> None:
    """Instruct before, instruct after and thinking answer one question, side by side."""
    from thinkswitch_plugin.judging.compare import compare as compare_answers

    if iteration and not (iteration.isascii() and iteration.isdigit()):
        raise click.UsageError(f"--iteration {iteration}: give a whole number from 0.")
    compare_answers(
        run,
        question,
        iteration=int(iteration) if iteration else None,
        overlays=overlay.split(),
        out=Path(out) if out else None,
        **options,
    )


@main.command()
@click.argument("run", type=FOLDER)
def verify(run: Path) -> None:
    """Read every file of a run again and name what no longer fits its stamps."""
    from thinkswitch_plugin.run.verify import verify as verify_run

    verify_run(run, given())


@main.command("eval-model")
@click.option("--domain", required=True, help="Name of a recipe in recipes/.")
@click.option("--model", required=True, help="Checkpoint folder or hub id.")
@click.option("--engine", default="auto", show_default=True)
@click.option("--out", type=FOLDER, default=Path("eval"), show_default=True, help="Where lm-eval's files go.")
@OVERLAY
def eval_model(domain: str, model: str, engine: str, out: Path, overlay: str) -> None:
    """Judge any checkpoint with a domain's lm-eval task."""
    from thinkswitch_plugin.loop.begin import evaluate_model

    evaluate_model(domain, model, engine, out, overlay.split())


@main.command()
@click.option("--domain", required=True, help="Name of a recipe in recipes/.")
@OVERLAY
@click.option("--iterations", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--tokens-per-second", type=click.FloatRange(min=0, min_open=True), help="What your GPU generates.")
def check(domain: str, overlay: str, iterations: int, tokens_per_second: float | None) -> None:
    """Before a GPU hour is spent: machine, engines, hub, recipe, pair, prompts, time and money."""
    from thinkswitch_plugin.loop.check import check_domain

    check_domain(domain, overlay.split(), iterations, tokens_per_second, given().price)


@main.command()
@click.option("--task", help="Read answers as this lm-eval task does: aime, pubmedqa, …, or a file of lm_eval_tasks/.")
@click.option("--answer", type=click.Choice(list(EXTRACTORS)), help="Read answers as this kind, instead of --task.")
@click.option("--rows", type=FOLDER, help="Write one verdict a row, in the order of the input.")
@click.option(
    "--trace",
    multiple=True,
    help="The name of the convention in which traces are written (all of them are looked for without it), and, also "
    "given, opened: the chat template had opened the trace, so text without a tag is an unfinished trace.",
)
@click.option("--trace-open", help="What opens a trace, in a convention of your own.")
@click.option("--trace-close", help="What ends it.")
@click.argument("file", type=FOLDER)
def score(
    task: str | None,
    answer: str | None,
    rows: Path | None,
    trace: tuple[str, ...],
    trace_open: str | None,
    trace_close: str | None,
    file: Path,
) -> None:
    """Grade saved outputs again: JSONL rows, lm-eval sample files, OpenAI or vLLM batch files."""
    from thinkswitch_plugin.judging.score import convention_named, kind_of, score_file

    if (task is None) == (answer is None):
        raise click.UsageError("Give either --task or --answer.")
    names = [name for name in trace if name not in ("inline", "opened")]
    try:
        kind, convention = kind_of(task, answer), convention_named(names, trace_open, trace_close)
    except ThinkSwitchError as error:
        raise click.UsageError(str(error)) from None
    score_file(kind, file, rows, opened="opened" in trace, convention=convention)


@main.command()
def keys() -> None:
    """Every key under `thinkswitch:` in a recipe, as the table of docs/recipes.md."""
    from thinkswitch_plugin.args import keys_table

    for row in (["key", "value", "default", "meaning"], ["---"] * 4, *keys_table()):
        click.echo(f"| {' | '.join(row)} |")


def together(*every: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order in which `--help` shows them."""

    def decorate(function: F) -> F:
        for option in reversed(every):
            function = option(function)
        return function

    return decorate


# Of commands that work on one pair: that of a run's iteration, or any two checkpoints.
of_pair = together(
    click.option("--domain", required=True, help="Name of a recipe in recipes/; its task judges."),
    click.option("--runs", default="runs", show_default=True, type=FOLDER, help="Folder that holds the runs."),
    click.option("--iteration", default=1, show_default=True, type=click.IntRange(min=0, max=20)),
    click.option("--instruct", default="", help="Another instruct checkpoint (folder or hub id)."),
    click.option("--thinking", default="", help="Another thinking checkpoint (folder or hub id)."),
    click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Where there is no run."),
    click.option("--engine", default="auto", show_default=True, help="Where there is no run."),
    OVERLAY,
    click.option("--out", default="", help="Where the results go, instead of the run's iteration."),
    click.option("--limit", default="", help="Judge by the first so many questions only."),
)
# Of those that judge candidates made of the pair, besides.
of_candidates = together(
    click.option(
        "--template",
        type=click.Choice(["instruct", "thinking"]),
        default="instruct",
        show_default=True,
        help="Whose tokenizer and chat template; the thinking one may open the trace and so hide the transition.",
    ),
    click.option("--sampling", default="", help='Temperature/top-p, such as "0.6/0.95 0.7/0.8".'),
    click.option("--samples", default="", help="k samples a question (default: the task's own)."),
)


def whole_number(option: str, text: str) -> int | None:
    """An option's number; None where it is not given."""
    if text and not (text.isascii() and text.isdigit() and int(text) > 0):
        raise click.UsageError(f"{option} {text}: give a whole number above 0.")
    return int(text) if text else None


def _wanted(overlay: str, out: str, limit: str, **others: Any) -> Any:
    from thinkswitch_plugin.search.subject import Wanted

    where = Path(out) if out else None
    return Wanted(overlays=overlay.split(), out=where, limit=whole_number("--limit", limit), **others)


def _subject(template: str, sampling: str, samples: str, **others: Any) -> tuple[Any, list[Any], Any]:
    from thinkswitch_plugin.search.subject import find_subject
    from thinkswitch_plugin.search.sweep import parse_sampling

    drawn = parse_sampling(sampling, whole_number("--samples", samples))
    return find_subject(_wanted(**others)), drawn, template


@main.command()
@of_pair
@of_candidates
@click.option("--lambdas", default="0 0.1 … 1", show_default=True, help="Weights of the thinking checkpoint.")
def sweep(lambdas: str, **options: Any) -> None:
    """Interpolate a pair at many λ, judge each point, find the stages and the sweet spot -> sweep/."""
    from thinkswitch_plugin.search.sweep import parse_weights
    from thinkswitch_plugin.search.sweep import sweep as run_sweep

    weights = parse_weights(lambdas)
    subject, sampling, template = _subject(**options)
    run_sweep(subject, weights, sampling, template)


@main.command("judge-merges")
@of_pair
@of_candidates
@click.option("--name", required=True, help="Folder under merges/ for the results.")
@click.option("--lambda", "weight", default="", help="λ put into every config that has one.")
@click.argument("configs", nargs=-1, required=True, type=FOLDER)
def judge_merges(name: str, weight: str, configs: tuple[Path, ...], **options: Any) -> None:
    """Judge merge configs (YAML files, or folders of them) on one pair -> merges/NAME/."""
    from thinkswitch_plugin.search.ablation import judge_configs
    from thinkswitch_plugin.search.sweep import parse_weights

    chosen = parse_weights(weight)[0] if weight.strip() else None
    subject, sampling, template = _subject(**options)
    if Path(name).name != name:
        raise click.UsageError(f"--name {name}: give a name, not a path.")
    if len(sampling) > 1:
        raise click.UsageError("--sampling: give one setting here.")
    judge_configs(subject, name, configs, chosen, sampling[0], template)


@main.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def merge(arguments: tuple[str, ...]) -> None:
    """mergekit-yaml with the method `thinkswitch` known to it; takes the same options."""
    for argument in arguments:
        if argument.endswith((".yaml", ".yml")):
            from thinkswitch_plugin.merging.config import check_config

            check_config(Path(argument))  # before the seconds that mergekit takes to import
            break
    from thinkswitch_plugin.merging.run import command

    command.main(args=list(arguments), prog_name="thinkswitch merge", standalone_mode=False)


@main.command()
@click.argument("run", type=FOLDER)
@click.argument("iteration", type=click.IntRange(min=0))
@click.option(
    "--labels", default="", help='Labels to learn from, rows {"prompt", "label"}, instead of the pair\'s own.'
)
@click.option("--limit", default="", help="At most so many label prompts.")
def switch(run: Path, iteration: int, labels: str, limit: str) -> None:
    """Train a router that sends each question to instruct or thinking, and judge it -> switch/."""
    from thinkswitch_plugin.router.make_switch import make_switch

    labels_file = Path(labels) if labels else None
    make_switch(open_run(run), iteration, labels_file=labels_file, limit=whole_number("--limit", limit))


@main.command()
@click.option("--pair", required=True, type=FOLDER, help="A finished run with a router: RUNS/DOMAIN.")
@click.option("--iteration", type=click.IntRange(min=0), help="Whose pair (default: the last one with a router).")
@click.option(
    "--threshold", type=click.FloatRange(0, 1), help="Think where p(think) is at least this; 0 always, 1 never."
)
@click.option("--url", default="", help="A running server for both modes, such as `make serve` starts.")
@click.option("--instruct-url", default="", help="A running server for instruct; without one: in process.")
@click.option("--thinking-url", default="", help="A running server for thinking; without one: in process.")
@click.option("--file", "source", default="", help="Many questions: JSONL with `question`, a row each.")
@click.option("--out", default="", help="Where the answers to --file go (default: the standard output).")
@click.argument("question", default="")
def answer(pair: Path, source: str, out: str, question: str, **options: Any) -> None:
    """Answer QUESTION by instruct or by thinking, as the run's router decides; `-` reads JSONL from standard input.

    A question that begins with a minus sign goes behind `--`.
    """
    from thinkswitch_plugin.router.switch import STDIN, Switch, answer_file, answer_one

    source = STDIN if question == STDIN else source
    if bool(source) == bool(question.strip() and question != STDIN):
        raise click.UsageError("give one question, or many by --file (or `-` for standard input).")
    switch = Switch.open(pair, **options)
    if source:
        answer_file(switch, source, Path(out) if out else None)
    else:
        answer_one(switch, question)


@main.command("export-loras")
@of_pair
@click.option("--rank", default="", help=f"Ranks of the adapters, by spaces (default: {EXPORT_RANK}).")
@click.option(
    "--base",
    default="",
    help="What the adapters are put on: instruct, thinking, instruct-0, a folder or a hub id "
    "(default: the starting instruct checkpoint).",
)
def export_loras(rank: str, base: str, **options: Any) -> None:
    """Instruct and thinking as two LoRAs of one base (mergekit), judged beside the full checkpoints -> export/."""
    from thinkswitch_plugin.export.job import export, find_base, find_pair, parse_ranks

    ranks = parse_ranks(rank or str(EXPORT_RANK))
    subject = find_pair(_wanted(**options))
    export(subject, find_base(subject, base), ranks)


@main.command(context_settings={"ignore_unknown_options": True})
@click.option("--domain", required=True, help="Name of a recipe in recipes/; its engine options count.")
@click.option("--runs", default="runs", show_default=True, type=FOLDER, help="Folder that holds the runs.")
@click.option("--iteration", default=1, show_default=True, type=click.IntRange(min=0, max=20))
@click.option("--out", default="", help="Where the export went, instead of the run's iteration.")
@click.option("--model", default="", help="One checkpoint (folder or hub id) instead of an export.")
@click.option("--rank", default="", help="One of the exported ranks (default: the one found to be enough).")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(min=0, max=65535), help="0: any free one.")
@OVERLAY
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(
    domain: str,
    runs: Path,
    iteration: int,
    out: str,
    model: str,
    rank: str,
    port: int,
    overlay: str,
    arguments: tuple[str, ...],
) -> None:
    """Serve both modes of an export from one copy of the weights, by vLLM, to this machine only.

    ARGUMENTS are further options of vLLM; they come last, so they count.
    """
    from thinkswitch_plugin.export.serve import serve as serve_both
    from thinkswitch_plugin.recipe import load_recipe, overlay_path, recipe_path

    keys = load_recipe(recipe_path(domain), tuple(overlay_path(name) for name in overlay.split())).keys
    folder = Path(out) if out else runs / domain / f"iter-{iteration}"
    serve_both(folder / "export", model, whole_number("--rank", rank), keys, port, arguments)


@main.command()
@click.option("--domain", required=True, help="Name of a recipe in recipes/.")
@click.option("--runs", default="runs", show_default=True, type=FOLDER, help="Folder that holds the runs.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    help="Who answers: vllm, or embedded (transformers in process); auto is vLLM on a GPU.",
)
@OVERLAY
@click.option("--folds", default="", help="K of the cross-validation (default: the recipe's).")
@click.option("--baselines", default="post", show_default=True, help='What is trained: "post", or "post pre".')
@click.option("--generations", default="", help="Another generations.jsonl, requests.jsonl beside it.")
def labels(folds: str, overlay: str, domain: str, baselines: str, **options: Any) -> None:
    """Complexity labels by K-fold cross-validation: which questions need thinking? -> adaptive/seed-N/labels/."""
    from thinkswitch_plugin.perception.label_job import find_job, parse_baselines
    from thinkswitch_plugin.perception.labels import make_labels

    count, formats = whole_number("--folds", folds), parse_baselines(baselines)
    job = find_job(domain, overlays=overlay.split(), folds=count, **options)
    make_labels(replace(job, baselines=formats))


@main.command()
@click.argument("first")
@click.argument("second")
@click.option("--out", type=FOLDER, default=Path("similarity"), show_default=True, help="Where the files go.")
def similarity(first: str, second: str, out: Path) -> None:
    """How near two checkpoints (folders or hub ids) are: angles, distances and σ -> similarity.json, .png, .svg."""
    if not (first and second):
        raise click.UsageError("name two checkpoints: make similarity A=folder B=folder")
    from thinkswitch_plugin.report.similarity import report_similarity
    from thinkswitch_plugin.run import checkpoint

    folders = [checkpoint.resolve(name, None, which)[0] for name, which in ((first, "first"), (second, "second"))]
    report_similarity(folders[0], folders[1], out)


add_stages()

if __name__ == "__main__":
    sys.exit(main())
