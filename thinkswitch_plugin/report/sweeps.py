"""The figures of a sweep, from `sweep.json`: the table, its title, and λ* in words."""

from __future__ import annotations

from typing import Any

from thinkswitch_plugin.report import templates
from thinkswitch_plugin.report.tables import interval, percent

HEADER = ["λ", "Mean@k", "95 %", "Pass@k", "Vote@k", "tokens", "think ratio", "truncated"]


def table_rows(result: dict[str, Any], curve: dict[str, Any]) -> list[list[str]]:
    """One row a point of one sampling setting; λ* carries a star."""
    best = curve["sweet_spot"]["lambda"]
    return [
        [
            f"{p['lambda']:g}{' ★' if p['lambda'] == best else ''}",
            percent(p["mean@k"]),
            interval(p["ci95"]),
            percent(p["pass@k"]),
            percent(p["vote@k"]),
            f"{p['tokens']:.1f}",
            f"{p['think_ratio']:.3f}",
            percent(p["truncated"]),
        ]
        for p in points_of(result, curve)
    ]


def points_of(result: dict[str, Any], curve: dict[str, Any]) -> list[dict[str, Any]]:
    """The points of one sampling setting, λ ascending."""
    keys = ("temperature", "top_p", "samples")
    return [p for p in result["points"] if all(p.get(key) == curve.get(key) for key in keys)]


def sentence(curve: dict[str, Any]) -> str:
    """λ* in words."""
    spot = curve["sweet_spot"]
    low, high = spot["interval"]
    text = f"λ* = {spot['lambda']:g} (95 % {low:g} to {high:g}): {100 * spot['mean@k']:.1f} % at {spot['tokens']:.1f} tokens"
    if spot["thinking"]:
        there = spot["thinking"]
        text += (
            f"; λ = 1: {100 * there['mean@k']:.1f} % at {there['tokens']:.1f} tokens "
            f"(difference {100 * there['difference']:+z.1f} points"
        )
        if "corrected" in there:  # sweeps of earlier versions have none
            below, above = (100 * v for v in there["corrected_ci95"])
            text += (
                f", {100 * there['corrected']:+z.1f} corrected for the choice of λ* on the same questions, "
                f"95 % {below:+z.1f} to {above:+z.1f}"
            )
        text += ")"
    return text + "."


def title_of(result: dict[str, Any]) -> str:
    """What was swept, in one line."""
    n = result["points"][0]["n"]
    every = " and ".join(str(k) for k in sorted({p["k"] for p in result["points"]}))
    where = "" if result["iteration"] is None else f", iteration {result['iteration']}"
    return (
        f"{result['domain']}, seed {result['seed']}{where}: {result['method']}, {n} questions × {every}, "
        f"template of {result['template']}"
    )


def markdown(result: dict[str, Any]) -> str:
    """`sweep.md`."""
    functions = {"rows": table_rows, "sentence": sentence}
    return templates.markdown("sweep.md.j2", result=result, title=title_of(result), header=HEADER, **functions)
