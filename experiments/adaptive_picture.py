"""The picture of the adaptive experiment: accuracy against tokens, a point a condition."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from thinkswitch_plugin.report.pictures import COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
