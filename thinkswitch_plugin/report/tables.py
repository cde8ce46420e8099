"""The tables of a report: Markdown, the terminal, and the cells that the page shows too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from thinkswitch_plugin import console
from thinkswitch_plugin.run import MODES
from thinkswitch_plugin.run.folder import EVALUATED


def percent(share: float) -> str:
    """`87.3 %`."""
    return f"{100 * share:.1f} %"


def interval(limits: Sequence[float]) -> str:
    """A 95 % interval in per cent: `84.6–90.2`."""
    return "–".join(f"{100 * limit:.1f}" for limit in limits)


def headline(report: dict[str, Any]) -> str:
    """What the run came to, in one sentence."""
    first, last = report["iterations"][0], report["iterations"][-1]
    k = last["iteration"]
    samples = last["instruct"]["k"]
    parts = []
    for mode in MODES:
        before, after = first[mode], last[mode]
        verdict = last["paired"][mode][-1]["verdict"]
        parts.append(
            f"{mode} {'gets' if samples == 1 else f'has a Mean@{samples} of'} {100 * after['mean@k']:.1f} %"
            f"{' right' if samples == 1 else ''} ({100 * before['mean@k']:.1f} % before, {verdict}) "
            f"with {after['tokens']:.1f} tokens an answer"
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
            change = 100 * (s["mean@k"] - first[EVALUATED[name][1]]["mean@k"])
            yield [
                str(entry["iteration"]),
                name,
                percent(s["mean@k"]),
                interval(s["ci95"]),
                "" if entry is first else f"{change:+z.1f}",
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
        "accuracy" if k == 1 else f"Mean@{k}",
        "95 % interval",
        "change",
        *([f"Pass@{k}", f"Vote@{k}"] if k > 1 else []),
        "tokens",
        "think ratio",
        "answered",
        "truncated",
    ]


MADE = ["iteration", "prompts", "pairs kept", "dropped", "selection", "λ", "think ratio at λ", "σ", "median angle"]


def markdown(report: dict[str, Any]) -> str:
    """`report.md`: what changed, what was trained on, how it was rebuilt, how long it took."""
    iterations = report["iterations"]
    n, k = iterations[0]["instruct"]["n"], iterations[0]["instruct"]["k"]
    seconds = (
        [str(e["iteration"]), ", ".join(f"{name} {s:.0f}" for name, s in e["seconds"].items())] for e in iterations
    )
    lines = [
        f"# {report['domain']}, seed {report['seed']}",
        "",
        headline(report),
        "",
        f"{n} held-out questions, {k} sample{'s' if k > 1 else ''} a question, engine {report['engine']}. "
        "Change is in percentage points against iteration 0; see below the tables if it is more than noise."
        + about_hybrid(report),
        "",
        *console.table(header(report), rows(report)),
        "",
        *console.table(MADE, (_made(entry) for entry in iterations[1:])),
        "",
        *comparisons(report),
        "",
        *console.table(["iteration", "seconds by stage"], seconds),
        "",
        f"In all {3600 * report['cost']['hours']:.0f} s of stages. "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + ".",
        "",
    ]
    return "\n".join(lines)


def comparisons(report: dict[str, Any]) -> list[str]:
    """Every iteration against the one before and against iteration 0, a list item each."""
    return [
        f"- {mode}, iteration {entry['iteration']} against {found['against']}: {found['sentence']}"
        for entry in report["iterations"][1:]
        for mode in entry["paired"]
        for found in entry["paired"][mode]
    ]


def _made(entry: dict[str, Any]) -> list[str]:
    pairs, merge = entry["pairs"], entry["merge"]
    dropped = ", ".join(f"{n} {reason}" for reason, n in pairs["dropped"].items()) or "none"
    return [
        str(entry["iteration"]),
        str(pairs["prompts"]),
        str(pairs["kept"]),
        dropped,
        pairs["selection"],
        f"{merge['lambda']:g}",
        f"{merge['think_ratio']:.3f}",
        f"{merge['sigma']:.4f}",
        f"{merge['angle']['median']:.4f}",
    ]


def print_table(report: dict[str, Any]) -> None:
    """The headline table on the terminal."""
    console.print_table(
        f"{report['domain']}, seed {report['seed']}: {report['iterations'][0]['instruct']['n']} held-out questions",
        header(report),
        rows(report),
        left=("checkpoint",),
    )
