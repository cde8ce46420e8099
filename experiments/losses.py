"""Answers against distributions, and the selections of pairs, on the same generations: controls of one finished run.

The run must have asked for distributions and for several samples, as `losses.overlay.yaml` has it. Each condition trains
the starting instruct checkpoint once more, on pairs that are built from the run's generations of iteration 1.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

from experiments.controls import judge, learn
from thinkswitch_plugin import console, files
from thinkswitch_plugin.data.pairs import write_pairs
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.loop import work
from thinkswitch_plugin.run import Run, locked

LOSSES = ("answers", "distribution")
MARGIN = 0.6  # of the samples must give the majority answer
SELECTIONS: dict[str, dict[str, Any]] = {
    "first": {"selection": "first"},
    "all": {"selection": "all"},
    "vote": {"selection": "vote"},
    "margin": {"selection": "vote", "min_agreement": MARGIN},
}


def run_losses(run: Run) -> None:
    """Train, merge and evaluate every condition into `controls/LOSS-SELECTION/`; those that are there are kept.

    Raises `ThinkSwitchError` if the run has no distributions, or only one sample a prompt.
    """
    work.require_finished(run, 1)
    keys = run.recipe.keys
    if keys.loss != "distribution" or keys.sampling.samples < 2:
        raise ThinkSwitchError(
            f"{run.folder} has no distributions, or one sample a prompt; begin another run with "
            "OVERLAY=experiments/losses.overlay.yaml (make losses)."
        )
    for loss, name in itertools.product(LOSSES, SELECTIONS):
        here = run.folder / "controls" / f"{loss}-{name}"
        if (here / "result.json").is_file():
            continue
        title = f"{loss}, {name}" + (f" (at least {MARGIN:g} of the samples agree)" if name == "margin" else "")
        with locked(run.folder):
            console.say(f"[control {here.name}] {title}")
            files.remove(here)
            here.mkdir(parents=True)
            counted = write_pairs(
                run.iteration(1) / "requests.jsonl",
                run.generations(1),
                here / "pairs.jsonl",
                keys=type(keys.answers).model_validate({"kind": keys.answers.kind, **SELECTIONS[name]}),
                convention=keys.convention,
            )
            started = time.monotonic()
            learn(run, here, loss)
            judge(run, here, "instruct", title, pairs=counted.kept, seconds=round(time.monotonic() - started))
