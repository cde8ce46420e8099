"""The figures of a report, sent to the trackers that axolotl's own keys choose: `use_wandb`, `mlflow_experiment_name`, …

axolotl logs each training; this adds one run for the loop, whose steps are the iterations:
`instruct/mean_at_k`, `thinking/tokens`, `merge/lambda`, `merge/tried/0/think_ratio`, `seconds/train`, …
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console
from thinkswitch_plugin.errors import reason

# accelerate's name of a tracker -> axolotl's switch for it, axolotl's key for the project, the tracker's word for a run's name
TRACKERS = {
    "wandb": ("use_wandb", "wandb_project", "name"),
    "mlflow": ("use_mlflow", "mlflow_experiment_name", "run_name"),
    "trackio": ("use_trackio", "trackio_project_name", "name"),
    "comet_ml": ("use_comet", "comet_project_name", ""),
    "tensorboard": ("use_tensorboard", "", ""),
}
PARTS = ("instruct", "thinking", "pairs", "merge", "guard", "seconds")


def figures(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a value, with its path. MLflow takes no `@` in a name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from figures(inner, f"{name}/{key}" if name else str(key).replace("@", "_at_"))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from figures(dict(enumerate(value)), name)
    elif isinstance(value, int | float):
        yield name.replace("@", "_at_"), float(value)


def log_report(report: dict[str, Any], keys: dict[str, Any], folder: Path) -> None:
    """Send a report to the chosen trackers; one that fails is named, and the report stays as it is.

    Args:
        report: what `report.json` holds.
        keys: axolotl's keys of the recipe.
        folder: of the run; TensorBoard's files go to `tensorboard/` in it.
    """
    chosen = [name for name, (switch, project, _) in TRACKERS.items() if keys.get(switch) or keys.get(project)]
    if not chosen:
        return
    try:
        kinds = _prepared(keys)
    except Exception as error:  # whatever axolotl's and accelerate's set-up raises
        console.say(f"  no tracker took the scores ({reason(error)}); `make report` sends them again.")
        return
    title = f"{report['domain']}-seed-{report['seed']}"
    for name in chosen:
        _, project, word = TRACKERS[name]
        options = {word: title} if word else {}
        if name == "tensorboard":
            options["logging_dir"] = str(folder / name)
        if name == "trackio" and keys.get("trackio_space_id"):
            options["space_id"] = keys["trackio_space_id"]
        try:
            tracker = kinds[name](title if name == "tensorboard" else keys.get(project) or "thinkswitch", **options)
            tracker.start()
            tracker.store_init_configuration({key: report[key] for key in ("domain", "seed", "engine")})
            for entry in report["iterations"]:
                found = dict(figures({part: entry[part] for part in PARTS if part in entry}))
                tracker.log(found, step=entry["iteration"])
            tracker.finish()
        except Exception as error:  # whatever a tracker's client and its server raise
            console.say(f"  {name} did not take the scores ({reason(error)}); `make report` sends them again.")
        else:
            console.say(f"  scores, λ and times logged to {name} as {title}")


def _prepared(keys: dict[str, Any]) -> dict[str, Any]:
    """accelerate's trackers by name, ready to be started as axolotl's keys say."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from axolotl.utils import comet_, mlflow_, trackio_, wandb_
    from axolotl.utils.dict import DictDefault

    # Server, mode and so on are set as for a training; the id of a training's own run is not.
    values = DictDefault({key: value for key, value in keys.items() if not key.endswith("_run_id")})
    for module in (wandb_, mlflow_, trackio_, comet_):
        getattr(module, f"setup_{module.__name__.rpartition('.')[2]}env_vars")(values)
    PartialState(cpu=True)
    return dict(LOGGER_TYPE_TO_CLASS)
