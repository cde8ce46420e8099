"""How similar two checkpoints are: σ, angle and distance of every tensor, read once, in constant memory.

`thinkswitch similarity A B` writes `similarity.json` and a picture:

    {"sigma": 0.0269, "angle": {"min": …, "median": …, "max": …}, "sphere_gap": {"max": …, …},
     "layers": [{"layer": 0, "angle": …, "distance": …, "sigma": …}, …],
     "tensors": {"model.layers.0.mlp.up_proj.weight": {"angle": 0.054, "distance": 0.055, …}, …}}
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.compatibility import list_weights
from thinkswitch_plugin.merging.kernel import MERGEKIT_LINEAR, NonFiniteError, Sums, measure, non_finite, total
from thinkswitch_plugin.merging.layout import align
from thinkswitch_plugin.merging.tensors import FLOATS, reading, split_name
from thinkswitch_plugin.run.progress import Bar


def similarity(first: Path, second: Path) -> dict[str, Any]:
    """Compare two compatible checkpoints.

    Returns:
        ``sigma`` = Σ|a − b| / (Σ|a| + Σ|b|) over all weights (arXiv 2510.10977, §3) and
        ``angle``: minimum, median and maximum over tensors, in radians.

    Raises:
        ThinkSwitchError: a tensor holds NaN or infinity, or the two hold other tensors.
    """
    found = summarise(tensor_sums(first, second))
    return {"sigma": found["sigma"], "angle": found["angle"]}


def summarise(sums: dict[str, Sums]) -> dict[str, Any]:
    """All figures about a pair from the sums of its tensors: overall, by layer, by tensor."""
    tensors = {
        name: {"angle": s.angle, "distance": s.distance, "sigma": s.sigma, "sphere_gap": s.sphere_gap}
        for name, s in sums.items()
    }
    layers: dict[int, list[Sums]] = {}
    for name, s in sums.items():
        if (layer := layer_of(name)) is not None:
            layers.setdefault(layer, []).append(s)
    straight = sum(abs(math.cos(s.angle)) > MERGEKIT_LINEAR for s in sums.values())
    worst = max(tensors, key=lambda name: tensors[name]["sphere_gap"])
    return {
        "sigma": total(sums.values()).sigma,
        **{key: _spread([t[key] for t in tensors.values()]) for key in ("angle", "distance")},
        "sphere_gap": {**_spread([t["sphere_gap"] for t in tensors.values()]), "where": worst},
        "linear_in_mergekit": straight / len(sums),
        "layers": [
            {"layer": layer, "angle": s.angle, "distance": s.distance, "sigma": s.sigma}
            for layer, s in sorted((layer, total(parts)) for layer, parts in layers.items())
        ],
        "tensors": tensors,
    }


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to: 3 of `model.layers.3.mlp.up_proj.weight`."""
    number = split_name(name)[1]
    return int(number) if number else None


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def tensor_sums(first: Path, second: Path) -> dict[str, Sums]:
    """The sums over each pair of floating-point tensors, in the order of the first checkpoint's files.

    Both checkpoints are mapped and read once. Raises `ThinkSwitchError` as `similarity` does.
    """
    aligned = align({folder: list_weights(folder) for folder in (first, second)})
    left, right = aligned.checkpoints[first], aligned.checkpoints[second]
    names = [name for name in left if left[name].dtype in FLOATS and right[name].dtype in FLOATS]
    if not names:
        raise ThinkSwitchError(f"{first} has no floating-point tensors; use a checkpoint with unquantised weights.")
    sums: dict[str, Sums] = {}
    with reading() as read, Bar(sum(left[name].elements for name in names), "similarity", unit="") as bar:
        for name in names:
            try:
                sums[name] = measure(left[name].tensor(read), right[name].tensor(read), absolute=True)
            except NonFiniteError as error:
                raise ThinkSwitchError(non_finite(first if error.side == "first" else second, name)) from None
            bar.update(left[name].elements)
    return sums
