"""Commands on merges and on saved outputs: sweep, evaluate, merge, compare tensors, grade."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from thinkswitch_plugin import console
from thinkswitch_plugin.answer_kinds import KINDS
from thinkswitch_plugin.cli.group import main
from thinkswitch_plugin.cli.options import FOLDER, ITERATION, RUNS, of_candidates, of_pair
from thinkswitch_plugin.errors import ThinkSwitchError


@main.command()
@of_pair
@of_candidates
@click.option("--lambdas", default="0 0.1 … 1", show_default=True, help="Weights of the thinking checkpoint.")
def sweep(pair: Any, mode: Any, sampling: str, samples: int | None, lambdas: str) -> None:
    """Interpolate a pair at many λ, evaluate each point, find the stages and the sweet spot -> sweep/."""
    from thinkswitch_plugin.search.pair import find_pair
    from thinkswitch_plugin.search.sweep import parse_sampling, parse_weights
    from thinkswitch_plugin.search.sweep import sweep as run_sweep

    weights, drawn = parse_weights(lambdas), parse_sampling(sampling, samples)
    run_sweep(find_pair(pair), weights, drawn, mode)


@main.command("eval-merges")
@of_pair
@of_candidates
@click.option("--name", required=True, help="Folder under merges/ for the results.")
@click.option("--lambda", "weight", default="", help="λ put into every config that has one.")
@click.argument("configs", nargs=-1, required=True, type=FOLDER)
def eval_merges(
    pair: Any, mode: Any, sampling: str, samples: int | None, name: str, weight: str, configs: tuple[Path, ...]
) -> None:
    """Evaluate merge configs (YAML files, or folders of them) on one pair -> merges/NAME/."""
    from thinkswitch_plugin.search.ablation import judge_configs
    from thinkswitch_plugin.search.pair import find_pair
    from thinkswitch_plugin.search.sweep import parse_sampling, parse_weights

    chosen = parse_weights(weight)[0] if weight.strip() else None
    drawn = parse_sampling(sampling, samples)
    if Path(name).name != name:
        raise click.UsageError(f"--name {name}: give a name, not a path.")
    if len(drawn) > 1:
        raise click.UsageError("--sampling: give one setting here.")
    judge_configs(find_pair(pair), configs, name=name, weight=chosen, sampling=drawn[0], template=mode)


@main.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def merge(arguments: tuple[str, ...]) -> None:
    """Run mergekit-yaml with the merge method `thinkswitch`; takes the same options."""
    from thinkswitch_plugin.merging.config import read_config

    if config := next((word for word in arguments if word.endswith((".yaml", ".yml"))), None):
        read_config(Path(config))  # before the seconds that mergekit takes to import
    from thinkswitch_plugin.merging.run import command

    command.main(args=list(arguments), prog_name="thinkswitch merge", standalone_mode=False)


@main.command()
@click.argument("first")
@click.argument("second")
@click.option(
    "--domain",
    default="arithmetic",
    show_default=True,
    help="Domain of the run that `instruct` and `thinking` refer to.",
)
@RUNS
@click.option("--iteration", type=ITERATION, help="Iteration of the checkpoints (default: the last).")
@click.option("--out", type=FOLDER, default="similarity", show_default=True, help="Folder for the files.")
def similarity(first: str, second: str, domain: str, runs: Path, iteration: int | None, out: Path) -> None:
    """Measure how similar two checkpoints are (folders, hub ids, `instruct`, `thinking-0` …) -> similarity.json.

    Pictures are written too.
    """
    if not (first and second):
        raise click.UsageError("name two checkpoints: make similarity FIRST=folder SECOND=folder")
    from thinkswitch_plugin.run import checkpoint
    from thinkswitch_plugin.run.folder import of_run

    named = [of_run(runs / domain, name, "", iteration) for name in (first, second)]
    folders = [checkpoint.resolve(name, None, which)[0] for name, which in zip(named, ("first", "second"), strict=True)]
    from thinkswitch_plugin.report.similarity import report_similarity

    report_similarity(folders[0], folders[1], out)


@main.command()
@click.option("--task", help="Read answers as this lm-eval task does: aime, pubmedqa, …, or a file of lm_eval_tasks/.")
@click.option("--kind", type=click.Choice(list(KINDS)), help="Read answers as this kind, instead of --task.")
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
    kind: str | None,
    rows: Path | None,
    trace: tuple[str, ...],
    trace_open: str | None,
    trace_close: str | None,
    file: Path,
) -> None:
    """Grade saved outputs again: JSONL rows, lm-eval sample files, OpenAI or vLLM batch files."""
    from thinkswitch_plugin.data.batch import Asked
    from thinkswitch_plugin.judging.score import convention_named, kind_of, score_file

    if (task is None) == (kind is None):
        raise click.UsageError("Give either --task or --kind.")
    names = [name for name in trace if name not in ("inline", "opened")]
    try:
        read_as, convention = kind_of(task, kind), convention_named(names, trace_open, trace_close)
    except ThinkSwitchError as error:
        raise click.UsageError(str(error)) from None
    score_file(read_as, file, rows, Asked("opened" in trace, convention))


@main.command()
def keys() -> None:
    """Print every key under `thinkswitch:` of a recipe, as in docs/recipes.md."""
    from thinkswitch_plugin.cli.keys_table import keys_table

    for line in console.table(["key", "value", "default", "meaning"], keys_table()):
        click.echo(line)
