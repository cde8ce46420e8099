"""The tables of a report: Markdown, the terminal, and the cells that the page shows too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from thinkswitch_plugin.run import MODES
from thinkswitch_plugin.run.folder import EVALUATED


def percent(share: float) -> str:
    """`87.3 %`."""
    return f"{100 * share:.1f} %"


def interval(limits: Sequence[float]) -> str:
    """A 95 % interval in per cent: `84.6–90.2`."""
    return "–".join(f"{100 * limit:.1f}" for limit in limits)


def points(share: float) -> str:
    """A difference in percentage points: `+37.8`."""
    return f"{100 * share:+z.1f}"


def points_span(limits: Sequence[float]) -> str:
    """The interval of a difference, in percentage points: `+33.1 to +42.3`."""
    return " to ".join(map(points, limits))


def score_of(report: dict[str, Any]) -> str:
    """What the score of one answer a question is called: `accuracy`, or `agreement` if there are no gold answers."""
    return str(report.get("score", "accuracy"))


def headline(report: dict[str, Any]) -> str:
    """What the run came to, in one sentence."""
    first, last = report["iterations"][0], report["iterations"][-1]
    k = last["iteration"]
    samples = last["instruct"]["k"]
    right = " right" if score_of(report) == "accuracy" else " as the first thinking checkpoint mostly answers"
    parts = []
    for mode in MODES:
        before, after = first[mode], last[mode]
        against_start = last["paired"][mode][-1]
        verdict, longer = against_start["verdict"], against_start["tokens"]
        parts.append(
            f"{mode} {'gets' if samples == 1 else f'has a Mean@{samples} of'} {100 * after['mean@k']:.1f} %"
            f"{right if samples == 1 else ''} ({100 * before['mean@k']:.1f} % before, {verdict}) "
            f"with {after['tokens']:.1f} tokens an answer ({before['tokens']:.1f} before, {longer['verdict']})"
        )
    n = last["instruct"]["n"]
    return f"After {k} iteration{'' if k == 1 else 's'}, on {n} held-out questions: {'; '.join(parts)}."


def evaluated(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of an iteration by the names of `EVALUATED`; those of a hybrid are by checkpoint and mode."""
    names = entry.get("paired", MODES)
    return {name: entry[name] if name in MODES else entry[EVALUATED[name][0]][EVALUATED[name][1]] for name in names}


def about_hybrid(report: dict[str, Any]) -> str:
    """What the further rows of a hybrid are; empty for a pair."""
    if report["iterations"][-1]["paired"].keys() <= set(MODES):
        return ""
    return (
        " The starting checkpoint has both modes. instruct-as-thinking is the distilled checkpoint in thinking mode, "
        "thinking-as-instruct the rebuilt one in instruct mode."
    )


def rows(report: dict[str, Any]) -> Iterator[list[str]]:
    """The headline table, a row a checkpoint, or a row a mode of each checkpoint of a hybrid."""
    first = report["iterations"][0]
    for entry in report["iterations"]:
        for name, s in evaluated(entry).items():
            yield [
                str(entry["iteration"]),
                name,
                percent(s["mean@k"]),
                interval(s["ci95"]),
                "" if entry is first else points(s["mean@k"] - first[EVALUATED[name][1]]["mean@k"]),
                *([percent(s[name]) for name in ("pass@k", "vote@k")] if s["k"] > 1 else []),
                f"{s['tokens']:.1f}",
                f"{s['think_ratio']:.3f}",
                percent(s["answered"]),
                percent(s["truncated"]),
            ]


def header(report: dict[str, Any]) -> list[str]:
    """The names over `rows`."""
    k = report["iterations"][0]["instruct"]["k"]
    return [
        "iteration",
        "checkpoint",
        score_of(report) if k == 1 else f"Mean@{k}",
        "95 % interval",
        "change",
        *([f"Pass@{k}", f"Vote@{k}"] if k > 1 else []),
        "tokens",
        "think ratio",
        "answered",
        "truncated",
    ]
