"""What else changed: the guard tasks, which lie outside the domain, compared with iteration 0 question by question.

They are asked together with the domain's task, so their answers lie in the same files of an evaluation. A task of
ours is graded by its kind of answer, as everywhere; any other by lm-eval, on answers without their traces.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thinkswitch_plugin import files
from thinkswitch_plugin.args import ThinkSwitchKeys
from thinkswitch_plugin.data.task_files import kind_of_task
from thinkswitch_plugin.data.traces import LENGTH
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging import paired
from thinkswitch_plugin.judging.figures import Sample, summarize
from thinkswitch_plugin.judging.samples import Row, as_stored, graded, samples_file
from thinkswitch_plugin.run import Run


def against_start(run: Run, k: int, name: str) -> dict[str, dict[str, Any]]:
    """The figures of every guard task by its name; from iteration 1 on with ``paired``, as `paired.compare` finds it.

    Args:
        name: what was evaluated, a name of `EVALUATED`.

    Raises `ThinkSwitchError` if an evaluation is missing or damaged.
    """

    def of(j: int, evaluated: str, task: str) -> list[Sample]:
        folder, (mode, _) = run.iteration(j) / "eval" / evaluated, run.evaluated(j)[evaluated]
        return samples_of_guard(folder, task, run.recipe.keys, run.checkpoint(mode, j))

    _, asked_as = run.evaluated(k)[name]
    found = {}
    for task in run.recipe.keys.evaluation.guard:
        now = of(k, name, task)
        found[task] = summarize(now)
        if k:
            found[task]["paired"] = paired.compare(of(0, asked_as, task), now)
    return found


def require_kept(run: Run, k: int, name: str) -> None:
    """Raise `ThinkSwitchError` if a guard task fell by more than the recipe's margin, beyond noise."""
    margin = run.recipe.keys.evaluation.guard_margin
    if margin is None or not k:
        return
    for task, figures in against_start(run, k, name).items():
        low, high = figures["paired"]["ci95"]
        if high < -margin:
            raise ThinkSwitchError(
                f"The guard task {task} fell by more than `thinkswitch.evaluation.guard_margin: {margin:g}` allows: {name} "
                f"of iteration {k} has {100 * figures['mean@k']:.1f} %, {100 * figures['paired']['difference']:+z.1f} points "
                f"against iteration 0 (95 % interval {100 * low:+z.1f} to {100 * high:+z.1f}). The pair of iteration {k - 1} "
                "is kept; train less (`learning_rate`, `num_epochs`), raise the margin, or remove the guard task."
            )


def samples_of_guard(folder: Path, task: str, keys: ThinkSwitchKeys, checkpoint: str) -> list[Sample]:
    """The graded samples of a guard task in the folder of an evaluation; see `samples.graded`.

    Raises `ThinkSwitchError` if they are missing or damaged.
    """
    if kind := kind_of_task(task):
        return list(graded(folder, task, checkpoint, kind, keys.convention, guard=True)[1])
    return by_lm_eval(folder, task)


def by_lm_eval(folder: Path, task: str) -> list[Sample]:
    """One sample a question, right or wrong by lm-eval: its last filter, and the first metric that is 0 or 1 everywhere.

    Of several filters lm-eval's tasks name the most lenient last (`strict-match`, `flexible-extract`).

    Raises `ThinkSwitchError` if the task has no such metric.
    """
    path = samples_file(folder, task)
    ends_of = as_stored(folder, path, task)
    rows = [(f"{path}, line {number}", row) for number, row in files.read_jsonl(path)]
    chosen = rows[-1][1].get("filter") if rows else None
    rows = [(where, row) for where, row in rows if row.get("filter") == chosen]
    named = [str(name) for name in (rows[0][1].get("metrics") or [] if rows else [])]
    metric = next((name for name in named if all(row.get(name) in (0, 1) for _, row in rows)), None)
    if metric is None:
        raise ThinkSwitchError(
            f"lm-eval's task {task} has no metric that is right or wrong for each question "
            f"(it has {', '.join(named) or 'none'}); remove it from `thinkswitch.evaluation.guard`, or name another."
        )
    found = []
    for where, row in rows:
        end, right = ends_of(Row.of(row, where))[0], bool(row[metric])
        found.append(Sample(row["doc_id"], [right], [str(right)], [False], [end.tokens], [end.finish_reason == LENGTH]))
    return found
