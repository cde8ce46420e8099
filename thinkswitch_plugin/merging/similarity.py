"""How near two checkpoints are: σ, angle and distance of every tensor, read once, in constant memory.

`thinkswitch similarity A B` writes `similarity.json` and a picture:

    {"sigma": 0.0269, "angle": {"min": …, "median": …, "max": …}, "sphere_gap": {"max": …, …},
     "layers": [{"layer": 0, "angle": …, "distance": …, "sigma": …}, …],
     "tensors": {"model.layers.0.mlp.up_proj.weight": {"angle": 0.054, "distance": 0.055, …}, …}}
"""

from __future__ import annotations

import math
import os
import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.compatibility import list_weights
from thinkswitch_plugin.merging.kernel import CHUNK, MERGEKIT_LINEAR, Scratch, Sums, chunk_sums, non_finite, workers
from thinkswitch_plugin.merging.layout import Stored, align
from thinkswitch_plugin.merging.tensors import TensorInfo
from thinkswitch_plugin.run.progress import Bar

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
PIECE = 2**22  # elements read at once from each checkpoint
WINDOW = 2**28  # bytes of each checkpoint asked from the disk ahead of reading


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
    total = sum(sums.values(), Sums())
    tensors = {
        name: {"angle": s.angle, "distance": s.distance, "sigma": s.sigma, "sphere_gap": s.sphere_gap}
        for name, s in sums.items()
    }
    layers: dict[int, Sums] = {}
    for name, s in sums.items():
        if (layer := layer_of(name)) is not None:
            layers[layer] = layers.get(layer, Sums()) + s
    straight = sum(abs(math.cos(s.angle)) > MERGEKIT_LINEAR for s in sums.values())
    worst = max(tensors, key=lambda name: tensors[name]["sphere_gap"])
    return {
        "sigma": total.sigma,
        **{key: _spread([t[key] for t in tensors.values()]) for key in ("angle", "distance")},
        "sphere_gap": {**_spread([t["sphere_gap"] for t in tensors.values()]), "where": worst},
        "linear_in_mergekit": straight / len(sums),
        "layers": [
            {"layer": layer, "angle": s.angle, "distance": s.distance, "sigma": s.sigma}
            for layer, s in sorted(layers.items())
        ],
        "tensors": tensors,
    }


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to: 3 of `model.layers.3.mlp.up_proj.weight`."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


@dataclass(frozen=True)
class Piece:
    """A run of elements of one tensor in both checkpoints."""

    name: str
    first: TensorInfo
    second: TensorInfo
    start: int
    stop: int


def tensor_sums(first: Path, second: Path) -> dict[str, Sums]:
    """The sums over each pair of floating-point tensors, in the order of the first checkpoint's files.

    Reads both checkpoints once, a few MB at a time.
    Raises `ThinkSwitchError` as `similarity` does.
    """
    aligned = align({folder: list_weights(folder) for folder in (first, second)})
    left, right = aligned.checkpoints[first], aligned.checkpoints[second]
    pieces = list(_pieces(left, right))
    converted = [name for name, stored in left.items() if stored.layout]
    if not pieces and not converted:
        raise ThinkSwitchError(f"{first} holds no floating-point tensor; name a checkpoint of unquantized weights.")
    sums: dict[str, Sums] = {}
    size = sum(info.length for tensors in (left, right) for stored in tensors.values() for _, info in stored.parts)
    with Reader() as read, Bar(size, "similarity", unit="B") as bar:
        for piece, found in zip(pieces, workers().map(read.sums, pieces), strict=True):
            if not all(map(math.isfinite, (found.xx, found.yy, found.x1, found.y1))):
                found = read.in_float64(piece, first, second)
            sums[piece.name] = sums.get(piece.name, Sums()) + found
            bar.update((piece.stop - piece.start) * (_width(piece.first) + _width(piece.second)))
        for name in converted:
            sums[name] = _converted_sums(left[name], right[name], first, second)
            bar.update(sum(info.length for stored in (left[name], right[name]) for _, info in stored.parts))
    return sums


