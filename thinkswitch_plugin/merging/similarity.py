"""How near two checkpoints are: σ and the angle of every tensor, streamed one tensor at a time."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.compatibility import list_tensors
from thinkswitch_plugin.merging.kernel import CHUNK, angle


def similarity(first: Path, second: Path) -> dict[str, Any]:
    """Compare two compatible checkpoints.

    Returns:
        ``sigma`` = Σ|a − b| / (Σ|a| + Σ|b|) over all weights (arXiv 2510.10977, §3) and
        ``angle``: minimum, median and maximum over tensors, in radians.

    Raises:
        ThinkSwitchError: a tensor holds NaN or infinity.
    """
    left, right = list_tensors(first), list_tensors(second)
    difference = total = 0.0
    angles = []
    for name in sorted(left):
        a, b = _read(left[name].file, name), _read(right[name].file, name)
        for checkpoint, tensor in ((first, a), (second, b)):
            if not torch.isfinite(tensor).all():
                raise ThinkSwitchError(f"{checkpoint}: the tensor {name} holds NaN or infinity.")
        for x, y in zip(a.flatten().split(CHUNK), b.flatten().split(CHUNK), strict=True):
            difference += float((x.double() - y.double()).abs().sum())
            total += float(x.double().abs().sum() + y.double().abs().sum())
        angles.append(angle(a, b))
    return {
        "sigma": difference / total if total else 0.0,
        "angle": {"min": min(angles), "median": statistics.median(angles), "max": max(angles)},
    }


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(str(file), framework="pt") as handle:
        return handle.get_tensor(name)
