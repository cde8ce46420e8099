"""Losses and selections of pairs on the same generations, with the controls: conditions of one finished run.

    answers        the pairs as they are, by axolotl
    distribution   the thinking checkpoint's distribution over each token of an answer, by axolotl's KD trainer
    on-policy      instruct answers, the thinking checkpoint with its trace scores the tokens; see `on_policy`

The run must have asked for distributions and for several samples, as `losses.overlay.yaml` has it. Each condition trains
the starting instruct checkpoint once more, for as many steps of as many rows as the run's own training of iteration 1.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from experiments.controls import judge, learn, run_control, true_labels
from experiments.rehearse_figures import seconds_of_training
from thinkswitch_plugin import console, files
from thinkswitch_plugin.data import answers
from thinkswitch_plugin.data.pairs import write_pairs
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.loop import work
from thinkswitch_plugin.run import Run, locked
from thinkswitch_plugin.run.hashes import Hashes
from thinkswitch_plugin.training.layout import rows_of_a_step

LOSSES = ("answers", "distribution", "on-policy")
MARGIN = 0.6  # of the samples must give the majority answer
SELECTIONS: dict[str, dict[str, Any]] = {
    "first": {"selection": "first"},
    "all": {"selection": "all"},
    "vote": {"selection": "vote"},
    "margin": {"selection": "vote", "min_agreement": MARGIN},
}
CONTROLS = ("own-answers", "shuffled", "true-labels", "undistilled")


def run_losses(run: Run) -> None:
    """Train, merge and evaluate every condition into `controls/LOSS-SELECTION/`, and the controls; finished ones are kept.

    Raises `ThinkSwitchError` if the run has no distributions, or only one sample a prompt.
    """
    work.require_finished(run, 1)
    keys = run.recipe.keys
    if keys.loss != "distribution" or keys.sampling.samples < 2:
        raise ThinkSwitchError(
            f"{run.folder} has no distributions, or one sample a prompt; begin another run with "
            "OVERLAY=experiments/losses.overlay.yaml (make losses)."
        )
    for loss, selection in itertools.product(LOSSES, SELECTIONS):
        here = run.folder / "controls" / f"{loss}-{selection}"
        if not finished(run, here):
            with locked(run.folder):
                do_condition(run, here, loss, selection)
    for name in CONTROLS:
        if not finished(run, run.folder / "controls" / name) and applies(run, name):
            run_control(run, name)


def finished(run: Run, here: Path) -> bool:
    """Whether a condition or control has its result: of the run's present iteration 1, tasks and number of steps."""
    if not (here / "result.json").is_file():
        return False
    result = files.read_json(here / "result.json")
    if result.get("tasks") != [*run.recipe.keys.evaluation.tasks]:
        return False
    if here.name not in CONTROLS and result.get("cost") != equal_cost(run):
        return False
    return bool(result["beside"] == Hashes(run.folder).of(run.iteration(1) / result["mode"]))


def applies(run: Run, name: str) -> bool:
    """Whether a control can be done on this domain; it is said why if not."""
    if name == "undistilled" and run.recipe.keys.pair.hybrid:
        console.say("[control undistilled] left out: a hybrid interpolated with itself is itself")
        return False
    if name == "true-labels":
        try:
            true_labels(run, [row for _, row in files.read_jsonl(run.iteration(1) / "pairs.jsonl")])
        except ThinkSwitchError as problem:
            console.say(f"[control true-labels] left out: {problem}")
            return False
    return True


def do_condition(run: Run, here: Path, loss: str, selection: str) -> None:
    """One condition from its pairs to `here/result.json`; what a killed attempt left is removed."""
    title = f"{loss}, {selection}" + (f" (at least {MARGIN:g} of the samples agree)" if selection == "margin" else "")
    console.say(f"[control {here.name}] {title}")
    files.remove(here)
    here.mkdir(parents=True)
    first, keys = run.iteration(1), run.recipe.keys
    labels = type(keys.answers).model_validate({"kind": keys.answers.kind, **SELECTIONS[selection]})
    pairs = here / ("rationales.jsonl" if loss == "on-policy" else "pairs.jsonl")
    counted = write_pairs(
        first / "requests.jsonl",
        run.generations(1),
        pairs,
        keys=labels,
        keep_trace=loss == "on-policy",
        convention=keys.convention,
    )
    console.say(f"  {counted.summary()}")
    if (loss, labels.selecting()) == (keys.loss, keys.answers.selecting()):
        console.say("  it is the run's own iteration 1")
        (here / "instruct").symlink_to((first / "instruct").resolve())
        log = first / "logs" / "train.log"
    else:
        learn(run, here, loss, **equal_cost(run))
        log = here / "logs" / "train.log"
    more = {
        "cost": equal_cost(run),
        "pairs": counted.kept,
        "dropped": counted.as_json()["dropped"],
        "labels_right": labels_right(run, pairs),
    }
    judge(run, here, "instruct", title, **more, seconds=round(seconds_of_training(log), 1))


def equal_cost(run: Run) -> dict[str, Any]:
    """The keys of axolotl with which every condition has as many steps as the run's own training of iteration 1."""
    axolotl, kept = run.recipe.axolotl, files.read_json(run.iteration(1) / "pairs.json")["kept"]
    steps = math.ceil(kept * float(axolotl.get("num_epochs") or 1) / rows_of_a_step(axolotl))
    if "warmup_steps" in axolotl:
        return {"max_steps": steps}
    if "warmup_ratio" in axolotl:
        return {"max_steps": steps, "warmup_ratio": None, "warmup_steps": int(float(axolotl["warmup_ratio"]) * steps)}
    return {"max_steps": steps, "warmup_steps": min(int(0.03 * steps), 100)}  # axolotl's default, of these steps


def labels_right(run: Run, pairs: Path) -> float | None:
    """The share of the pairs whose answer is right; None if the right answers are not known."""
    rows = [row for _, row in files.read_jsonl(pairs)]
    kind = run.recipe.keys.answers.kind
    try:
        truth = [answers.gold(kind, text) for text in true_labels(run, rows)]
    except ThinkSwitchError:
        return None
    said = [answers.extract(kind, row["messages"][-1]["content"]) for row in rows]
    return sum(w is not None and answers.is_right(kind, s, w) for s, w in zip(said, truth, strict=True)) / len(rows)
