"""The pictures beside the JSON files: matplotlib figures, written as PNG and SVG."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkswitch_plugin import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
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
    """An empty figure of a size in inches, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write `path`.png and `path`.svg, each whole or not at all."""
    for kind in ("png", "svg"):
        with files.atomic_file(path.with_name(f"{path.name}.{kind}")) as handle:
            figure.savefig(handle, format=kind, dpi=DPI)


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
    panels[-1].set_xlabel("layer" + (f"\nOutside the layers:  {';  '.join(notes)}" if notes else ""), fontsize=9)
    return figure
