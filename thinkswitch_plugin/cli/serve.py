"""Commands that use what a run made: the router, one model for both modes, LoRAs of one base, a server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from thinkswitch_plugin.cli.group import main
from thinkswitch_plugin.cli.options import (
    CLUSTER,
    DOMAIN,
    ENGINE,
    FOLDER,
    MODE,
    OVERLAY,
    RUNS,
    SEED,
    number,
    of_pair,
    of_served,
    together,
)
from thinkswitch_plugin.run import open_run

EXPORT_RANK = 64

# Where the checkpoints behind a router answer, and when it thinks.
of_router = together(
    click.option(
        "--threshold", type=click.FloatRange(0, 1), help="Think where p(think) is at least this; 0 always, 1 never."
    ),
    click.option("--url", default="", help="A running server for both modes, such as `make serve` starts."),
    click.option("--instruct-url", default="", help="A running server for instruct; without one: in process."),
    click.option("--thinking-url", default="", help="A running server for thinking; without one: in process."),
)


@main.command()
@click.argument("run", type=FOLDER)
@click.argument("iteration", type=click.IntRange(min=0))
@click.option(
    "--labels", type=FOLDER, help='Labels to learn from, rows {"prompt", "label"}, instead of the pair\'s own.'
)
@click.option("--limit", type=number, help="At most so many label prompts.")
def switch(run: Path, iteration: int, labels: Path | None, limit: int | None) -> None:
    """Train a router that sends each question to instruct or thinking, and evaluate it -> switch/."""
    from thinkswitch_plugin.router.make_switch import make_switch

    make_switch(open_run(run), iteration, labels_file=labels, limit=limit)


@main.command()
@click.argument("run", type=FOLDER)
@click.option(
    "--iteration", type=click.IntRange(min=0), help="Iteration of the pair (default: the last one with a router)."
)
@of_router
@click.option("--file", "source", default="", help="Many questions: JSONL with `question`, a row each.")
@click.option("--out", type=FOLDER, help="File for the answers to --file (default: standard output).")
@click.argument("question", default="")
def answer(run: Path, source: str, out: Path | None, question: str, **options: Any) -> None:
    """Answer QUESTION by instruct or by thinking, as the router of RUN decides; `-` reads JSONL from standard input.

    A question that begins with a minus sign goes behind `--`.
    """
    from thinkswitch_plugin.router.answer import STDIN, answer_file, answer_one
    from thinkswitch_plugin.router.switch import Switch

    source = STDIN if question == STDIN else source
    if bool(source) == bool(question.strip() and question != STDIN):
        raise click.UsageError("give one question, or many by --file (or `-` for standard input).")
    switch = Switch.open(run, **options)
    if source:
        answer_file(switch, source, out)
    else:
        answer_one(switch, question)


@main.command("export-loras")
@of_pair
@click.option("--rank", default=str(EXPORT_RANK), show_default=True, help="Ranks of the adapters, separated by spaces.")
@click.option(
    "--base",
    default="",
    help="Base of the adapters: instruct, thinking, instruct-0, a folder or a hub id "
    "(default: the starting instruct checkpoint).",
)
def export_loras(pair: Any, rank: str, base: str) -> None:
    """Export instruct and thinking as two LoRAs of one base (mergekit), and compare them with the full checkpoints -> export/."""
    from thinkswitch_plugin.export.job import export, find_base, find_pair, parse_ranks

    ranks = parse_ranks(rank)
    found = find_pair(pair)
    export(found, find_base(found, base), ranks)


@main.command(context_settings={"ignore_unknown_options": True})
@of_served
@click.option("--model", default="", help="One checkpoint (folder or hub id) instead of an export.")
@click.option("--switch", is_flag=True, help="Serve the switch of the run: its router and both checkpoints.")
@of_router
@click.option("--rank", type=number, help="One of the exported ranks (default: the one found to be enough).")
@click.option(
    "--lambda", "weight", default="", help="Serve the pair interpolated at this λ, which `serve-lambda` moves."
)
@MODE
@click.option("--port", default=8000, show_default=True, type=click.IntRange(min=0, max=65535), help="0: any free one.")
@click.argument("extra", metavar="ARGUMENTS", nargs=-1, type=click.UNPROCESSED)
def serve(pair: Any, weight: str, mode: Any, switch: bool, **options: Any) -> None:
    """Serve both modes of an export from one copy of the weights, by vLLM, to this machine only.

    ARGUMENTS are further options of vLLM; they come last, so they count. With --switch, an endpoint asks instruct or
    thinking for each request, as the router of the run decides, and has a page to chat.
    """
    router = {name: options.pop(name) for name in ("threshold", "url", "instruct_url", "thinking_url")}
    if switch:
        return _serve_switch(pair, router, weight, **options)
    if given := next((name for name, value in router.items() if value not in ("", None)), None):
        raise click.UsageError(f"--{given.replace('_', '-')} belongs to --switch.")
    if weight.strip():
        from thinkswitch_plugin.export.live import serve_live
        from thinkswitch_plugin.search.pair import find_pair
        from thinkswitch_plugin.search.sweep import parse_weights

        del options["rank"]
        return serve_live(find_pair(pair), parse_weights(weight)[0], mode, **options)
    from thinkswitch_plugin.export.serve import recipe_to_serve
    from thinkswitch_plugin.export.serve import serve as serve_both

    keys = recipe_to_serve(options["model"], pair.domain, pair.overlay).keys
    serve_both(pair.results / "export", keys=keys, **options)


def _serve_switch(pair: Any, router: dict[str, Any], weight: str, *, port: int, extra: Any, **others: Any) -> None:
    """Serve the switch of a run; of the last iteration that has one, unless another is named."""
    if weight.strip() or extra or any(others.values()):
        raise click.UsageError(
            "--switch serves a run's router; leave out --lambda, --model, --rank and vLLM's options."
        )
    from thinkswitch_plugin.router.serve import serve_switch
    from thinkswitch_plugin.router.switch import Switch

    source = click.get_current_context().get_parameter_source("iteration")
    k = None if source is click.core.ParameterSource.DEFAULT else pair.iteration
    serve_switch(Switch.open(pair.folder, iteration=k, **router), port)


@main.command("serve-lambda")
@of_served
@click.argument("weight", metavar="LAMBDA", type=float)
def serve_lambda(pair: Any, weight: float) -> None:
    """Change λ of a server started by `serve --lambda` to LAMBDA, without a restart."""
    from thinkswitch_plugin.export.live import move_lambda

    move_lambda(pair.results, weight)


@main.command()
@DOMAIN
@RUNS
@click.option("--seed", default=0, show_default=True, type=SEED)
@ENGINE
@OVERLAY
@click.option("--folds", type=int, help="K of the cross-validation (default: the recipe's).")
@click.option("--formats", default="post", show_default=True, help='What is trained: "post", or "post pre".')
@click.option(
    "--generations", default="", help="Another generations.jsonl, with its requests.jsonl in the same folder."
)
@CLUSTER
def labels(domain: str, overlay: tuple[str, ...], formats: str, cluster: str, **options: Any) -> None:
    """Find the questions that need thinking, by K-fold cross-validation -> adaptive/seed-N/labels/."""
    from thinkswitch_plugin.perception.label_job import find_job, parse_formats
    from thinkswitch_plugin.perception.labels import make_labels

    trained = parse_formats(formats)
    make_labels(replace(find_job(domain, overlays=overlay, **options), formats=trained, cluster=cluster))