def _converted_sums(left: Stored, right: Stored, first: Path, second: Path) -> Sums:
    """The sums over a tensor that the two checkpoints store in different layouts."""
    a, b = left.read().reshape(-1), right.read().reshape(-1)
    for checkpoint, tensor in ((first, a), (second, b)):
        if not bool(torch.isfinite(tensor).all()):
            raise ThinkSwitchError(non_finite(checkpoint, left.name))
    scratch = Scratch(CHUNK, torch.float64, torch.device("cpu"))
    chunks = zip(a.split(CHUNK), b.split(CHUNK), strict=True)
    return sum((chunk_sums(x, y, scratch, absolute=True) for x, y in chunks), Sums())


def _width(info: TensorInfo) -> int:
    return DTYPES[info.dtype].itemsize


def _pieces(left: dict[str, Stored], right: dict[str, Stored]) -> Iterator[Piece]:
    plain = {name: (stored.info, right[name].info) for name, stored in left.items()}
    both = {name: (a, b) for name, (a, b) in plain.items() if a and b and a.dtype in DTYPES and b.dtype in DTYPES}
    for name, (a, b) in sorted(both.items(), key=lambda entry: (entry[1][0].file, entry[1][0].start)):
        count = math.prod(a.shape)
        for start in range(0, count, PIECE):
            yield Piece(name, a, b, start, min(start + PIECE, count))


class Reader:
    """Reads pieces of safetensors files into buffers of the calling thread, and sums over them."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def sums(self, piece: Piece) -> Sums:
        """The sums over one piece; the kernel is asked for what comes after it meanwhile."""
        dtype = torch.float64 if "F64" in (piece.first.dtype, piece.second.dtype) else torch.float32
        return self._sum(piece, dtype)

    def in_float64(self, piece: Piece, first: Path, second: Path) -> Sums:
        """The same where float32 squares overflowed. Raises `ThinkSwitchError` if it was NaN or infinity."""
        for checkpoint, info in ((first, piece.first), (second, piece.second)):
            if not bool(torch.isfinite(self._read(info, piece, "first")).all()):
                raise ThinkSwitchError(non_finite(checkpoint, piece.name))
        return self._sum(piece, torch.float64)

    def _sum(self, piece: Piece, dtype: torch.dtype) -> Sums:
        a, b = self._read(piece.first, piece, "first"), self._read(piece.second, piece, "second")
        scratch: Scratch = self._kept(f"scratch {dtype}", lambda: Scratch(CHUNK, dtype, torch.device("cpu")))
        chunks = zip(a.split(CHUNK), b.split(CHUNK), strict=True)
        return sum((chunk_sums(x, y, scratch, absolute=True) for x, y in chunks), Sums())

    def _read(self, info: TensorInfo, piece: Piece, side: str) -> torch.Tensor:
        width = _width(info)
        buffer: bytearray = self._kept(f"{side} {width}", lambda: bytearray(PIECE * width))
        view = memoryview(buffer)[: (piece.stop - piece.start) * width]
        handle, position = self._handle(info.file), info.start + piece.start * width
        os.posix_fadvise(handle, position + len(view), WINDOW, os.POSIX_FADV_WILLNEED)
        while view:
            count = os.preadv(handle, [view], position)
            if count == 0:
                raise ThinkSwitchError(f"{info.file} was cut short while it was read; copy or download it again.")
            view, position = view[count:], position + count
        return torch.frombuffer(buffer, dtype=DTYPES[info.dtype], count=piece.stop - piece.start)

    def _kept(self, name: str, make: Callable[[], Any]) -> Any:
        if not hasattr(self._local, name):
            setattr(self._local, name, make())
        return getattr(self._local, name)

    def _handle(self, path: Path) -> int:
        with self._lock:
            if path not in self._handles:
                self._handles[path] = self._open.enter_context(path.open("rb", buffering=0)).fileno()
            return self._handles[path]
