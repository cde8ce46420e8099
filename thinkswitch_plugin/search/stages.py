"""Where the three stages of interpolation lie, and the sweet spot λ*, each by a stated rule.

Stages (arXiv 2510.10977): below the lower border the think ratio is under .05, above
the upper border it is at least .95, between them lies the transition. λ* is the cheapest of
the points that are as good as the best: see `sweet_spot`. All uncertainty is a bootstrap
over questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinkswitch_plugin.judging.verdict import think_ratio

Array = NDArray[np.float64]

LOW, HALF, HIGH = 0.05, 0.5, 0.95
DRAWS = 2000
PER_QUESTION = ("score", "tokens", "closed", "whole")


@dataclass(frozen=True)
class Curve:
    """One sweep at one sampling setting, by point (rows, λ ascending) and question (columns).

    Attributes:
        weights: λ of each point, (points,).
        score, tokens: per question means over its samples, (points, questions).
        closed, whole: how many of a question's completions closed a trace, and were not cut.
    """

    weights: Array
    score: Array
    tokens: Array
    closed: Array
    whole: Array

    @classmethod
    def of(cls, points: list[dict[str, Any]]) -> Curve:
        """From stored candidates (`candidates.evaluate_all`), each with its λ under ``lambda``."""
        ordered = sorted(points, key=lambda p: p["lambda"])
        rows = {key: np.array([p["questions"][key] for p in ordered], dtype=np.float64) for key in PER_QUESTION}
        return cls(np.array([p["lambda"] for p in ordered], dtype=np.float64), **rows)

    def take(self, questions: NDArray[np.int64]) -> Curve:
        """The same curve over a draw of questions."""
        return Curve(self.weights, *(getattr(self, key)[:, questions] for key in PER_QUESTION))

    def resampled(self, draws: int) -> NDArray[np.int64]:
        """Questions drawn with replacement, (draws, questions); the same ones each time."""
        n = self.score.shape[1]
        return np.random.default_rng(0).integers(0, n, (draws, n))

    @property
    def think_ratio(self) -> Array:
        """`verdict.think_ratio` of each point."""
        counts = zip(self.closed.sum(axis=1), self.whole.sum(axis=1), strict=True)
        return np.array([think_ratio(closed, whole) for closed, whole in counts], dtype=np.float64)


def crossing(weights: Array, values: Array, level: float, *, last: bool = False) -> float | None:
    """The λ at which `values` rise through `level`, linearly between two neighbouring points.

    Args:
        last: take the last upward crossing instead of the first.

    Returns:
        None if the values never rise through the level between two points.
    """
    found = [
        float(a + (b - a) * (level - u) / (v - u))
        for a, b, u, v in zip(weights[:-1], weights[1:], values[:-1], values[1:], strict=True)
        if u < level <= v
    ]
    return (found[-1] if last else found[0]) if found else None


def borders(curve: Curve) -> dict[str, float | None]:
    """Both borders and the middle of the transition, as λ.

    ``lower``: first crossing of .05; ``middle``: first of .5; ``upper``: last of .95,
    so that above it no point falls back.
    """
    ratio = curve.think_ratio
    return {
        "lower": crossing(curve.weights, ratio, LOW),
        "middle": crossing(curve.weights, ratio, HALF),
        "upper": crossing(curve.weights, ratio, HIGH, last=True),
    }


def pick(curve: Curve) -> int:
    """The index of λ*; see `sweet_spot`."""
    score, tokens = curve.score.mean(axis=1), curve.tokens.mean(axis=1)
    thinking = np.flatnonzero(curve.weights == 1.0)
    limit = tokens[thinking[0]] if len(thinking) else np.inf
    affordable = np.flatnonzero(tokens <= limit + 1e-9)
    best = affordable[np.argmax(score[affordable])]
    n = curve.score.shape[1]
    lost = curve.score[best] - curve.score[affordable]
    error = lost.std(axis=1, ddof=1) / np.sqrt(n) if n > 1 else np.zeros(len(affordable))
    as_good = affordable[lost.mean(axis=1) <= error + 1e-12]
    return int(min(as_good, key=lambda p: (tokens[p], -score[p])))


def sweet_spot(curve: Curve, *, draws: int = DRAWS) -> dict[str, Any]:
    """λ*: of the points that cost no more tokens than the thinking checkpoint (λ = 1, where it
    was swept), and whose Mean@k is within one paired standard error of the best of these, the
    one with the fewest tokens (the one-standard-error rule of Breiman et al. 1984, §3.4.3).

    Returns:
        ``lambda``, its ``mean@k`` and ``tokens``; ``thinking``: the same at λ = 1, with the
        paired difference in Mean@k and its 95 % bootstrap interval, both as if λ* had been
        given, and ``corrected`` and ``corrected_ci95``, see `corrected`; ``interval``: 2.5 and
        97.5 % of λ* over the draws; ``share``: how often each λ was picked.
    """
    index = pick(curve)
    questions = curve.resampled(draws)
    chosen = np.array([pick(curve.take(q)) for q in questions])
    picked = curve.weights[chosen]
    values, counts = np.unique(picked, return_counts=True)
    found: dict[str, Any] = {
        "lambda": float(curve.weights[index]),
        "mean@k": float(curve.score[index].mean()),
        "tokens": float(curve.tokens[index].mean()),
        "interval": [float(v) for v in np.quantile(picked, [0.025, 0.975], method="nearest")],
        "share": {f"{v:g}": float(c) / draws for v, c in zip(values, counts, strict=True)},
        "thinking": None,
    }
    thinking = np.flatnonzero(curve.weights == 1.0)
    if len(thinking):
        difference = curve.score[index] - curve.score[thinking[0]]
        means = [difference[q].mean() for q in questions]
        found["thinking"] = {
            "mean@k": float(curve.score[thinking[0]].mean()),
            "tokens": float(curve.tokens[thinking[0]].mean()),
            "difference": float(difference.mean()),
            "difference_ci95": [float(v) for v in np.quantile(means, [0.025, 0.975])],
            **corrected(curve.score - curve.score[thinking[0]], index, questions, chosen),
        }
    return found


def corrected(
    differences: Array, index: int, questions: NDArray[np.int64], chosen: NDArray[np.int64]
) -> dict[str, Any]:
    """The difference to λ = 1 at λ*, less what it owes to λ* having been chosen on the same questions.

    λ* is chosen anew on every draw. What it gains there beyond what the same λ has on all questions is
    the optimism of the choice (Efron and Tibshirani 1993, §17.6); its mean over the draws is taken off.
    The interval is that of the draws' own differences, the optimism taken off as well.

    Args:
        differences: to λ = 1, (points, questions).
        index: the point of λ*.
        questions, chosen: the draws, and the point that each of them chose.
    """
    on_draw = np.array([differences[c, q].mean() for c, q in zip(chosen, questions, strict=True)])
    optimism = (on_draw - differences.mean(axis=1)[chosen]).mean()
    interval = np.quantile(on_draw, [0.025, 0.975]) - optimism
    return {
        "corrected": float(differences[index].mean() - optimism),
        "corrected_ci95": [float(v) for v in interval],
    }


def stages(curve: Curve, *, draws: int = DRAWS) -> dict[str, Any]:
    """`borders`, each with its 95 % bootstrap interval over questions (of the draws that had one)."""
    drawn = [borders(curve.take(questions)) for questions in curve.resampled(draws)]
    result: dict[str, Any] = {}
    for name, value in borders(curve).items():
        values = [found for d in drawn if (found := d[name]) is not None]
        interval = [float(v) for v in np.quantile(values, [0.025, 0.975])] if values else None
        result |= {name: value, f"{name}_ci95": interval}
    return result


def describe(found: dict[str, Any], curve: Curve) -> str:
    """The stages in one sentence."""
    ratio = curve.think_ratio
    if found["lower"] is None and ratio.min() >= HIGH:
        return (
            "It thinks at every λ of this sweep, so there is no transition to find (does the template open the trace?)."
        )
    if found["middle"] is None:
        return f"The think ratio never rises through .5 here (from {ratio.min():.2f} to {ratio.max():.2f})."
    lower = "under the first point" if found["lower"] is None else f"at λ = {found['lower']:.2f}"
    upper = "beyond the last point" if found["upper"] is None else f"at λ = {found['upper']:.2f}"
    return f"Thinking sets in {lower}, is even at λ = {found['middle']:.2f} and is complete {upper}."
