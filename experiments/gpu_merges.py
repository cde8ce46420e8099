"""Merging on the GPU and moving λ in resident weights: seconds for all tensors, bandwidth, and distance from float64."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from gpu_shape import Record, Setting, pair, peak, synchronize

sys.path.append(str(Path(__file__).resolve().parent.parent))
from thinkswitch_plugin.merging.kernel import interpolate, measure, shares

WEIGHT = 0.8  # λ
LOOKED_AT = ("embed_tokens", "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")  # compared with float64

Tensors = dict[str, torch.Tensor]
Merge = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def seconds_of(work: Callable[[], object], setting: Setting, repeats: int = 5) -> float:
    """The median time of some work, once warm."""
    times = []
    for _ in range(repeats + 1):
        synchronize(setting)
        began = time.perf_counter()
        work()
        synchronize(setting)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def size(*checkpoints: Tensors) -> int:
    """Bytes of all tensors."""
    return sum(t.nbytes for checkpoint in checkpoints for t in checkpoint.values())


def copy(into: Tensors, source: Tensors) -> None:
    """Copy a whole checkpoint on the device: the bandwidth that a merge can be measured against."""
    for name, tensor in source.items():
        into[name].copy_(tensor)


def ours(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The project's spherical interpolation."""
    return interpolate(first, second, WEIGHT)


def mergekits(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """mergekit's slerp as its executor calls it: a batch of one, thinking as base, t the share of instruct."""
    from mergekit.merge_methods.slerp import slerp

    return slerp(torch.tensor([1 - WEIGHT], device=first.device), second[None], first[None])[0]


def in_float64(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Shoemake's formula as it is written, in float64."""
    a, b = first.double(), second.double()
    theta = torch.acos(((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1))
    if theta < 1e-6:
        return (1 - WEIGHT) * a + WEIGHT * b
    return (torch.sin((1 - WEIGHT) * theta) * a + torch.sin(WEIGHT * theta) * b) / torch.sin(theta)


def largest_differences(first: Tensors, second: Tensors, merge: Merge) -> tuple[float, float]:
    """The largest |merge − float64| over a few tensors, and what rounding float64's result to the dtype alone gives."""
    found, rounding = 0.0, 0.0
    for name in (n for n in first if any(part in n for part in LOOKED_AT)):
        exact = in_float64(first[name], second[name])
        found = max(found, (merge(first[name], second[name]).double() - exact).abs().max().item())
        rounding = max(rounding, (exact.to(first[name].dtype).double() - exact).abs().max().item())
    return found, rounding


def merges(setting: Setting, record: Record) -> None:
    """Our kernel and mergekit's formula, tensor by tensor, beside a plain copy."""
    first, second = pair(setting)
    into = {name: torch.empty_like(tensor) for name, tensor in first.items()}
    seconds = seconds_of(lambda: copy(into, first), setting)
    record("plain copy", seconds=seconds, rate=size(first, into) / seconds / 1e9, unit="GB/s")
    moved = size(first, second, into)  # read once, written once: the least that a merge can move

    def all_tensors(merge: Merge) -> None:
        for name in first:
            merge(first[name], second[name])

    for case, merge in (("ThinkSwitch's kernel, slerp", ours), ("mergekit's slerp", mergekits)):
        try:
            seconds = seconds_of(partial(all_tensors, merge), setting, repeats=3)
        except ImportError as error:
            record(case, note=f"mergekit cannot be imported: {error}")
            continue
        difference, rounding = largest_differences(first, second, merge)
        record(
            f"{case}, {len(first)} tensors",
            seconds=seconds,
            rate=moved / seconds / 1e9,
            unit="GB/s",
            note=f"from float64 at most {difference:.2e}, rounding alone {rounding:.2e}",
            **peak(setting),
        )


def live(setting: Setting, record: Record) -> None:
    """A λ in place: from two resident checkpoints into a third, then with the two in host memory or in files."""
    first, second = pair(setting)
    into = {name: torch.empty_like(tensor) for name, tensor in first.items()}
    moved = size(first, second, into)

    def timed(case: str, work: Callable[[], object], *, bytes_moved: int = moved, repeats: int = 5) -> None:
        seconds = seconds_of(work, setting, repeats)
        record(f"{case}, a λ", seconds=seconds, rate=bytes_moved / seconds / 1e9, unit="GB/s", **peak(setting))

    def linear(a: Tensors, b: Tensors) -> None:
        for name, tensor in into.items():
            x, y = (source[name].to(setting.device, non_blocking=True) for source in (a, b))
            torch.lerp(x, y, WEIGHT, out=tensor)

    def measured() -> None:
        for name, tensor in into.items():
            tensor.copy_(interpolate(first[name], second[name], WEIGHT))

    timed("in GPU memory, linear (torch.lerp)", lambda: linear(first, second))
    timed("in GPU memory, slerp by ThinkSwitch's kernel", measured, repeats=3)
    if setting.checkpoint.is_dir():
        files = sorted(setting.checkpoint.glob("*.safetensors"))
        timed("from files in the page cache", lambda: _from_files(files, into), bytes_moved=2 * size(into), repeats=2)
    else:
        record("from files in the page cache, a λ", note="there is no checkpoint to read")
    host = [{n: _in_host_memory(t, setting) for n, t in checkpoint.items()} for checkpoint in (first, second)]
    # counted: what crosses the bus
    timed("from pinned host memory, linear", lambda: linear(*host), bytes_moved=size(*host), repeats=2)
    _known_angles(setting, first, second, into, timed)


def _known_angles(setting: Setting, first: Tensors, second: Tensors, into: Tensors, timed: Callable[..., None]) -> None:
    """Slerp in one pass: the angles do not depend on λ, so a server measures them once."""

    def mix(a: torch.Tensor, b: torch.Tensor, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(a.float() * left + b.float() * right)

    fused = torch.compile(mix, dynamic=True) if setting.on_gpu else mix
    coefficients = {n: shares(measure(first[n], second[n]).angle, WEIGHT) for n in first}
    weights = {n: torch.tensor(pair_of_weights, device=setting.device) for n, pair_of_weights in coefficients.items()}

    def all_tensors() -> None:
        for name, tensor in into.items():
            fused(first[name].view(-1), second[name].view(-1), *weights[name].unbind(), tensor.view(-1))

    timed("in GPU memory, slerp with angles known (one fused pass)", all_tensors)
    worst = max((into[n].float() - interpolate(first[n], second[n], WEIGHT).float()).abs().max().item() for n in into)
    if not worst < 0.01:  # one step of bfloat16 at 1 is .008
        raise RuntimeError(f"the fused pass differs from the kernel by {worst}")
    if setting.on_gpu:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # λ can still change: the graph reads `weights`
            all_tensors()
        timed("the same, replayed as a CUDA graph", graph.replay)


def _in_host_memory(tensor: torch.Tensor, setting: Setting) -> torch.Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=setting.on_gpu).copy_(tensor)


def _from_files(files: list[Path], into: Tensors) -> None:
    """Read the one checkpoint twice, as two would be read, and interpolate into `into`."""
    from safetensors import safe_open

    device = str(next(iter(into.values())).device)
    for file in files:
        with safe_open(file, "pt", device=device) as one, safe_open(file, "pt", device=device) as other:
            for name in one.keys():  # noqa: SIM118
                torch.lerp(one.get_tensor(name), other.get_tensor(name), WEIGHT, out=into[name])
