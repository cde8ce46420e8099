"""The pictures of a search over merges: score over λ, modules of a grid, how near two checkpoints are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from thinkswitch_plugin.report.pictures import COLOURS, new_axes, new_figure
from thinkswitch_plugin.report.sweeps import points_of, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def sweep_picture(result: dict[str, Any], size: tuple[float, float] = (7, 8), *, titled: bool = True) -> Figure:
    """Score, tokens and think ratio over λ, a line a sampling setting, the stages shaded, λ* marked.

    Args:
        result: what `sweep.json` holds.
        size: in inches; letters keep theirs.
        titled: say above it what was swept.
    """
    figure, panels = new_axes(*size, rows=3)
    first = result["curves"][0]
    edges = [p["lambda"] for p in points_of(result, first)]
    for axes in panels:
        _shade(axes, first["stages"], edges[0], edges[-1])
    for curve, colour in zip(result["curves"], COLOURS * len(result["curves"]), strict=False):
        points = points_of(result, curve)
        at = [p["lambda"] for p in points]
        many = points[0]["k"] > 1
        style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 4}
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


def _shade(axes: Axes, stages: dict[str, Any], start: float, end: float) -> None:
    lower, upper = stages["lower"], stages["upper"]
    if stages["middle"] is None:
        return
    borders = (start, start if lower is None else lower, end if upper is None else upper, end)
    for (name, colour), left, right in zip(STAGES, borders[:-1], borders[1:], strict=True):
        if right > left:
            axes.axvspan(left, right, color=colour, zorder=0)
            if axes.get_subplotspec().is_first_row():  # type: ignore[union-attr]
                words: dict[str, Any] = {"ha": "center", "fontsize": 8, "color": "#555555"}
                axes.text((left + right) / 2, 0.02, name, transform=axes.get_xaxis_transform(), **words)


def modules_picture(grid: dict[tuple[str, str], dict[str, Any]], title: str) -> Figure:
    """Which module decides what: think ratio, score and tokens with attention and FFN from each side.

    Args:
        grid: a row of `merges.json` for every (attention, FFN) of instruct, mixed, thinking.
    """
    import numpy as np

    sides = ("instruct", "mixed", "thinking")
    shown = (
        ("think ratio", "think_ratio", 1, 1, ".2f"),
        ("score, %", "mean@k", 100, 100, ".1f"),
        ("tokens", "tokens", 1, None, ".1f"),
    )
    figure = new_figure(11, 3.8)
    for axes, (name, key, scale, most, form) in zip(figure.subplots(1, 3), shown, strict=True):
        values = np.array([[scale * grid[(a, f)][key] for f in sides] for a in sides])
        top = most or values.max()
        axes.imshow(values, cmap="cividis", vmin=0, vmax=top)
        for (i, j), value in np.ndenumerate(values):
            colour = "white" if value < 0.6 * top else "black"
            axes.text(j, i, format(value, form), ha="center", va="center", color=colour)
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
