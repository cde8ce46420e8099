"""The tables of docs/interpolation.md: sweeps, layers, modules and baselines of several runs, as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.search import ablation

WORD = {0: "before", 1: "after 1"}


def print_interpolation(folders: list[Path]) -> None:
    """Print every table there is. Raises `ThinkSwitchError` if no folder holds a sweep."""
    sweeps = [files.read_json(path) for folder in folders for path in sorted(folder.glob("iter-*/sweep/sweep.json"))]
    if not sweeps:
        raise ThinkSwitchError(
            "None of these runs has been swept; run `make sweep ITERATION=0` and `make sweep ITERATION=1`."
        )
    first = sweeps[0]["points"][0]
    console.say(f"### Sweeps, {first['n']} questions, {first['k']} sample a question\n")
    console.say("Mean@k in % / think ratio / tokens.\n")
    weights = sorted({p["lambda"] for s in sweeps for p in s["points"]})
    header = ["λ", *(f"seed {s['seed']}, {_when(s)}" for s in sweeps)]
    console.say("\n".join(console.table(header, ([f"{w:g}", *(_cell(s, w) for s in sweeps)] for w in weights))) + "\n")
    console.say("### Stages and sweet spot\n")
    header = ["seed", "pair", "lower border", "middle", "upper border", "λ*", "at λ*", "at λ = 1", "difference, points"]
    console.say("\n".join(console.table(header, (_stages(s) for s in sweeps))) + "\n")
    for name in ("layers", "modules", "baselines"):
        found = [
            files.read_json(path)
            for folder in folders
            for path in sorted(folder.glob(f"iter-*/merges/{name}/merges.json"))
        ]
        if found:
            console.say(f"### {name.capitalize()}\n")
            console.say("Mean@k in % (95 %) / think ratio / tokens.\n")
            names = [row["layers"] or row["name"] for row in found[0]["merges"]]
            header = [ablation.header(found[0])[0], *(f"seed {m['seed']}, {_when(m)}" for m in found)]
            rows = ([n, *(_merge_cell(m["merges"][i]) for m in found)] for i, n in enumerate(names))
            console.say("\n".join(console.table(header, rows)) + "\n")


def _when(result: dict[str, Any]) -> str:
    k = result["iteration"]
    return "two checkpoints" if k is None else WORD.get(k, f"after {k}")


def _cell(sweep: dict[str, Any], weight: float) -> str:
    for p in sweep["points"]:
        if p["lambda"] == weight:
            return f"{100 * p['mean@k']:.1f} / {p['think_ratio']:.3f} / {p['tokens']:.1f}"
    return ""


def _merge_cell(row: dict[str, Any]) -> str:
    low, high = (100 * v for v in row["ci95"])
    return f"{100 * row['mean@k']:.1f} ({low:.0f}–{high:.0f}) / {row['think_ratio']:.2f} / {row['tokens']:.1f}"


def _stages(sweep: dict[str, Any]) -> list[str]:
    curve = sweep["curves"][0]
    borders = []
    for name in ("lower", "middle", "upper"):
        value, around = curve["stages"][name], curve["stages"][f"{name}_ci95"]
        borders.append("none" if value is None else f"{value:.2f} ({around[0]:.2f}–{around[1]:.2f})")
    spot = curve["sweet_spot"]
    low, high = spot["interval"]
    cells = [str(sweep["seed"]), _when(sweep), *borders, f"{spot['lambda']:g} ({low:g}–{high:g})"]
    cells.append(f"{100 * spot['mean@k']:.1f} %, {spot['tokens']:.2f} tokens")
    if there := spot["thinking"]:
        below, above = (100 * v for v in there["difference_ci95"])
        cells.append(f"{100 * there['mean@k']:.1f} %, {there['tokens']:.2f} tokens")
        cells.append(f"{100 * there['difference']:+z.1f} ({below:+z.1f} to {above:+z.1f})")
    else:
        cells += ["", ""]
    return cells
