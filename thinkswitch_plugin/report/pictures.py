"""Every picture of the project, drawn with matplotlib and saved as PNG and SVG by the same code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkswitch_plugin import files

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
STAGES = (("no thinking", "#f1f1f1"), ("transition", "#fdf0d5"), ("thinking", "#e3f0e3"))


MODULES = (  # the order of a decoder layer; anything else follows by name
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, without a window system."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def save(figure: Figure, path: Path) -> None:
    """Write `path`.png and `path`.svg, each whole or not at all; equal data give equal files."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "thinkswitch", "svg.fonttype": "none"}):
        for kind, metadata in KINDS.items():
            with files.atomic_file(path.with_name(f"{path.name}.{kind}")) as handle:
                figure.savefig(handle, format=kind, metadata=metadata)


PANELS = ("score", "tokens", "think ratio")


def iterations_picture(report: dict[str, Any], panels: Sequence[str] = PANELS) -> Figure:
    """Score with its 95 % interval, tokens and think ratio of both modes over the iterations.

    Args:
        report: what `report.json` holds.
        panels: which of `PANELS` to draw, from left to right.
    """
    figure = new_figure(3.6 * len(panels), 2.9)
    row: list[Axes] = list(figure.subplots(1, len(panels), squeeze=False)[0])
    numbers = [entry["iteration"] for entry in report["iterations"]]
    for axes, panel in zip(row, panels, strict=True):
        for shift, (mode, style) in zip((-0.03, 0.03), MODE_STYLES.items(), strict=True):
            figures = [entry[mode] for entry in report["iterations"]]
            at = [number + shift for number in numbers]  # so that equal values do not hide each other
            line: dict[str, Any] = {**style, "markersize": 5, "linewidth": 1.5, "label": mode}
            if panel == "score":
                score = [100 * s["mean@k"] for s in figures]
                below = [100 * (s["mean@k"] - s["ci95"][0]) for s in figures]
                above = [100 * (s["ci95"][1] - s["mean@k"]) for s in figures]
                axes.errorbar(at, score, yerr=[below, above], capsize=3, **line)
            else:
                axes.plot(at, [s["think_ratio" if panel == "think ratio" else "tokens"] for s in figures], **line)
        axes.set_xticks(numbers)
        axes.set_xlim(numbers[0] - 0.2, numbers[-1] + 0.2)
        axes.set_xlabel("iteration")
        axes.spines[["top", "right"]].set_visible(False)
        if panel == "score":
            k = report["iterations"][0]["instruct"]["k"]
            axes.set_title("accuracy, %" if k == 1 else f"Mean@{k}, %", fontsize=10)
        else:
            axes.set_title({"tokens": "tokens an answer"}.get(panel, panel), fontsize=10)
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
        for mode in MODE_STYLES
        for entry in report["iterations"][1:]
        for found in entry["paired"][mode][: None if entry is report["iterations"][-1] else 1]
    ]
    figure = new_figure(4.4, 0.9 + 0.32 * len(bars))
    axes = figure.subplots()
    at = range(len(bars))
    won, lost = [b[1] for b in bars], [b[2] for b in bars]
    axes.barh(at, won, color=COLOURS[2], height=0.6, label="won")
    axes.barh(at, [-n for n in lost], color=COLOURS[1], height=0.6, label="lost")
    reach = max(1, *won, *lost)
    for y in at:
        axes.text(won[y] + 0.02 * reach, y, str(won[y]), va="center", fontsize=9)
        axes.text(-lost[y] - 0.02 * reach, y, str(lost[y]), va="center", ha="right", fontsize=9)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(at, [b[0] for b in bars], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(-1.25 * max(reach * 0.4, *lost), 1.25 * max(reach * 0.4, *won))
    axes.set_xticks([])
    for words, side, shift in (("questions lost", "right", -4), ("questions won", "left", 4)):
        axes.annotate(
            words,
            (0, 0),
            (shift, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            ha=side,
            fontsize=9,
        )
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(left=False)
    return figure


def time_picture(report: dict[str, Any]) -> Figure:
    """Minutes of every stage, a bar an iteration.

    Args:
        report: what `report.json` holds.
    """
    entries = report["iterations"]
    names = list(dict.fromkeys(name for entry in entries for name in entry["seconds"]))
    figure = new_figure(4.4, 1.6 + 0.38 * len(entries))
    axes = figure.subplots()
    left = [0.0] * len(entries)
    for name, colour in zip(names, ("#999999", *COLOURS) * len(names), strict=False):
        minutes = [entry["seconds"].get(name, 0.0) / 60 for entry in entries]
        axes.barh(range(len(entries)), minutes, left=left, height=0.6, color=colour, label=name.replace("_", " "))
        left = [start + more for start, more in zip(left, minutes, strict=True)]
    axes.set_yticks(range(len(entries)), [str(entry["iteration"]) for entry in entries])
    axes.set_ylabel("iteration")
    axes.invert_yaxis()
    axes.set_xlabel("minutes")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8, columnspacing=1.2, handlelength=1.2)
    return figure


# The pictures that a report writes, by the names of their files.
OF_REPORT: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "iterations": iterations_picture,
    "paired": paired_picture,
    "time": time_picture,
}


