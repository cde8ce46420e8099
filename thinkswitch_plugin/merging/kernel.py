"""Interpolation of one pair of tensors. λ is the weight of the thinking checkpoint."""

from __future__ import annotations

import math

import torch

# Below this angle (radians) the sphere is a straight line to float32 precision.
SMALLEST_ANGLE = 1e-4
CHUNK = 2**22  # elements worked on in float64 at once


def angle(instruct: torch.Tensor, thinking: torch.Tensor) -> float:
    """The angle in radians between two tensors of one shape, each taken as one vector; 0 if one is zero.

    Computed as ``2·atan2(‖u−v‖, ‖u+v‖)`` of the unit vectors, which stays exact for
    small angles where the arc cosine does not (Kahan, "How Futile are Mindless
    Assessments of Roundoff", 2006, §12). Works in float64, a chunk at a time.
    """
    a, b = instruct.flatten(), thinking.flatten()
    norms = [math.sqrt(sum(float(x.double().square().sum()) for x in tensor.split(CHUNK))) for tensor in (a, b)]
    if 0.0 in norms:
        return 0.0
    apart = together = 0.0
    for x, y in zip(a.split(CHUNK), b.split(CHUNK), strict=True):
        u, v = x.double() / norms[0], y.double() / norms[1]
        apart += float((u - v).square().sum())
        together += float((u + v).square().sum())
    return 2 * math.atan2(math.sqrt(apart), math.sqrt(together))


def interpolate(
    instruct: torch.Tensor, thinking: torch.Tensor, weight: float, *, spherical: bool = True
) -> torch.Tensor:
    """λ-interpolation of two tensors in float32, returned in the dtype of `thinking`.

    Linear: ``(1−λ)·instruct + λ·thinking`` (arXiv 2510.10977, eq. 2). Spherical
    (Shoemake 1985): the coefficients become ``sin((1−λ)θ)/sin θ`` and ``sin(λθ)/sin θ``
    with θ the angle between the two; below `SMALLEST_ANGLE`, and at opposite
    directions where the arc is not defined, it is linear.

    Args:
        instruct, thinking: tensors of one shape; neither is changed.
        weight: λ. 0 gives `instruct`, 1 gives `thinking`, exactly; other values extrapolate.
    """
    if weight == 0.0:
        return instruct.to(thinking.dtype)
    if weight == 1.0:
        return thinking.clone()
    share = torch.tensor([1.0 - weight, weight], dtype=torch.float64)
    if spherical:
        theta = angle(instruct, thinking)
        if SMALLEST_ANGLE < theta < torch.pi - SMALLEST_ANGLE:
            share = torch.sin(share * theta) / torch.sin(torch.tensor(theta, dtype=torch.float64))
    mixed = instruct.float() * share[0].item()
    mixed.add_(thinking.float(), alpha=share[1].item())
    return mixed.to(thinking.dtype)
