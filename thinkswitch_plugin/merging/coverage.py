"""What a merge must write, from what it reads: nothing may be lost, whatever mergekit planned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from mergekit.config import MergeConfiguration

from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.architecture import main_stack, split_name
from thinkswitch_plugin.merging.compatibility import list_weights
from thinkswitch_plugin.merging.layout import Aligned
from thinkswitch_plugin.merging.settings import layers_of
from thinkswitch_plugin.merging.tensors import TensorInfo


def expected(config: MergeConfiguration, checkpoints: Sequence[Path], aligned: Aligned | None) -> dict[str, int]:
    """The tensors that the output must have -> their elements.

    Args:
        checkpoints: the local folders of the config.
        aligned: the same in one layout; None if layers are put together from unlike places.
    """
    if aligned is not None:
        tensors = next(iter(aligned.checkpoints.values())) | aligned.carried
        return {name: stored.elements for name, stored in tensors.items()}
    found: dict[str, int] = {}
    layer = 0
    for piece in config.slices or []:
        folder = Path(piece.sources[0].model.model.path)
        if folder not in checkpoints or not any(folder.glob("*.safetensors")):
            return {}  # on the hub, or not safetensors: not read by us
        held, layers = list_weights(folder), layers_of(folder)
        sizes = {name: math.prod(info.shape) for name, info in held.items()}
        stack = main_stack(sizes)
        start, end = piece.sources[0].layer_range
        for name, size in sizes.items():
            prefix, index, rest = split_name(name)
            if prefix != stack:
                found.setdefault(name, size)
            elif prefix == stack and start <= int(index) < min(end, layers):
                found[f"{stack}{layer + int(index) - start}.{rest}"] = size
        layer += end - start
    return found


def require_covered(needed: Mapping[str, int], written: Mapping[str, TensorInfo], config_file: Path | str) -> None:
    """Raise `ThinkSwitchError` if a tensor that a merge must write is not there or is smaller."""
    missing = sorted(name for name in needed if name not in written)
    if missing:
        raise ThinkSwitchError(
            f"{config_file}: mergekit would leave out {len(missing)} of {len(needed)} tensors ({shortened(missing)}); "
            "merge the whole model, with `models:` rather than `modules:` or `slices:`."
        )
    smaller = sorted(name for name, size in needed.items() if math.prod(written[name].shape) < size)
    if smaller:
        raise ThinkSwitchError(
            f"{config_file}: mergekit would keep only a part of {len(smaller)} tensors ({shortened(smaller)}); "
            "merge checkpoints of one shape."
        )


def shortened(names: Sequence[str]) -> str:
    """The first and the last of many tensors' names."""
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