def sweep_picture(result: dict[str, Any], size: tuple[float, float] = (7, 8), *, titled: bool = True) -> Figure:
    """Score, tokens and think ratio over λ, a line a sampling setting, the stages shaded, λ* marked.

    Args:
        result: what `sweep.json` holds.
        size: in inches; letters keep theirs.
        titled: say above it what was swept.
    """
    from thinkswitch_plugin.report.sweeps import points_of, title_of

    figure = new_figure(*size)
    panels = figure.subplots(3, 1, sharex=True)
    first = result["curves"][0]
    edges = [p["lambda"] for p in points_of(result, first)]
    for axes in panels:
        _shade(axes, first["stages"], edges[0], edges[-1])
        axes.spines[["top", "right"]].set_visible(False)
    for curve, colour in zip(result["curves"], COLOURS * len(result["curves"]), strict=False):
        points = points_of(result, curve)
        at = [p["lambda"] for p in points]
        many = points[0]["k"] > 1
        style = {"color": colour, "marker": "o", "markersize": 4}
        name = curve["sampling"] if len(result["curves"]) > 1 else None
        panels[0].plot(at, [100 * p["mean@k"] for p in points], **style, label=name or (many and "Mean@k") or None)
        panels[0].fill_between(
            at, [100 * p["ci95"][0] for p in points], [100 * p["ci95"][1] for p in points], color=colour, alpha=0.15
        )
        if many:
            panels[0].plot(at, [100 * p["pass@k"] for p in points], color=colour, linestyle="--", label="Pass@k")
            panels[0].plot(at, [100 * p["vote@k"] for p in points], color=colour, linestyle=":", label="Vote@k")
        panels[1].plot(at, [p["tokens"] for p in points], **style)
        panels[2].plot(at, [p["think_ratio"] for p in points], **style)
        best = curve["sweet_spot"]
        for axes, value in ((panels[0], 100 * best["mean@k"]), (panels[1], best["tokens"])):
            axes.plot([best["lambda"]], [value], "*", color=colour, markersize=15, markeredgecolor="black", zorder=5)
    panels[0].set_ylabel("score, % (band: 95 %)")
    panels[1].set_ylabel("tokens an answer")
    panels[1].set_ylim(bottom=0)
    panels[2].set_ylabel("think ratio")
    panels[2].set_ylim(-0.03, 1.03)
    panels[2].set_xlabel("λ, the weight of the thinking checkpoint")
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(frameon=False)
    low, high = first["sweet_spot"]["interval"]
    spot = f"★ λ* = {first['sweet_spot']['lambda']:g} (95 % {low:g} to {high:g})"
    panels[0].set_title(f"{title_of(result)}\n{spot}" if titled else spot, fontsize=10)
    return figure


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
    figure = new_figure(9, 3.8)
    figure.suptitle(f"{switch_title(result)} ({found['n']} questions)", fontsize=10)
    left, right = figure.subplots(1, 2)
    ends = [(found[mode]["tokens"], 100 * found[mode]["mean@k"]) for mode in MODE_STYLES]
    left.plot(*zip(*ends, strict=True), color="#777777", linestyle="--", linewidth=1.2, label="random mix")
    left.plot(
        [p["tokens"] for p in points], [100 * p["accuracy"] for p in points], color=COLOURS[2], label="router", zorder=3
    )
    for (mode, style), end in zip(MODE_STYLES.items(), ends, strict=True):
        left.plot(*end, color=style["color"], marker=style["marker"], linestyle="", label=f"always {mode}", zorder=4)
    left.plot(
        found["oracle"]["tokens"],
        100 * found["oracle"]["accuracy"],
        color=COLOURS[3],
        marker="^",
        linestyle="",
        label="oracle",
        zorder=4,
    )
    star = {
        "marker": "*",
        "markersize": 14,
        "color": COLOURS[2],
        "markeredgecolor": "black",
        "linestyle": "",
        "zorder": 5,
    }
    left.plot(default["tokens"], 100 * default["accuracy"], label="default threshold", **star)
    left.set_xlabel("tokens an answer")
    left.set_ylabel("accuracy, %" if found["k"] == 1 else f"Mean@{found['k']}, %")
    left.set_xlim(left=0)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    seen = [p for p in points if "ahead_at_same_share" in p]
    for by, colour, line in (("share", COLOURS[2], "-"), ("tokens", COLOURS[0], "--")):
        at = [100 * p["share"] for p in seen]
        right.plot(
            at, [100 * p[f"ahead_at_same_{by}"] for p in seen], color=colour, linestyle=line, label=f"at the same {by}"
        )
        wide = [p for p in seen if f"ahead_at_same_{by}_band" in p]
        limits = [[100 * p[f"ahead_at_same_{by}_band"][side] for p in wide] for side in (0, 1)]
        right.fill_between([100 * p["share"] for p in wide], *limits, color=colour, alpha=0.15, linewidth=0)
    right.axhline(0, color="black", linewidth=0.8)
    right.plot(100 * default["share"], 100 * default["ahead_at_same_share"], **star)
    right.set_xlabel("questions thought about, %")
    right.set_ylabel("points ahead of the random mix")
    right.legend(frameon=False, fontsize=8, title="bands: 95 %, all shares at once", title_fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _shade(axes: Axes, stages: dict[str, Any], start: float, end: float) -> None:
    lower, upper = stages["lower"], stages["upper"]
    if stages["middle"] is None:
        return
    borders = (start, start if lower is None else lower, end if upper is None else upper, end)
    for (name, colour), left, right in zip(STAGES, borders[:-1], borders[1:], strict=True):
        if right > left:
            axes.axvspan(left, right, color=colour, zorder=0)
            if axes.get_subplotspec().is_first_row():  # type: ignore[union-attr]
                axes.annotate(
                    name,
                    ((left + right) / 2, 0.02),
                    xycoords=("data", "axes fraction"),
                    ha="center",
                    fontsize=8,
                    color="#555555",
                )


def modules_picture(grid: dict[tuple[str, str], dict[str, Any]], title: str) -> Figure:
    """Which module decides what: think ratio, score and tokens with attention and FFN from each side.

    Args:
        grid: a row of `merges.json` for every (attention, FFN) of instruct, mixed, thinking.
    """
    import numpy as np

    sides = ("instruct", "mixed", "thinking")
    figure = new_figure(11, 3.8)
    panels = figure.subplots(1, 3)
    for axes, (name, key, scale, form) in zip(
        panels,
        (
            ("think ratio", "think_ratio", 1, "{:.2f}"),
            ("score, %", "mean@k", 100, "{:.1f}"),
            ("tokens", "tokens", 1, "{:.1f}"),
        ),
        strict=True,
    ):
        values = np.array([[scale * grid[(a, f)][key] for f in sides] for a in sides])
        top = {"think_ratio": 1.0, "mean@k": 100.0}.get(key, float(values.max()))
        axes.imshow(values, cmap="cividis", vmin=0, vmax=top)
        for (i, j), value in np.ndenumerate(values):
            axes.text(
                j, i, form.format(value), ha="center", va="center", color="white" if value < 0.6 * top else "black"
            )
        axes.set_xticks(range(3), sides)
        axes.set_yticks(range(3), sides)
        axes.set_xlabel("FFN from")
        axes.set_ylabel("attention from")
        axes.set_title(name, fontsize=10)
    figure.suptitle(title, fontsize=10)
    return figure


def similarity_picture(data: dict[str, Any]) -> Figure:
    """Angle and relative distance of every tensor of a pair: layers across, modules down.

    Args:
        data: what `merging.similarity.summarise` returns. Tensors outside the layers
            (embedding, last norm) are named with their figures beneath.
    """
    from thinkswitch_plugin.merging.similarity import layer_of

    inside: dict[tuple[str, int], dict[str, float]] = {}
    outside: dict[str, dict[str, float]] = {}
    for name, figures in data["tensors"].items():
        layer = layer_of(name)
        if layer is None:
            outside[name.removeprefix("model.").removesuffix(".weight")] = figures
        else:
            module = name.split(f".{layer}.", 1)[-1].removesuffix(".weight")
            inside[module, layer] = figures
    modules = sorted({m for m, _ in inside}, key=lambda m: (MODULES.index(m) if m in MODULES else len(MODULES), m))
    layers = sorted({layer for _, layer in inside})
    figure = new_figure(max(7.0, 3.2 + 0.2 * len(layers)), 2.4 + 0.5 * max(len(modules), 3))
    figure.suptitle(f"How near two checkpoints are, tensor by tensor (σ = {data['sigma']:.4f})")
    panels: list[Axes] = list(figure.subplots(2, 1, sharex=True))
    titles = {"angle": "angle between the tensors (radians)", "distance": "relative distance ‖a−b‖ / ‖a‖"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        values = [[inside.get((m, layer), {}).get(key, math.nan) for layer in layers] for m in modules]
        axes.set_title(title, fontsize=10)
        if values:
            image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
            figure.colorbar(image, ax=axes, pad=0.01)
        axes.set_yticks(range(len(modules)), [m.removeprefix("self_attn.").removeprefix("mlp.") for m in modules])
        axes.tick_params(labelsize=8)
        step = max(1, len(layers) // 12)
        axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    notes = [f"{n}: angle {v['angle']:.3g}, distance {v['distance']:.3g}" for n, v in sorted(outside.items())]
    panels[-1].set_xlabel("layer" + ("\n" + "\n".join(notes) if notes else ""), fontsize=9)
    return figure


# How the conditions of the adaptive experiment are drawn; those not named here stand in the table alone.
ADAPTIVE_MARKS = {
    "pre_only": (COLOURS[1], "s", "always thinks first"),
    "post_only": (COLOURS[0], "o", "always answers first"),
    "adaptive": (COLOURS[2], "*", "adaptive"),
    "no_prompt": (COLOURS[5], "D", "no soft prompt"),
    "static_prompt": (COLOURS[5], "v", "static soft prompt"),
    "no_words": (COLOURS[5], "<", "no word count"),
    "no_attention": (COLOURS[5], ">", "no cross-attention"),
    "random_mixture": (COLOURS[3], "X", "random mixture"),
    "mlp_baselines": (COLOURS[4], "P", "MLP router"),
    "length_baselines": (COLOURS[4], "p", "length router"),
    "oracle": ("#000000", "+", "oracle"),
}


def adaptive_picture(result: dict[str, Any]) -> Figure:
    """Accuracy against tokens up to the answer, a point a condition with its 95 % interval.

    Args:
        result: what `adaptive.json` holds. The line is a random choice between the baselines.
    """
    found = result["conditions"]
    figure = new_figure(7, 4.6)
    axes = figure.subplots()
    ends = [found["post_only"], found["pre_only"]]
    axes.plot(
        [e["tokens"] for e in ends],
        [100 * e["accuracy"] for e in ends],
        color="#999999",
        linestyle="--",
        label="random choice between the two",
    )
    for name, (colour, marker, label) in ADAPTIVE_MARKS.items():
        if name not in found:
            continue
        point = found[name]
        score = 100 * point["accuracy"]
        low, high = (100 * v for v in point["ci95"])
        axes.errorbar(
            [point["tokens"]],
            [score],
            yerr=[[score - low], [high - score]],
            color=colour,
            marker=marker,
            markersize=14 if marker == "*" else 7,
            linewidth=0,
            elinewidth=1,
            label=label,
            zorder=4 if marker == "*" else 3,
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens up to the answer")
    axes.set_ylabel("accuracy, % (bar: 95 %)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
