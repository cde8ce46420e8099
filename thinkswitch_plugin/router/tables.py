"""`switch.md`: what a router makes of a pair, as tables."""

from __future__ import annotations

from typing import Any

from thinkswitch_plugin import console
from thinkswitch_plugin.report.pictures import switch_title
from thinkswitch_plugin.router.curve import BY
from thinkswitch_plugin.run import MODES

HEADER = ["asked", "threshold", "thinking", "accuracy", "tokens", "random mix", "ahead", "95 %"]
HEADER += ["ahead at same tokens", "95 %"]
ROUTERS = ["router", "log loss", "Brier score", "area under ROC", "held out: ahead", "95 %"]


def markdown(result: dict[str, Any]) -> str:
    """`switch.md` from `switch.json`."""
    labels, router, threshold, found = (result[n] for n in ("labels", "router", "threshold", "evaluation"))
    default, area = found["default"], found["area"]
    if labels["source"] == "file":
        source = f"labels of {labels['file']}"
    else:
        seen, left_out = labels["trained_on"], labels["left_out"]
        source = f"agreement of instruct with thinking; trained on {seen} of them; {left_out} left out"
    reliability = ", ".join(f"{step['p']:.2f} → {step['share']:.2f}" for step in router["reliability"])
    lines = [
        f"# {switch_title(result)}",
        "",
        f"{labels['prompts']} label prompts ({source}): {labels['post']} need no thinking, {labels['pre']} do.",
        *([labels["caution"]] if "caution" in labels else []),
        f"Router: {router['chosen']}. Default threshold {threshold['value']:.3f}: {threshold['rule']}.",
        f"{found['n']} held-out questions, {found['k']} sample{'s' if found['k'] > 1 else ''} a question.",
        "",
        *console.table(HEADER, _rows(found)),
        "",
        found["verdict"]["share"]["sentence"],
        "",
        found["verdict"]["tokens"]["sentence"],
        "",
        f"On the average over all shares the router is {_points(area['ahead'])} points ahead of the random mix "
        f"(95 % interval {_interval(area['ci95'])}).",
        "",
        f"At the default threshold {100 * default['share']:.1f} % of the questions are thought about: "
        f"{100 * default['accuracy']:.1f} % at {default['tokens']:.1f} tokens.",
        "",
        *(f"- against always {mode}: {default['paired'][mode]}" for mode in MODES),
        "",
        "Routers, cross-validated on the label prompts, which decides; and points ahead of the random mix on the held-out "
        "questions, on the average over all shares, which does not:",
        "",
        *console.table(ROUTERS, _router_rows(result)),
        "",
        f"The chosen one's p(think), out of fold, and the share that did need thinking: {reliability}.",
        "",
    ]
    return "\n".join(lines)


def _rows(found: dict[str, Any]) -> list[list[str]]:
    """Always instruct, the router at about every tenth of thinking, always thinking, the default, the oracle."""
    seen = [p for p in found["curve"] if "ahead_at_same_share" in p and 0 < p["share"] < 1]
    tenths = range(1, 10) if seen else ()
    nearest = {min(range(len(seen)), key=lambda i: abs(10 * seen[i]["share"] - tenth)) for tenth in tenths}
    first, last = (
        _bare(f"always {mode}", float(mode == "thinking"), found[mode]["mean@k"], found[mode]["tokens"])
        for mode in MODES
    )
    best = found["oracle"]
    return [
        first,
        *(_row("router", seen[i]) for i in sorted(nearest)),
        last,
        _row("router, default", found["default"]),
        _bare("oracle", best["share"], best["accuracy"], best["tokens"]),
    ]


def _bare(name: str, share: float, accuracy: float, tokens: float) -> list[str]:
    return [name, "", f"{100 * share:.1f} %", f"{100 * accuracy:.1f} %", f"{tokens:.1f}", "", "", "", "", ""]


def _row(name: str, point: dict[str, Any]) -> list[str]:
    cells = _bare(name, point["share"], point["accuracy"], point["tokens"])[:5]
    cells[1] = f"{point['threshold']:.3f}"
    cells.append(f"{100 * point['mix']:.1f} %")
    for by in BY:
        cells += [_points(point[f"ahead_at_same_{by}"]), _interval(point[f"ahead_at_same_{by}_ci95"])]
    return cells


def _router_rows(result: dict[str, Any]) -> list[list[str]]:
    """A row for the best router of every kind, the chosen one first."""
    tried = {row["name"]: row for row in result["router"]["tried"]}
    return [
        [
            name,
            *(
                f"{tried[name][figure]:.{places}f}"
                for figure, places in (("log_loss", 4), ("brier", 4), ("roc_auc", 3))
            ),
            _points(area["ahead"]),
            _interval(area["ci95"]),
        ]
        for name, area in result["evaluation"]["area_by_router"].items()
    ]


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _interval(limits: list[float]) -> str:
    return " to ".join(map(_points, limits))
