from __future__ import annotations

import math

import mergekit.merge_methods.slerp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mergekit import merge_methods
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.slerp import slerp as mergekit_slerp

from thinkswitch_plugin.merging import kernel
from thinkswitch_plugin.merging.kernel import NonFiniteError, interpolate, measure, slerp

seeds = st.integers(0, 50)
weights = st.floats(-0.5, 1.5, allow_nan=False)


def pair_of_tensors(seed: int, far: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(8, 16, generator=generator)
    return a, a + far * torch.randn(8, 16, generator=generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@given(seed=seeds, spherical=st.booleans())
def test_lambda_0_and_1_return_the_inputs(dtype: torch.dtype, seed: int, spherical: bool) -> None:
    a, b = (t.to(dtype) for t in pair_of_tensors(seed))
    assert torch.equal(interpolate(a, b, 0.0, spherical=spherical), a)
    assert torch.equal(interpolate(a, b, 1.0, spherical=spherical), b)


@given(seeds, weights)
def test_spherical_agrees_with_mergekits_slerp(seed: int, weight: float) -> None:
    a, b = pair_of_tensors(seed)
    theirs = mergekit_slerp(torch.tensor([1 - weight]), b[None], a[None])[0]
    assert torch.allclose(interpolate(a, b, weight), theirs, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("far", [0.0, 0.005, 0.054, 3.0])  # mergekit falls back to a straight line at the first two
def test_slerp_equals_mergekits_in_one_thread_bit_by_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, far: float
) -> None:
    for module in (kernel, mergekit.merge_methods.slerp):  # several chunks in a small tensor
        monkeypatch.setattr(module, "MERGEKIT_CHUNK" if module is kernel else "_CHUNK_ELEMENTS", 10_007)
    generator = torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for count, scale in ((1, 1.0), (300, 1.0), (300, 0.0), (300, 1e-12), (45_000, 0.02)):
            a, noise = (scale * torch.randn(count, generator=generator) for _ in range(2))
            first, second = a.to(dtype), (a + far * noise).to(dtype)
            for share in (0.0, 0.2, 1.0, 1.4):
                t = torch.tensor([share], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
                theirs = mergekit_slerp(t, first[None], second[None])[0]
                assert torch.equal(slerp(t[0], first, second), theirs), (count, scale, share)
    finally:
        torch.set_num_threads(threads)


@given(seeds, weights, st.booleans())
def test_exchanging_the_inputs_and_lambda_changes_nothing(seed: int, weight: float, spherical: bool) -> None:
    a, b = pair_of_tensors(seed)
    one, other = interpolate(a, b, weight, spherical=spherical), interpolate(b, a, 1 - weight, spherical=spherical)
    assert torch.allclose(one, other, atol=2e-6)


@given(seeds, st.floats(0, 1))
def test_spherical_keeps_the_norm_of_equal_norm_inputs(seed: int, weight: float) -> None:
    a, b = pair_of_tensors(seed)
    b = b * (a.norm() / b.norm())
    assert interpolate(a, b, weight).norm().item() == pytest.approx(a.norm().item(), rel=1e-5)


@given(seeds, st.floats(1e-6, 1e-2), st.floats(0, 1))
def test_spherical_meets_linear_as_the_angle_goes_to_zero(seed: int, far: float, weight: float) -> None:
    a, b = pair_of_tensors(seed, far)
    difference = (interpolate(a, b, weight) - interpolate(a, b, weight, spherical=False)).norm() / a.norm()
    assert difference.item() < max(far**2, 1e-6)


@given(seeds, weights)
def test_linear_is_task_arithmetic_from_any_base(seed: int, weight: float) -> None:
    # arXiv 2510.10977, eq. 7: base + λ(thinking − base) + (1−λ)(instruct − base), the base cancels
    a, b = pair_of_tensors(seed)
    base = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed + 1000))
    group = TensorGroup.from_tensors([base, a, b], ids=["base", "instruct", "thinking"], base_index=0)
    parameters = {"weight": {"instruct": 1 - weight, "thinking": weight}, "normalize": False}
    (theirs,) = merge_methods.get("task_arithmetic")([group], parameters=parameters)
    assert torch.allclose(interpolate(a, b, weight, spherical=False), theirs, atol=1e-5)


@pytest.mark.parametrize("theta", [1e-6, 0.05, 1.0, 3.0])
def test_angle_is_exact_where_the_arc_cosine_is_not(theta: float) -> None:
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    b = torch.tensor([math.cos(theta), math.sin(theta)], dtype=torch.float64)
    assert measure(a, b).angle == pytest.approx(theta, rel=1e-9)


def test_small_angles_are_found_in_float32_too() -> None:
    a, b = pair_of_tensors(1, far=1e-3)
    assert measure(a, b).angle == pytest.approx(measure(a.double(), b.double()).angle, rel=1e-4)


def test_zero_tensors_and_opposite_directions_are_linear() -> None:
    a = torch.tensor([1.0, 2.0])
    assert torch.equal(interpolate(torch.zeros(2), a, 0.5), 0.5 * a)
    assert torch.allclose(interpolate(a, -a, 0.75), -0.5 * a)
    assert measure(torch.zeros(3), torch.ones(3)).angle == 0.0


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_squares_that_over_or_underflow_are_summed_in_float64(scale: float) -> None:
    a, b = pair_of_tensors(2)
    assert measure(a * scale, b * scale).angle == pytest.approx(measure(a, b).angle, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_refused_and_the_side_is_named(value: float) -> None:
    a, b = pair_of_tensors(0)
    for side, tensor in (("first", a), ("second", b)):
        kept = tensor[3, 3].item()
        tensor[3, 3] = value
        with pytest.raises(NonFiniteError) as caught:
            interpolate(a, b, 0.5)
        assert caught.value.side == side
        tensor[3, 3] = kept


def test_chunks_on_several_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(300, 400), torch.randn(300, 400)
    whole = interpolate(a, b, 0.3)
    monkeypatch.setattr(kernel, "CHUNK", 7001)
    monkeypatch.setattr(kernel, "ALONE", 0)
    assert torch.allclose(interpolate(a, b, 0.3), whole, atol=1e-6)
    assert interpolate(a.bfloat16(), b, 0.3, spherical=False).dtype == torch.float32


@given(seeds, st.floats(0.01, 1.0))
def test_how_far_slerp_and_linear_differ_has_a_closed_form(seed: int, far: float) -> None:
    a, b = (t.double() for t in pair_of_tensors(seed, far))
    straight = interpolate(a, b, 0.5, spherical=False)
    gap = (interpolate(a, b, 0.5) - straight).norm() / straight.norm()
    assert measure(a, b).sphere_gap == pytest.approx(gap.item(), rel=1e-6, abs=1e-12)
