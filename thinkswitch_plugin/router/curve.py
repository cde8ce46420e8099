"""The performance of a router: accuracy against tokens over the threshold, compared with a random mix at the same share.

A router thinks where p ≥ threshold. The random mix thinks about as many questions, drawn blindly: it is the straight
line between always-instruct and always-thinking. With z = 1 where the router thinks, g the gain in score by
thinking and w = mean z, the router is ahead of the mix by mean(z·g) − w·mean(g), a covariance. Its interval is the
bootstrap of the mean of (z − w)(g − mean g), which has that mean and, to first order, that spread.
Against the mix *with as many tokens*, w is the share that costs as much, and g loses what its tokens buy there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from thinkswitch_plugin.judging.figures import Sample, bootstrapped

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHOWN = 41  # points of a curve with intervals, at most
FEWEST = 20  # questions on either side from which on a difference is tested; an interval of a handful tells nothing
By = Literal["share", "tokens"]
BY: tuple[By, ...] = ("share", "tokens")
BAND_DRAWS = 4_000


@dataclass(frozen=True)
class Judged:
    """Held-out questions with p(think) and what each checkpoint made of them; arrays of (questions,).

    `score` is the mean over a question's samples, in [0, 1]; `suffices` says that instruct is right (by vote).
    """

    p: NDArray[np.float64]
    score: dict[str, NDArray[np.float64]]
    tokens: dict[str, NDArray[np.float64]]
    suffices: NDArray[np.bool_]

    @classmethod
    def of(cls, p: NDArray[np.float64], instruct: Sequence[Sample], thinking: Sequence[Sample]) -> Judged:
        """From the graded samples of both checkpoints, in the order of `p`."""
        both = {"instruct": instruct, "thinking": thinking}
        return cls(
            p=p,
            score={mode: np.array([s.mean for s in found]) for mode, found in both.items()},
            tokens={mode: np.array([np.mean(s.tokens) for s in found]) for mode, found in both.items()},
            suffices=np.array([s.vote for s in instruct]),
        )

    @property
    def gain(self) -> NDArray[np.float64]:
        """What thinking adds to the score of each question."""
        return self.score["thinking"] - self.score["instruct"]

    @property
    def price(self) -> NDArray[np.float64]:
        """What thinking adds to the tokens of each question."""
        return self.tokens["thinking"] - self.tokens["instruct"]


def thresholds(p: NDArray[np.float64]) -> list[float]:
    """Every threshold that routes differently, falling: 1 (never think), then each p."""
    return [1.0, *(float(value) for value in np.unique(p)[::-1])]


def chosen(judged: Judged, think: NDArray[np.bool_]) -> dict[str, float]:
    """Share of thinking, accuracy and tokens when exactly these questions are thought about."""
    accuracy, tokens = (
        float(np.where(think, values["thinking"], values["instruct"]).mean())
        for values in (judged.score, judged.tokens)
    )
    return {"share": float(think.mean()), "accuracy": accuracy, "tokens": tokens}


def mixed(judged: Judged, share: float) -> dict[str, float]:
    """What to expect of a random mix that thinks about this share of the questions."""
    accuracy = judged.score["instruct"].mean() + share * judged.gain.mean()
    tokens = judged.tokens["instruct"].mean() + share * judged.price.mean()
    return {"share": share, "accuracy": float(accuracy), "tokens": float(tokens)}


def ahead(judged: Judged, think: NDArray[np.bool_], by: By = "share") -> NDArray[np.float64]:
    """Values, one a question, whose mean is how far the router is ahead of the random mix.

    Args:
        by: the mix with the same `share` of thinking, or with the same mean `tokens`.
    """
    z, gain = think.astype(float), judged.gain
    price = judged.price if by == "tokens" and judged.price.mean() else np.ones_like(gain)
    weight = (z * price).mean() / price.mean()
    return np.asarray((z - weight) * (gain - gain.mean() / price.mean() * price))


def curve(judged: Judged) -> list[dict[str, Any]]:
    """A point a threshold: share, accuracy, tokens of the router, and those of the random mix at its share.

    On `SHOWN` of them, evenly over the shares, stand how far the router is ahead and the 95 % interval of that; and
    where it sends `FEWEST` questions or more each way, a 95 % band that holds for all these shares at once.
    """
    every: list[dict[str, Any]] = []
    for threshold in thresholds(judged.p):
        point: dict[str, Any] = {"threshold": threshold, **chosen(judged, judged.p >= threshold)}
        every.append({**point, "mix": mixed(judged, point["share"])["accuracy"]})
    shares = np.array([point["share"] for point in every])
    for index in sorted({int(np.abs(shares - wanted).argmin()) for wanted in np.linspace(0, 1, SHOWN)}):
        every[index] |= compared(judged, judged.p >= every[index]["threshold"])
    n = len(judged.p)
    wide = [p for p in every if "ahead_at_same_share" in p and FEWEST <= round(n * p["share"]) <= n - FEWEST]
    for by in BY if wide else ():
        values = np.stack([ahead(judged, judged.p >= p["threshold"], by) for p in wide], axis=1)
        for point, half in zip(wide, band(values), strict=True):
            middle = point[f"ahead_at_same_{by}"]
            point[f"ahead_at_same_{by}_band"] = [middle - float(half), middle + float(half)]
    return every


def band(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half-widths of a 95 % band of several means that holds for all of them at once; (means,).

    It is as many standard errors wide as the largest deviation of a bootstrap over questions stays below in 95 of 100
    draws. One by one, forty intervals would miss zero now and then by chance.

    Args:
        values: (questions, means).
    """
    n = len(values)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=BAND_DRAWS)
    drawn = counts @ values / n - values.mean(axis=0)
    errors = drawn.std(axis=0)
    farthest = np.max(np.abs(drawn) / np.where(errors > 0, errors, 1.0), axis=1)
    return np.asarray(np.quantile(farthest, 0.95) * errors)


