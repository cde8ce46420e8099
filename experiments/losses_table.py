"""The table of `make losses`: every condition over all seeds, question by question, as Markdown.

The seeds answer the same held-out questions. A question's score is its mean over the seeds, and the intervals are those of
a mean over questions (bootstrap); differences are paired by question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.losses import CONTROLS, LOSSES, SELECTIONS, finished
from thinkswitch_plugin import console, files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.figures import Sample, summarize
from thinkswitch_plugin.judging.guard import samples_of_guard
from thinkswitch_plugin.judging.paired import compare
from thinkswitch_plugin.judging.samples import samples_of
from thinkswitch_plugin.report.tables import interval, percent, points, points_span
from thinkswitch_plugin.run import Run, open_run

DEFAULT = "answers-first"  # the recipes' loss and selection, with which every other condition is compared
HEADER = ("condition", "checkpoint", "labels right", "pairs", "accuracy (95 %)", "of each seed")


class Condition(NamedTuple):
    """One row of the table: what was evaluated in every run, and the row that it is compared with."""

    title: str
    mode: str
    folder: Callable[[Run], Path]  # holds `eval/MODE`
    beside: str


def conditions(run: Run) -> dict[str, Condition]:
    """The rows by name, those of the run first; controls that do not apply to the domain are left out."""
    found = {
        "start": Condition("before (iteration 0)", "instruct", lambda run: run.iteration(0), DEFAULT),
        "thinking-0": Condition("before (iteration 0)", "thinking", lambda run: run.iteration(0), "thinking-1"),
        "thinking-1": Condition("rebuilt (iteration 1)", "thinking", lambda run: run.iteration(1), "thinking-1"),
    }
    names = [*(f"{loss}-{selection}" for loss in LOSSES for selection in SELECTIONS), *CONTROLS]
    for name in names:
        if not (path := run.folder / "controls" / name / "result.json").is_file():
            if name in CONTROLS:
                continue
            raise ThinkSwitchError(f"{path} does not exist; `make losses` goes on from what is there.")
        if not finished(run, path.parent):
            raise ThinkSwitchError(
                f"{path} is of an earlier iteration 1, or of other tasks; `make losses` makes it again."
            )
        about = files.read_json(path)

        def folder(run: Run, name: str = name) -> Path:
            return run.folder / "controls" / name

        beside = DEFAULT if about["mode"] == "instruct" else "thinking-1"
        found[name] = Condition(about["title"], about["mode"], folder, beside)
    return found


def pooled(each: Sequence[Sequence[Sample]]) -> list[Sample]:
    """The samples of several runs as those of one: every question has the completions of all of them.

    Raises `ThinkSwitchError` if they did not answer the same questions.
    """
    if len({tuple(sorted(sample.doc_id for sample in samples)) for samples in each}) > 1:
        raise ThinkSwitchError("The runs did not answer the same questions; give runs of one domain and task.")
    found: dict[int, Sample] = {}
    for sample in (sample for samples in each for sample in samples):
        have = found.setdefault(sample.doc_id, Sample(sample.doc_id))
        for name in ("correct", "found", "closed_trace", "tokens", "truncated"):
            getattr(have, name).extend(getattr(sample, name))
    return [found[doc_id] for doc_id in sorted(found)]


def print_losses(folders: Sequence[Path]) -> None:
    """Print the table of these runs. Raises `ThinkSwitchError` if a condition is missing in one of them."""
    runs = [open_run(folder) for folder in folders]
    guards = runs[0].recipe.keys.evaluation.guard
    n = len(samples_of(runs[0].iteration(0) / "eval" / "instruct", runs[0].recipe.keys, ""))
    seeds = ", ".join(str(run.seed) for run in runs)
    console.say(f"### {runs[0].recipe.keys.domain}: seeds {seeds}, {n} held-out questions, engine {runs[0].engine}\n")
    more = [f"{task}, change against iteration 0" for task in guards]
    header = [*HEADER, "against answers, first", "p", "tokens", *more, "training s"]
    console.say("\n".join(console.table(header, rows(runs, guards))) + "\n")


def rows(runs: Sequence[Run], guards: Sequence[str]) -> Iterator[list[str]]:
    """The cells of every condition."""
    known = [conditions(run) for run in runs]
    named = {name: known[0][name] for name in known[0] if all(name in found for found in known)}
    scores = {name: [scored(run, one) for run in runs] for name, one in named.items()}
    for name, one in named.items():
        mine, other = pooled(scores[name]), pooled(scores[one.beside])
        figures, compared = summarize(mine), compare(other, mine)
        alone = name == one.beside
        stored = [one.folder(run) / "result.json" for run in runs]
        results = [files.read_json(path) if path.is_file() else {} for path in stored]
        against = "" if alone else f"{points(compared['difference'])} ({points_span(compared['ci95'])})"
        yield [
            one.title,
            one.mode,
            mean(results, "labels_right", percent),
            mean(results, "pairs", lambda value: f"{value:.0f}"),
            f"{percent(figures['mean@k'])} ({interval(figures['ci95'])})",
            " / ".join(f"{100 * summarize(samples)['mean@k']:.1f}" for samples in scores[name]),
            against,
            "" if alone else f"{compared['p']:.3f}",
            f"{figures['tokens']:.1f}",
            *(changed(runs, one, task) for task in guards),
            mean(results, "seconds", lambda value: f"{value:.0f}"),
        ]


def scored(run: Run, one: Condition, task: str | None = None) -> list[Sample]:
    """The graded samples of a condition of a run: of the domain's task, or of a guard task."""
    folder, keys, checkpoint = one.folder(run), run.recipe.keys, str(one.folder(run) / one.mode)
    if task is None:
        return samples_of(folder / "eval" / one.mode, keys, checkpoint)
    return samples_of_guard(folder / "eval" / one.mode, task, keys, checkpoint)


def changed(runs: Sequence[Run], one: Condition, task: str) -> str:
    """How a guard task stands after a condition, against the checkpoint of the same mode at iteration 0."""
    start = Condition("", one.mode, lambda run: run.iteration(0), "")
    before, after = (pooled([scored(run, each, task) for run in runs]) for each in (start, one))
    share, compared = percent(summarize(after)["mean@k"]), compare(before, after)
    if one.folder(runs[0]) == runs[0].iteration(0):
        return share
    return f"{share}, {points(compared['difference'])} ({points_span(compared['ci95'])})"


def mean(results: Sequence[dict[str, Any]], name: str, shown: Callable[[float], str]) -> str:
    """A figure of a condition over the seeds; empty if it has none."""
    values = [result[name] for result in results if result.get(name) is not None]
    return shown(sum(values) / len(values)) if values else ""
