"""The tables beside the headline: parts of the questions, what else changed (the guard tasks), the control experiments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from thinkswitch_plugin.judging.paired import MORE, p_value
from thinkswitch_plugin.report import tables
from thinkswitch_plugin.report.tables import evaluated, interval, percent, points, points_span


@dataclass(frozen=True)
class Table:
    """A table with a sentence about it, for the terminal, `report.md` and the page.

    Attributes:
        name: of its place in the page.
        words: the first columns, which hold words.
    """

    name: str
    title: str
    sentence: str
    header: tuple[str, ...]
    rows: list[list[str]]
    words: int


def shown(report: dict[str, Any]) -> dict[str, Any]:
    """What the terminal, `report.md` and the page show of a report."""
    return {
        "report": report,
        "headline": tables.headline(report),
        "hybrid": tables.about_hybrid(report),
        "header": tables.header(report),
        "rows": list(tables.rows(report)),
        "beside": beside(report),
    }


def beside(report: dict[str, Any]) -> list[Table]:
    """The tables that a report has rows for."""
    of_guard = (
        "guard task",
        "checkpoint",
        "iteration",
        "accuracy",
        "before",
        "change",
        "95 % interval",
        "p",
        "verdict",
    )
    of_controls = ("control", "checkpoint", "accuracy", "95 % interval", "the run", "control − run", "interval of that")
    every = (
        parts_table(report),
        Table(
            "guard",
            "What else changed",
            guard_sentence(report),
            (*of_guard, "tokens"),
            list(guard_rows(report)),
            2,
        ),
        Table(
            "controls",
            "Controls",
            "Each control experiment against the run's own checkpoint of iteration 1, question by question.",
            (*of_controls, "verdict"),
            list(control_rows(report)),
            2,
        ),
    )
    return [table for table in every if table.rows]


def parts_table(report: dict[str, Any]) -> Table:
    """The accuracy of every checkpoint on each stratum of the questions; no rows if they name none."""
    parts = report["iterations"][0]["instruct"].get("strata", {})
    names = (f"{name.replace('_', ' ')} ({part['n']})" for name, part in parts.items())
    rows = [
        [str(entry["iteration"]), name, *(percent(found["strata"][part]["mean@k"]) for part in parts)]
        for entry in report["iterations"]
        for name, found in evaluated(entry).items()
    ]
    sentence = "Accuracy on each part of the held-out questions, and how many there are."
    return Table(
        "parts", "Parts of the questions", sentence, ("iteration", "checkpoint", *names), rows if parts else [], 2
    )


def guard_rows(report: dict[str, Any]) -> Iterator[list[str]]:
    """Every guard task, checkpoint and iteration against iteration 0."""
    for task, k, name, found in guarded(report):
        compared, tokens = found["paired"], found["paired"]["tokens"]
        yield [
            task,
            name,
            str(k),
            percent(found["mean@k"]),
            percent(found["mean@k"] - compared["difference"]),
            points(compared["difference"]),
            points_span(compared["ci95"]),
            p_value(compared["p"]),
            compared["verdict"],
            f"{tokens['before']:.1f} → {tokens['after']:.1f}",
        ]


def guard_sentence(report: dict[str, Any]) -> str:
    """What else the last iteration changed, in one sentence."""
    last = report["iterations"][-1]["iteration"]
    changed = [
        f"{name} on {task} {points(found['paired']['difference'])} points ({points_span(found['paired']['ci95'])})"
        for task, k, name, found in guarded(report)
        if k == last and found["paired"]["verdict"] == MORE
    ]
    start = f"Outside the domain, iteration {last} against iteration 0"
    return f"{start}: {'; '.join(changed) or 'nothing'} changed by more than noise."


def guarded(report: dict[str, Any]) -> Iterator[tuple[str, int, str, dict[str, Any]]]:
    """Guard task, iteration, checkpoint and figures from iteration 1 on, ordered by task."""
    entries = report["iterations"][1:]
    for task in report["iterations"][0].get("guard", {}):
        for entry in entries:
            yield from ((task, entry["iteration"], name, found) for name, found in entry["guard"][task].items())


def control_rows(report: dict[str, Any]) -> Iterator[list[str]]:
    """Every control experiment beside the run's own checkpoint."""
    for found in report.get("controls", []):
        compared = found["paired"]
        yield [
            found["title"],
            found["mode"],
            percent(found["mean@k"]),
            interval(found["ci95"]),
            percent(found["mean@k"] - compared["difference"]),
            points(compared["difference"]),
            points_span(compared["ci95"]),
            compared["verdict"],
        ]