def compared(judged: Judged, think: NDArray[np.bool_]) -> dict[str, Any]:
    """How far the router is ahead of the random mix, with the same share and with the same tokens."""
    found: dict[str, Any] = {}
    for by in BY:
        values = ahead(judged, think, by)
        found |= {
            f"ahead_at_same_{by}": float(values.mean()),
            f"ahead_at_same_{by}_ci95": bootstrapped(values.tolist()),
        }
    return found


def area(judged: Judged) -> dict[str, Any]:
    """How far the router is ahead on the average over all shares (by the trapezoid rule), and its 95 % interval."""
    masks = [judged.p >= threshold for threshold in thresholds(judged.p)]
    steps = np.diff([mask.mean() for mask in masks]) / 2
    weights = np.append(steps, 0) + np.append(0, steps)  # so that one mask's values are in memory at a time
    values = np.asarray(sum(weight * ahead(judged, mask) for weight, mask in zip(weights, masks, strict=True)))
    return {"ahead": float(values.mean()), "ci95": bootstrapped(values.tolist())}


def oracle(judged: Judged) -> dict[str, float]:
    """Instruct where it is right, else thinking: what no router can be expected to reach."""
    return chosen(judged, ~judged.suffices)


def verdict(points: Sequence[dict[str, Any]], by: By = "share") -> dict[str, Any]:
    """Where the router is better and worse than the random mix, by the rule that the sentence states.

    Args:
        points: those of `curve`; only those with a band count.

    Returns:
        ``better`` and ``worse``: ranges of shares whose 95 % bands lie wholly above or below zero; ``lowest``
        and ``highest`` difference with their shares; ``sentence``.
    """
    name = f"ahead_at_same_{by}"
    seen = [p for p in points if f"{name}_band" in p]
    if not seen:
        sentence = f"At no threshold were {FEWEST} questions sent each way: too few to tell."
        return {"better": [], "worse": [], "sentence": sentence}
    limits, shares = [p[f"{name}_band"] for p in seen], [p["share"] for p in seen]
    better = ranges(shares, [low > 0 for low, _ in limits])
    worse = ranges(shares, [high < 0 for _, high in limits])
    ends = {
        end: {"ahead": p[name], "share": p["share"]}
        for end, p in (("lowest", min(seen, key=lambda p: p[name])), ("highest", max(seen, key=lambda p: p[name])))
    }
    what = f"the random mix with the same {'share of thinking' if by == 'share' else 'mean tokens'}"
    span = f"compared from {100 * shares[0]:.0f} to {100 * shares[-1]:.0f} % thinking"
    if worse:
        text = f"The router is worse than {what} {_as_words(worse)} (outside the 95 % band)"
        text += f", and better {_as_words(better)}." if better else "."
    elif better:
        text = f"The router is no worse than {what} anywhere, and better {_as_words(better)} (outside the 95 % band)."
    else:
        text = f"The router cannot be told from {what} anywhere (the 95 % band holds zero)."
    text += f" Lowest and highest difference, {span}: " + ", ".join(
        f"{100 * end['ahead']:+.1f} points at {100 * end['share']:.0f} % thinking" for end in ends.values()
    )
    return {"better": better, "worse": worse, **ends, "sentence": f"{text}."}


def ranges(at: Sequence[float], true: Sequence[bool]) -> list[list[float]]:
    """First and last place of every unbroken row of true values."""
    rows = (list(row) for now, row in itertools.groupby(zip(at, true, strict=True), key=lambda pair: pair[1]) if now)
    return [[row[0][0], row[-1][0]] for row in rows]


def _as_words(found: Sequence[Sequence[float]]) -> str:
    return " and ".join(
        f"at {100 * low:.0f} %" if low == high else f"between {100 * low:.0f} and {100 * high:.0f} %"
        for low, high in found
    )
