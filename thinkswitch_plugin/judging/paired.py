"""Compare two checkpoints on the same questions: questions won and lost, and if the difference is more than noise.

The test is McNemar's, exact, on the questions whose verdict changed: is the share of wins among them
one half? A verdict is right or wrong; of k > 1 samples it is their vote. What is more than noise is said of
Mean@k: by that test and Newcombe's interval for k = 1; for k > 1 by a paired t-test over the questions' means
and a bootstrap over questions, since a vote need not change where the mean does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.figures import Sample, bootstrapped, interval

LEVEL = 0.05
FEWEST = 6  # changed questions; with five, even all won, p = 2 · .5⁵ = .0625
NOISE, MORE = "within noise", "more than noise"


def compare(before: Sequence[Sample], after: Sequence[Sample], score: str = "accuracy") -> dict[str, Any]:
    """Two evaluations, paired by question.

    Args:
        score: what Mean@1 is called in the sentence.

    Returns:
        ``n`` questions that both hold, of ``k`` samples; ``won`` and ``lost``, their doc_ids; ``p_of_vote``, of the
        exact McNemar test; ``p``, the same for k = 1, else of the t-test; ``test``, which one;
        ``difference`` of Mean@k, after minus before, and its ``ci95``; ``interval``, by which method;
        ``tokens``, the length of the answers ``before`` and ``after`` by `lengths`;
        ``verdict``, `NOISE` or `MORE`; ``sentence``, all of it in words.

    Raises:
        ThinkSwitchError: no question is in both.
    """
    from scipy.stats import binomtest, ttest_1samp

    old = {s.doc_id: s for s in before}
    pairs = [(old[s.doc_id], s) for s in after if s.doc_id in old]
    if not pairs:
        raise ThinkSwitchError("the two evaluations have no question in common; evaluate both with one task.")
    verdicts = [(new.doc_id, one.vote, new.vote) for one, new in pairs]
    won = [doc_id for doc_id, one, other in verdicts if other and not one]
    lost = [doc_id for doc_id, one, other in verdicts if one and not other]
    n, changed, k = len(pairs), len(won) + len(lost), max(len(s.correct) for pair in pairs for s in pair)
    of_vote = float(binomtest(len(won), changed).pvalue) if changed else 1.0
    if k == 1:
        both = sum(one and other for _, one, other in verdicts)
        limits, method = newcombe(both, len(won), len(lost), n), "Newcombe"
        p, test = of_vote, "exact McNemar"
    else:
        differences = [new.mean - one.mean for one, new in pairs]
        limits, method = bootstrapped(differences), "bootstrap over questions"
        # One question has no spread, and equal differences none either: nothing is shown by them.
        p, test = float(ttest_1samp(differences, 0).pvalue) if len(set(differences)) > 1 else 1.0, "paired t-test"
    found: dict[str, Any] = {
        "n": n,
        "k": k,
        "won": won,
        "lost": lost,
        "p": p,
        "test": test,
        "p_of_vote": of_vote,
        "difference": sum(new.mean for _, new in pairs) / n - sum(one.mean for one, _ in pairs) / n,
        "ci95": limits,
        "interval": method,
        "tokens": lengths(pairs),
        "verdict": MORE if p < LEVEL else NOISE,
    }
    return {**found, "sentence": f"{sentence(found, score)} {about_lengths(found['tokens'])}"}


def lengths(pairs: Sequence[tuple[Sample, Sample]]) -> dict[str, Any]:
    """Tokens an answer ``before`` and ``after``, their ``difference`` with ``ci95`` and ``p`` by a paired t-test over
    the questions' means, and the ``verdict``."""
    from scipy.stats import ttest_1samp

    before, after = ([sum(s.tokens) / len(s.tokens) for s in side] for side in zip(*pairs, strict=True))
    differences = [new - old for old, new in zip(before, after, strict=True)]
    mean, p, limits = sum(differences) / len(pairs), 1.0, [0.0, 0.0]
    if len(set(differences)) > 1:
        test = ttest_1samp(differences, 0)
        found, p = test.confidence_interval(), float(test.pvalue)
        limits = [float(found.low), float(found.high)]
    elif mean:  # each question by the same number of tokens: nothing is left to chance
        p, limits = 0.0, [mean, mean]
    return {
        "before": sum(before) / len(pairs),
        "after": sum(after) / len(pairs),
        "difference": mean,
        "ci95": limits,
        "p": p,
        "verdict": MORE if p < LEVEL else NOISE,
    }


def about_lengths(tokens: dict[str, Any]) -> str:
    """The length of the answers in words: `Tokens an answer 19.0 → 21.5 (+2.5, 95 % interval +1.9 to +3.1): …`."""
    low, high = tokens["ci95"]
    change = f"{tokens['difference']:+z.1f}, 95 % interval {low:+z.1f} to {high:+z.1f}"
    return f"Tokens an answer {tokens['before']:.1f} → {tokens['after']:.1f} ({change}): {tokens['verdict']}."


def newcombe(both: int, won: int, lost: int, n: int) -> list[float]:
    """95 % interval of the difference of two proportions of the same n questions, after minus before.

    Newcombe, Statistics in Medicine 17 (1998), 2635-2650, method 10: Wilson's intervals of the two
    proportions, put together with the correlation of the pairs.

    Args:
        both: questions right before and after.
    """
    after, before = both + won, both + lost
    p, q = after / n, before / n
    (p_low, p_high), (q_low, q_high) = (interval([1.0] * right + [0.0] * (n - right), 1) for right in (after, before))
    product = both * (n - both - won - lost) - won * lost
    margins = math.sqrt(after * (n - after) * before * (n - before))
    shift = max(product - n / 2, 0.0) if product > 0 else product
    phi = shift / margins if margins else 0.0

    def distance(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * phi * one * other + other**2, 0.0))

    return [p - q - distance(p - p_low, q_high - q), p - q + distance(p_high - p, q - q_low)]


def sentence(found: dict[str, Any], score: str = "accuracy") -> str:
    """A comparison in words: `163 questions won and 12 lost of 400 (exact McNemar p < .001): more than noise. …`."""
    won, lost = len(found["won"]), len(found["lost"])
    low, high = (100 * v for v in found["ci95"])
    changed = f"{won} question{'' if won == 1 else 's'} won and {lost} lost of {found['n']}"
    mcnemar = f"exact McNemar {p_value(found['p_of_vote'])}"
    change = f"{100 * found['difference']:+z.1f} points (95 % interval {low:+z.1f} to {high:+z.1f}"
    if found["k"] > 1:
        test = f"{found['test']} over questions {p_value(found['p'])}"
        return f"Mean@{found['k']} {change}; {test}): {found['verdict']}. By vote, {changed} ({mcnemar})."
    text = f"{changed} ({mcnemar}): {found['verdict']}. {score.capitalize()} {change})."
    if won + lost < FEWEST:
        few = f"Only {won + lost} changed" if won + lost else "None changed"
        text += f" {few}, and fewer than {FEWEST} cannot reach p < .05: too few to tell."
    return text


def direction(found: dict[str, Any]) -> str:
    """The direction of a comparison: `better` or `worse`; empty if it is within noise."""
    if found["verdict"] == NOISE:
        return ""
    return "better" if found["difference"] > 0 else "worse"


def p_value(p: float) -> str:
    """`p = .035`, `p < .001`; never one that reads as if it were on the other side of `LEVEL`."""
    if p < 0.001:
        return "p < .001"
    if p < LEVEL <= round(p, 3):
        return "p < .05"
    return "p = 1" if p > 0.9995 else f"p = {p:.3f}".replace("0.", ".")
