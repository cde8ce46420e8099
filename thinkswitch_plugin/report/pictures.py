"""Every picture of the project, drawn with matplotlib and saved as PNG and SVG by the same code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkswitch_plugin import files
from thinkswitch_plugin.report.tables import evaluated, score_of
from thinkswitch_plugin.run.folder import OTHER_MODE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# The files of a picture, and what is kept out of them so that equal data give equal files.
KINDS = {"png": {"Software": None}, "svg": {"Date": None}}
MODE_STYLES = {
    "instruct": {"color": COLOURS[0], "marker": "o", "linestyle": "-"},
    "thinking": {"color": COLOURS[1], "marker": "s", "linestyle": "--"},
}
# A hybrid's checkpoints in their other mode have the colour of the mode.
STYLES = MODE_STYLES | {
    name: {**MODE_STYLES[mode], "marker": "x", "linestyle": ":"} for name, (_, mode) in OTHER_MODE.items()
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, without a window system."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def new_axes(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure in inches and its panels, row by row, without frames; panels in one column share their x axis."""
    figure = new_figure(width, height)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=columns == 1).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def save(figure: Figure, path: Path) -> None:
    """Write `path`.png and `path`.svg, each whole or not at all; equal data give equal files."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "thinkswitch", "svg.fonttype": "none"}):
        for kind, metadata in KINDS.items():
            with files.atomic_file(path.with_name(f"{path.name}.{kind}")) as handle:
                figure.savefig(handle, format=kind, metadata=metadata)


def score_name(k: int, score: str = "accuracy") -> str:
    """What a score over k samples a question is called on an axis."""
    return f"{score}, %" if k == 1 else f"Mean@{k}, %"


PANELS = ("score", "tokens", "think ratio")


def iterations_picture(report: dict[str, Any], panels: Sequence[str] = PANELS) -> Figure:
    """Score with its 95 % interval, tokens and think ratio of both modes over the iterations.

    Args:
        report: what `report.json` holds.
        panels: which of `PANELS` to draw, from left to right.
    """
    figure, row = new_axes(3.6 * len(panels), 2.9, columns=len(panels))
    numbers = [entry["iteration"] for entry in report["iterations"]]
    every = [evaluated(entry) for entry in report["iterations"]]
    gap = 0.03 * (numbers[-1] - numbers[0] + 0.4)  # iterations; a marker of 5 points takes less of an axis of 3 inches
    for axes, panel in zip(row, panels, strict=True):
        for shift, name in zip((-gap / 2, gap / 2, 1.5 * gap, -1.5 * gap), every[-1], strict=False):
            figures = [found[name] for found in every if name in found]
            # Shifted by more than a marker, so that equal values do not hide each other.
            at = [number + shift for number, found in zip(numbers, every, strict=True) if name in found]
            line: dict[str, Any] = {**STYLES[name], "markersize": 5, "linewidth": 1.5, "label": name}
            if panel == "score":
                score = [100 * s["mean@k"] for s in figures]
                below = [100 * (s["mean@k"] - s["ci95"][0]) for s in figures]
                above = [100 * (s["ci95"][1] - s["mean@k"]) for s in figures]
                axes.errorbar(at, score, yerr=[below, above], capsize=3, **line)
            else:
                axes.plot(at, [s["think_ratio" if panel == "think ratio" else "tokens"] for s in figures], **line)
        axes.set_xticks(numbers)
        axes.set_xlim(numbers[0] - max(0.2, 2 * gap), numbers[-1] + max(0.2, 2 * gap))
        axes.set_xlabel("iteration")
        named = score_name(report["iterations"][0]["instruct"]["k"], score_of(report))
        axes.set_title({"score": named, "tokens": "tokens an answer"}.get(panel, panel), fontsize=10)
        if panel == "tokens":
            axes.set_ylim(bottom=0)
        elif panel == "think ratio":
            axes.set_ylim(-0.05, 1.05)
        axes.margins(y=0.1)
    row[0].legend(frameon=False, fontsize=9)
    return figure


def paired_picture(report: dict[str, Any]) -> Figure:
    """Questions won and lost by every checkpoint against the one before, and by the last against iteration 0.

    Args:
        report: what `report.json` holds.
    """
    bars = [
        (f"{mode}, {entry['iteration']} against {found['against']}", len(found["won"]), len(found["lost"]))
        for mode in report["iterations"][-1]["paired"]
        for entry in report["iterations"][1:]
        for found in entry["paired"][mode][: None if entry is report["iterations"][-1] else 1]
    ]
    figure, (axes,) = new_axes(4.4, 0.9 + 0.32 * len(bars))
    at = range(len(bars))
    won, lost = [b[1] for b in bars], [b[2] for b in bars]
    for numbers, sign, colour in ((won, 1, COLOURS[2]), (lost, -1, COLOURS[1])):
        drawn = axes.barh(at, [sign * n for n in numbers], color=colour, height=0.6)
        axes.bar_label(drawn, [str(n) for n in numbers], padding=3, fontsize=9)
    reach = max(1, *won, *lost)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(at, [b[0] for b in bars], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(-1.4 * max(reach * 0.4, *lost), 1.25 * max(reach * 0.4, *won))
    axes.set_xticks([])
    for words, side, shift in (("questions lost", "right", -4), ("questions won", "left", 4)):
        place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(words, (0, 0), (shift, 0), **place, va="top", ha=side, fontsize=9)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(left=False)
    return figure


def time_picture(report: dict[str, Any]) -> Figure:
    """Minutes of every stage, a bar an iteration.

    Args:
        report: what `report.json` holds.
    """
    entries = report["iterations"]
    names = list(dict.fromkeys(name for entry in entries for name in entry["seconds"]))
    figure, (axes,) = new_axes(4.4, 1.6 + 0.38 * len(entries))
    left = [0.0] * len(entries)
    for name, colour in zip(names, ("#999999", *COLOURS) * len(names), strict=False):
        minutes = [entry["seconds"].get(name, 0.0) / 60 for entry in entries]
        axes.barh(range(len(entries)), minutes, left=left, height=0.6, color=colour, label=name.replace("_", " "))
        left = [start + more for start, more in zip(left, minutes, strict=True)]
    axes.set_yticks(range(len(entries)), [str(entry["iteration"]) for entry in entries])
    axes.set_ylabel("iteration")
    axes.invert_yaxis()
    axes.set_xlabel("minutes")
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8, columnspacing=1.2, handlelength=1.2)
    return figure


def loss_picture(report: dict[str, Any]) -> Figure:
    """Training loss over the steps, a line an iteration.

    Args:
        report: what `report.json` holds, with `losses` of an iteration.
    """
    figure, (axes,) = new_axes(4.4, 2.6)
    shown = [entry for entry in report["iterations"] if "losses" in entry]
    for entry, colour in zip(shown, COLOURS * len(shown), strict=False):
        steps, losses = zip(*entry["losses"], strict=True)
        axes.plot(steps, losses, color=colour, linewidth=1.5, label=f"iteration {entry['iteration']}")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    return figure


# The pictures that a report writes, by the names of their files.
OF_REPORT: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "iterations": iterations_picture,
    "paired": paired_picture,
    "time": time_picture,
}


def switch_title(result: dict[str, Any]) -> str:
    """What was switched, in one line."""
    return (
        f"{result['domain']}, seed {result['seed']}, iteration {result['iteration']}: instruct or thinking, by a router"
    )


def switch_picture(result: dict[str, Any]) -> Figure:
    """A router's accuracy against tokens beside the random mix, and how far it is ahead over the share of thinking.

    Args:
        result: what `switch.json` holds.
    """
    found = result["evaluation"]
    points, default = found["curve"], found["default"]
    figure, (left, right) = new_axes(9, 3.8, columns=2)
    figure.suptitle(f"{switch_title(result)} ({found['n']} questions)", fontsize=10)

    def mark(axes: Axes, x: float, share: float, **style: Any) -> None:
        axes.plot(x, 100 * share, linestyle="", zorder=4, **style)

    ends = [(found[mode]["tokens"], 100 * found[mode]["mean@k"]) for mode in MODE_STYLES]
    left.plot(*zip(*ends, strict=True), color="#777777", linestyle="--", linewidth=1.2, label="random mix")
    at, accuracy = [p["tokens"] for p in points], [100 * p["accuracy"] for p in points]
    left.plot(at, accuracy, color=COLOURS[2], label="router", zorder=3)
    for mode, style in MODE_STYLES.items():
        always = {"color": style["color"], "marker": style["marker"], "label": f"always {mode}"}
        mark(left, found[mode]["tokens"], found[mode]["mean@k"], **always)
    mark(left, found["oracle"]["tokens"], found["oracle"]["accuracy"], color=COLOURS[3], marker="^", label="oracle")
    star = {"marker": "*", "markersize": 14, "color": COLOURS[2], "markeredgecolor": "black"}
    mark(left, default["tokens"], default["accuracy"], label="default threshold", **star)
    left.set_xlabel("tokens an answer")
    left.set_ylabel(score_name(found["k"]))
    left.set_xlim(left=0)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    for by, colour, line in (("share", COLOURS[2], "-"), ("tokens", COLOURS[0], "--")):
        name = f"ahead_at_same_{by}"
        seen, wide = ([p for p in points if key in p] for key in (name, f"{name}_band"))
        at, ahead = [100 * p["share"] for p in seen], [100 * p[name] for p in seen]
        right.plot(at, ahead, color=colour, linestyle=line, label=f"at the same {by}")
        low, high = ([100 * p[f"{name}_band"][side] for p in wide] for side in (0, 1))
        right.fill_between([100 * p["share"] for p in wide], low, high, color=colour, alpha=0.15, linewidth=0)
    right.axhline(0, color="black", linewidth=0.8)
    mark(right, 100 * default["share"], default["ahead_at_same_share"], **star)
    right.set_xlabel("questions thought about, %")
    right.set_ylabel("points ahead of the random mix")
    right.legend(frameon=False, fontsize=8, title="bands: 95 %, all shares at once", title_fontsize=8)
    return figure
