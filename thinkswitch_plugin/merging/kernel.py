"""Interpolation of one pair of tensors by passes over small chunks. λ is the weight of the thinking checkpoint.

The first pass sums squares (`measure`), which give norms and angle; the last writes the
result. Chunks stay in a core's cache and no full-size float32 copy is ever made.
`slerp` is mergekit's method of that name, carried out in the same way.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Literal, NamedTuple, TypeVar

import torch

# Below this angle (radians) the sphere is a straight line to float32 precision.
SMALLEST_ANGLE = 1e-4
# Nearer than this to π the arc is not defined by the data: its coefficients exceed 100.
OPPOSITE = 1e-2
# mergekit's slerp: a straight line where |cos| is above this, norms up to this count as 1, and the elements of a sum.
MERGEKIT_LINEAR = 0.9995
MERGEKIT_NO_NORM = 1e-8
MERGEKIT_CHUNK = 2**20
CHUNK = 2**18  # elements; float32 copies of two chunks and their difference fit a core's cache
ACCELERATOR_CHUNK = 2**24
ALONE = 2**15  # torch itself works on fewer elements in one thread
SMALLEST_SQUARES = 1e-30  # a smaller float32 sum of squares may have lost terms to underflow
WORKERS = min(4, os.cpu_count() or 1)

Side = Literal["first", "second"]
T = TypeVar("T")


class NonFiniteError(ValueError):
    """One of the two tensors holds NaN or infinity; `side` says which."""

    def __init__(self, side: Side) -> None:
        super().__init__(f"the {side} tensor holds NaN or infinity")
        self.side = side


def non_finite(checkpoint: object, name: str) -> str:
    """The refusal of a checkpoint with NaN or infinity in it."""
    return f"{checkpoint}: the tensor {name} holds NaN or infinity; copy, download or train it again."


class Sums(NamedTuple):
    """Sums over two tensors x and y of one shape and d = y − x; all else about the pair follows.

    ``xx`` is Σx², ``x1`` is Σ|x|, and so on; the absolute sums are 0 unless asked for.
    """

    xx: float = 0.0
    yy: float = 0.0
    dd: float = 0.0
    x1: float = 0.0
    y1: float = 0.0
    d1: float = 0.0

    @property
    def trusted(self) -> bool:
        """Whether no square over- or underflowed, and no input was NaN or infinite."""
        return all(map(math.isfinite, self)) and min(self.xx, self.yy) > SMALLEST_SQUARES

    @property
    def angle(self) -> float:
        """The angle in radians between x and y, each taken as one vector; 0 if one is zero.

        ``2·atan2(‖u−v‖, ‖u+v‖)`` of the unit vectors (Kahan, "How Futile are Mindless
        Assessments of Roundoff", 2006, §12) with ``‖u−v‖² = (‖d‖² − (‖x‖−‖y‖)²)/(‖x‖‖y‖)``:
        exact for small angles, where the arc cosine is not.
        """
        x, y = math.sqrt(self.xx), math.sqrt(self.yy)
        if x == 0.0 or y == 0.0:
            return 0.0
        apart = min(max((self.dd - (x - y) ** 2) / (x * y), 0.0), 4.0)
        return 2 * math.atan2(math.sqrt(apart), math.sqrt(4.0 - apart))

    @property
    def distance(self) -> float:
        """Relative distance ‖y − x‖/‖x‖; 0 if both are zero, infinite if x alone is."""
        if self.xx == 0.0:
            return math.inf if self.dd else 0.0
        return math.sqrt(self.dd / self.xx)

    @property
    def sigma(self) -> float:
        """σ = Σ|x − y| / (Σ|x| + Σ|y|) (arXiv 2510.10977, §3); 0 if both are zero."""
        whole = self.x1 + self.y1
        return self.d1 / whole if whole else 0.0

    @property
    def sphere_gap(self) -> float:
        """‖slerp − linear‖/‖linear‖ at λ = ½, in closed form: both point the same way there, so sec(θ/2) − 1."""
        theta = self.angle
        if theta >= math.pi - OPPOSITE:
            return 0.0
        return 2 * math.sin(theta / 4) ** 2 / math.cos(theta / 2)


def total(parts: Iterable[Sums]) -> Sums:
    """The sums over all parts of two tensors."""
    return Sums(*map(sum, zip(Sums(), *parts, strict=True)))


class Scratch:
    """Working copies of one chunk of each tensor, and room for a third; one for each thread."""

    def __init__(self, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self._buffers = [torch.empty(length, dtype=dtype, device=device) for _ in range(3)]

    def load(self, *chunks: torch.Tensor) -> list[torch.Tensor]:
        """The chunks in the working dtype, and room for a third of their length."""
        views = [buffer[: chunks[0].numel()] for buffer in self._buffers]
        for view, chunk in zip(views, chunks, strict=False):
            view.copy_(chunk)
        return views


@lru_cache(maxsize=1)
def workers() -> ThreadPoolExecutor:
    """Threads that share the work on long tensors, each with a single torch thread."""
    # torch's own threads wait for each other at every small chunk, and slow down next to a writing thread.
    return ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,))


def _by_chunks(
    work: Callable[[Scratch, slice], T], count: int, dtype: torch.dtype, device: torch.device, length: int = CHUNK
) -> list[T]:
    """Run `work` on every chunk of `count` elements, long tensors on several cores; the results are in order."""
    length = length if device.type == "cpu" else ACCELERATOR_CHUNK
    parts = [slice(start, min(start + length, count)) for start in range(0, count, length)]

    def each(mine: list[slice]) -> list[T]:
        scratch = Scratch(min(length, count), dtype, device)
        return [work(scratch, part) for part in mine]

    if device.type != "cpu" or count < ALONE:
        return each(parts)
    # Every thread takes each n-th chunk, so that all follow the disk from front to back.
    dealt = [parts[start::WORKERS] for start in range(min(WORKERS, len(parts)))]
    found = list(workers().map(each, dealt))
    return [found[place % WORKERS][place // WORKERS] for place in range(len(parts))]


def _working_dtype(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity, looked at a chunk at a time, long tensors on several cores."""
    if not tensor.is_floating_point():
        return True
    alone = tensor.device.type != "cpu" or tensor.numel() < ALONE
    return all((map if alone else workers().map)(_is_finite, tensor.flatten().split(CHUNK)))


def _is_finite(chunk: torch.Tensor) -> bool:
    # A sum is quick, and not finite if any term is not; it may also overflow, so then every element is looked at.
    return bool(torch.isfinite(chunk.sum())) or bool(torch.isfinite(chunk).all())


def measure(first: torch.Tensor, second: torch.Tensor, *, absolute: bool = False) -> Sums:
    """The sums over two tensors of one shape, in float32 chunks (float64 for float64 tensors).

    If float32 squares over- or underflow, it is done again in float64.
    Raises `NonFiniteError` if a tensor holds NaN or infinity.

    Args:
        absolute: whether to sum absolute values beside the squares.
    """
    a, b = first.flatten(), second.flatten()

    def each(scratch: Scratch, part: slice) -> Sums:
        x, y, d = scratch.load(a[part], b[part])
        torch.sub(y, x, out=d)
        squares = [torch.dot(v, v).item() for v in (x, y, d)]
        return Sums(*squares, *((v.abs_().sum().item() for v in (x, y, d)) if absolute else ()))

    found = total(_by_chunks(each, a.numel(), _working_dtype(a, b), a.device))
    if not found.trusted:
        sides: tuple[tuple[Side, torch.Tensor], ...] = (("first", a), ("second", b))
        for side, tensor in sides:
            if not all_finite(tensor):
                raise NonFiniteError(side)
        found = total(_by_chunks(each, a.numel(), torch.float64, a.device))
    return found


def shares(theta: float, weight: float) -> tuple[float, float]:
    """The spherical coefficients of instruct and thinking: ``sin((1−λ)θ)/sin θ`` and ``sin(λθ)/sin θ``.

    They are 1−λ and λ below `SMALLEST_ANGLE`, and at opposite directions, where no arc is defined.
    """
    if not SMALLEST_ANGLE < theta < math.pi - OPPOSITE:
        return 1.0 - weight, weight
    return math.sin((1.0 - weight) * theta) / math.sin(theta), math.sin(weight * theta) / math.sin(theta)


def interpolate(
    instruct: torch.Tensor, thinking: torch.Tensor, weight: float, *, spherical: bool = True
) -> torch.Tensor:
    """λ-interpolation of two tensors, worked in float32 (float64 if one is), in the dtype of `thinking`.

    Linear: ``(1−λ)·instruct + λ·thinking`` (arXiv 2510.10977, eq. 2). Spherical
    (Shoemake 1985): the coefficients of `shares`, with θ the angle between the two.

    Args:
        instruct, thinking: tensors of one shape; neither is changed.
        weight: λ. 0 gives `instruct`, 1 gives `thinking`, exactly (the tensor itself, where
            the dtype allows); values outside 0…1 extrapolate.

    Raises:
        NonFiniteError: an input holds NaN or infinity (found when the angle is measured;
            the linear path leaves it to whoever checks the result).
    """
    if weight == 0.0:
        return instruct.to(thinking.dtype)
    if weight == 1.0:
        return thinking
    left, right = shares(measure(instruct, thinking).angle, weight) if spherical else (1.0 - weight, weight)
    a, b = instruct.flatten(), thinking.flatten()
    mixed = torch.empty(thinking.shape, dtype=thinking.dtype, device=thinking.device)
    out = mixed.view(-1)

    def mix(scratch: Scratch, part: slice) -> None:
        x, y, _ = scratch.load(a[part], b[part])
        # Two rounded products and a sum, so that exchanging the inputs changes no bit.
        out[part].copy_(x.mul_(left).add_(y.mul_(right)))

    _by_chunks(mix, a.numel(), _working_dtype(a, b), a.device)
    return mixed


def slerp(t: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """mergekit's slerp of two tensors of one shape and dtype, bit by bit as mergekit computes it in one torch thread.

    Same sums, same roundings; what differs is that no step allocates memory, and that chunks are shared between cores.

    Args:
        t: the weight of `second`, a tensor with one element.
    """
    a, b = first.flatten(), second.flatten()
    dtype = _working_dtype(a)
    t = t.to(dtype)

    def over_chunks(work: Callable[[list[torch.Tensor], slice], T]) -> list[T]:
        def each(scratch: Scratch, part: slice) -> T:
            return work(scratch.load(a[part], b[part])[:2], part)

        return _by_chunks(each, a.numel(), dtype, a.device, MERGEKIT_CHUNK)

    chunks = over_chunks(lambda pair, _: torch.stack([torch.linalg.vector_norm(v) for v in pair]))
    norms = [torch.linalg.vector_norm(torch.stack(parts)) for parts in zip(*chunks, strict=True)]
    size_a, size_b = (torch.where(norm > MERGEKIT_NO_NORM, norm, 1) for norm in norms)
    dots = over_chunks(lambda pair, _: pair[0].div_(size_a).mul_(pair[1].div_(size_b)).sum())
    cosine = torch.stack(dots).sum().clamp(-1, 1)
    straight = cosine.abs() > MERGEKIT_LINEAR
    theta = torch.acos(torch.where(straight, 0, cosine))
    share_a, share_b = (
        torch.where(straight, share, torch.sin(share * theta) / torch.sin(theta)) for share in (1 - t, t)
    )
    mixed = torch.empty(first.shape, dtype=first.dtype)
    out = mixed.view(-1)
    over_chunks(lambda pair, part: out[part].copy_(pair[0].mul_(share_a).add_(pair[1].mul_(share_b))))
    return mixed
