"""Options that several commands have, and what their texts mean."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from thinkswitch_plugin.run import Given

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def number(text: str) -> int:
    """A whole number above 0."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise click.BadParameter(f"{text}: give a whole number above 0.")
    return int(text)


def words(text: str) -> tuple[str, ...]:
    """Several words in one text, separated by spaces."""
    return tuple(text.split())


FOLDER = click.Path(path_type=Path, readable=False)  # the commands report unreadable paths themselves
SEED = click.IntRange(min=0)
ITERATION = click.IntRange(min=0, max=20)


def together(*every: Decorator) -> Decorator:
    """Several options as one decorator, in the order in which `--help` shows them."""
    return lambda function: functools.reduce(lambda made, option: option(made), reversed(every), function)


def hand_on(_ctx: click.Context, _param: click.Parameter, folder: str) -> str:
    """Tell lm-eval's tasks, in this process and in those it starts, where the evaluation sets lie."""
    if folder:
        os.environ["THINKSWITCH_DATA"] = folder
    return folder


DOMAIN = click.option("--domain", required=True, help="Name of a recipe in recipes/.")
RUNS = click.option("--runs", default="runs", show_default=True, type=FOLDER, help="Folder that contains the runs.")
ENGINE = click.option(
    "--engine",
    default="auto",
    show_default=True,
    envvar="ENGINE",
    help="auto, vllm, embedded, a base URL, or several with commas between.",
)
OVERLAY = click.option(
    "--overlay", default="", type=words, help="Overlays to apply to the recipe: names or paths, separated by spaces."
)
DATA = click.option("--data", default="", callback=hand_on, help="Folder with evaluation sets, in place of the hub.")
CLUSTER = click.option(
    "--cluster",
    default="",
    help="Ray cluster to spread the work over: auto, or ray://host:port (default: this machine).",
)
INSTRUCT = click.option(
    "--instruct", default="", help="Another instruct checkpoint: a folder, a hub id, or `instruct-0` of the run."
)
THINKING = click.option(
    "--thinking", default="", help="Another thinking checkpoint: a folder, a hub id, or `thinking-1` of the run."
)


PRICE = click.option(
    "--price-per-hour", default="", envvar="PRICE_PER_HOUR", help="Of this machine, for cost estimates and the report."
)


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command what runs are told besides their settings, as `given`."""

    @together(
        click.option(
            "--keep", default="", envvar="KEEP", help="Iterations that keep their weights: all, last, none or a number."
        ),
        PRICE,
        DATA,
    )
    @functools.wraps(function)
    def call(*, keep: str, price_per_hour: str, data: str, **others: Any) -> None:
        function(given=Given(keep=keep, price=price_per_hour, data=data), **others)

    return call


WHOSE = (
    DOMAIN,
    RUNS,
    click.option("--iteration", default=1, show_default=True, type=ITERATION),
    INSTRUCT,
    THINKING,
    OVERLAY,
    click.option("--out", type=FOLDER, help="Folder for the results, instead of the iteration of the run."),
)


def of_pair(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the pair that it works on, as `pair`: that of a run's iteration, or any two checkpoints."""
    return together(
        *WHOSE,
        click.option("--seed", default=0, show_default=True, type=SEED, help="Used if there is no run."),
        ENGINE,
        click.option("--limit", type=number, help="Evaluate on the first so many questions only."),
        DATA,
        CLUSTER,
    )(_with_pair(function))


def of_served(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `of_pair`, for a command that evaluates nothing; further options may be vLLM's."""
    return together(*WHOSE)(_with_pair(function, {"seed": 0, "engine": "auto", "limit": None, "data": ""}))


def _with_pair(function: Callable[..., Any], fixed: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(**options: Any) -> None:
        from dataclasses import fields

        from thinkswitch_plugin.search.pair import PairOptions

        options |= fixed or {}
        pair = PairOptions(
            **{field.name: options.pop(field.name) for field in fields(PairOptions) if field.name in options}
        )
        function(pair=pair, **options)

    return call


MODE = click.option(
    "--mode",
    type=click.Choice(["instruct", "thinking"]),
    default="instruct",
    show_default=True,
    help="Mode in which it is asked: with this checkpoint's tokenizer and chat template. Those of thinking may open the trace and so hide the transition.",
)

# How candidates made of the pair are asked.
of_candidates = together(
    click.option(
        "--task",
        default="",
        help="Another lm-eval task than the recipe's, with that task's token budget: thinkswitch_ifeval, gsm8k, …",
    ),
    MODE,
    click.option("--sampling", default="", help='Temperature/top-p, such as "0.6/0.95 0.7/0.8".'),
    click.option("--samples", type=number, help="k samples a question (default: the task's own)."),
)
