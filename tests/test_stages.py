from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkswitch_plugin.search.stages import Curve, borders, crossing, describe, pick, stages, sweet_spot

WEIGHTS = [0.0, 0.25, 0.5, 0.75, 1.0]


def curve(ratio: list[float], score: list[float], tokens: list[float], n: int = 200, seed: int = 0) -> Curve:
    """A curve with these means, over n questions that are right or wrong at random."""
    rng = np.random.default_rng(seed)

    def draw(means: list[float]) -> Any:
        return np.stack([rng.permutation(np.arange(n) < round(m * n)).astype(float) for m in means])

    return Curve(
        np.array(WEIGHTS[: len(ratio)]),
        draw(score),
        np.repeat(np.array(tokens)[:, None], n, axis=1),
        draw(ratio),
        np.ones((len(ratio), n)),
    )


def test_crossing_is_interpolated_between_neighbours() -> None:
    weights, values = np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.2, 1.0])
    assert crossing(weights, values, 0.05) == pytest.approx(0.125)
    assert crossing(weights, values, 0.6) == pytest.approx(0.75)
    assert crossing(weights, values, 0.0) is None


def test_a_curve_that_falls_back_has_its_upper_border_at_the_last_rise() -> None:
    weights, values = np.linspace(0, 1, 5), np.array([0.0, 0.96, 0.4, 0.9, 1.0])
    assert crossing(weights, values, 0.95) == pytest.approx(0.25 * 0.95 / 0.96)
    assert crossing(weights, values, 0.95, last=True) == pytest.approx(0.75 + 0.25 * 0.5)


def test_borders_of_the_three_stages() -> None:
    found = borders(curve([0.0, 0.0, 0.5, 1.0, 1.0], [0.3, 0.3, 0.6, 1.0, 1.0], [2, 2, 10, 21, 21]))
    assert found["lower"] == pytest.approx(0.275)
    assert found["middle"] == pytest.approx(0.5)
    assert found["upper"] == pytest.approx(0.725)


def test_no_transition_is_said_and_not_invented() -> None:
    thinking = curve([1.0] * 5, [0.9] * 5, [21] * 5)
    found = stages(thinking, draws=20)
    assert found["lower"] is found["middle"] is found["upper"] is None
    assert "thinks at every λ" in describe(found, thinking)
    direct = curve([0.0] * 5, [0.9] * 5, [2] * 5)
    assert "never rises through .5" in describe(stages(direct, draws=20), direct)


def test_lambda_star_is_the_cheapest_of_the_points_as_good_as_the_best() -> None:
    c = curve([0, 0, 1, 1, 1], [0.5, 0.6, 0.95, 0.955, 0.955], [2, 2, 18, 20, 21])
    assert c.weights[pick(c)] == 0.5
    clearly_better = curve([0, 0, 1, 1, 1], [0.5, 0.6, 0.7, 0.98, 0.98], [2, 2, 18, 20, 21])
    assert clearly_better.weights[pick(clearly_better)] == 0.75


def test_lambda_star_never_costs_more_tokens_than_thinking() -> None:
    c = curve([0, 0, 1, 1, 1], [0.5, 0.6, 0.7, 1.0, 0.8], [2, 2, 18, 30, 21])
    assert c.tokens.mean(axis=1)[pick(c)] <= 21


@given(st.integers(0, 1000))
def test_lambda_star_is_within_one_standard_error_of_the_best_affordable_point(seed: int) -> None:
    rng = np.random.default_rng(seed)
    c = curve(sorted(rng.random(5)), list(rng.random(5)), list(np.round(rng.uniform(2, 30, 5), 1)), n=50, seed=seed)
    index, tokens, score = pick(c), c.tokens.mean(axis=1), c.score.mean(axis=1)
    affordable = tokens <= tokens[-1] + 1e-9
    best = max(np.flatnonzero(affordable), key=lambda p: score[p])
    lost = c.score[best] - c.score[index]
    assert affordable[index]
    assert lost.mean() <= lost.std(ddof=1) / np.sqrt(50) + 1e-9


def test_uncertainty_of_lambda_star_covers_the_points_that_noise_could_have_picked() -> None:
    c = curve([0, 0, 1, 1, 1], [0.3, 0.4, 0.9, 0.9, 0.9], [2, 2, 18, 20, 21])
    found = sweet_spot(c, draws=300)
    assert found["interval"][0] <= found["lambda"] <= found["interval"][1]
    assert sum(found["share"].values()) == pytest.approx(1.0)
    low, high = found["thinking"]["difference_ci95"]
    assert low <= found["thinking"]["difference"] <= high
    assert sweet_spot(c, draws=300) == found  # the seed is fixed


def test_without_lambda_1_there_is_no_thinking_checkpoint_to_compare_with() -> None:
    c = curve([0, 0, 1, 1], [0.3, 0.4, 0.9, 0.9], [2, 2, 18, 20])
    assert sweet_spot(c, draws=20)["thinking"] is None


def test_points_are_ordered_by_lambda_and_cut_answers_are_left_out_of_the_ratio() -> None:
    stored = [
        {"lambda": w, "questions": {"score": [1, 0], "tokens": [2, 4], "closed": [closed, 0], "whole": [1, whole]}}
        for w, closed, whole in ((1.0, 1, 0), (0.0, 0, 1))
    ]
    c = Curve.of(stored)
    assert c.weights.tolist() == [0.0, 1.0]
    assert c.think_ratio.tolist() == [0.0, 1.0]


def test_a_difference_that_is_only_due_to_the_choice_is_corrected_away() -> None:
    measured, fixed, covered = [], [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        score = (rng.random((6, 60)) < 0.5).astype(float)  # six points, none better than another
        flat = np.ones((6, 60))
        there = sweet_spot(Curve(np.linspace(0, 1, 6), score, flat, flat, flat), draws=100)["thinking"]
        low, high = there["corrected_ci95"]
        measured.append(there["difference"])
        fixed.append(there["corrected"])
        covered.append(low <= 0 <= high)
    assert np.mean(measured) > 0.06
    assert abs(np.mean(fixed)) < 0.5 * np.mean(measured)
    assert np.mean(covered) > 0.85


def test_a_difference_that_no_choice_could_exaggerate_stays_as_it_is() -> None:
    score = np.stack([np.zeros(50), np.ones(50), np.full(50, 0.5)])
    flat = np.ones((3, 50))
    there = sweet_spot(Curve(np.array([0.0, 0.5, 1.0]), score, flat, flat, flat), draws=100)["thinking"]
    assert there["corrected"] == there["difference"] == 0.5
    assert there["corrected_ci95"] == [0.5, 0.5]
