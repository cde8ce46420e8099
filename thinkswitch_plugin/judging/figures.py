"""Graded questions → the figures of a checkpoint.

Names as in arXiv 2510.10977: Mean@k, Pass@k, Vote@k over k samples a question, tokens a completion, think ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from thinkswitch_plugin.data import answers
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.verdict import Verdict, split, think_ratio, verdict_on

DRAWS = 10_000  # of a bootstrap over questions
DRAWN_AT_ONCE = 4_000_000  # questions; a bootstrap draws the same in parts as in one piece, in less memory


@dataclass(frozen=True, slots=True)
class Sample:
    """One question with its k graded completions; `stratum` is the part of the questions that its document names."""

    doc_id: int
    correct: list[bool] = field(default_factory=list)
    found: list[str | None] = field(default_factory=list)
    closed_trace: list[bool] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    stratum: str | None = None

    def add(self, verdict: Verdict, tokens: int = 0) -> None:
        """Add one completion and its tokens."""
        self.correct.append(verdict.correct is True)
        self.found.append(verdict.answer)
        self.closed_trace.append(verdict.closed_trace)
        self.tokens.append(tokens)
        self.truncated.append(verdict.cut)

    @property
    def mean(self) -> float:
        """Mean@k of this question."""
        return sum(self.correct) / len(self.correct)

    @property
    def vote(self) -> bool:
        """Whether the majority answer is right."""
        winner = answers.majority(self.found)
        return winner is not None and self.correct[self.found.index(winner)]

    @property
    def answered(self) -> int:
        """How many completions have an answer that can be read."""
        return len(self.found) - self.found.count(None)

    @property
    def closed(self) -> int:
        """How many whole completions closed a trace."""
        return sum(c and not t for c, t in zip(self.closed_trace, self.truncated, strict=True))

    @property
    def whole(self) -> int:
        """How many completions were not cut."""
        return self.truncated.count(False)


def question_metrics(kind: str, texts: Sequence[str], gold: str) -> dict[str, Any]:
    """What an lm-eval task reports of one question, from its k completions.

    ``think_ratio`` holds the completions that closed a trace, and those that were not cut. A question whose gold
    answer the kind cannot read has no scores: lm-eval takes each mean over the questions that have the metric.
    """
    sample = Sample(0)
    for text in texts:
        sample.add(verdict_on(kind, split(text), gold))
    reported = {"think_ratio": [sample.closed, sample.whole], "answered": sample.answered / len(texts)}
    if answers.gold(kind, gold) is None:
        return reported
    scores = {"mean@k": sample.mean, "pass@k": float(any(sample.correct)), "vote@k": float(sample.vote)}
    return {**scores, **reported}


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of "at least one of k samples is right" from n ≥ k samples.

    Chen et al., arXiv 2107.03374, eq. 1.
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def summarize(samples: Sequence[Sample]) -> dict[str, Any]:
    """The figures of one checkpoint as `report.json` holds them.

    ``ci95``: Wilson for k = 1 and where all questions' means are equal, bootstrap over questions (10,000
    draws, seed 0) otherwise. ``strata``: n and Mean@k of each part of the questions, if their documents name one in
    a field `stratum`.
    Raises `ThinkSwitchError` if there is no sample.
    """
    if not samples:
        raise ThinkSwitchError("the samples file contains no questions.")
    n, k = len(samples), len(samples[0].correct)
    means = [s.mean for s in samples]
    whole = sum(s.whole for s in samples)
    strata: dict[str, list[float]] = {}
    for sample in samples:
        if sample.stratum is not None:
            strata.setdefault(sample.stratum, []).append(sample.mean)
    by_stratum = {name: {"n": len(part), "mean@k": sum(part) / len(part)} for name, part in sorted(strata.items())}
    return {
        "n": n,
        "k": k,
        "mean@k": sum(means) / n,
        "pass@k": sum(any(s.correct) for s in samples) / n,
        "vote@k": sum(s.vote for s in samples) / n,
        "ci95": interval(means, k),
        "tokens": sum(sum(s.tokens) for s in samples) / (n * k),
        "think_ratio": think_ratio(sum(s.closed for s in samples), whole),
        "truncated": 1 - whole / (n * k),
        "answered": sum(s.answered for s in samples) / (n * k),
        **({"strata": by_stratum} if by_stratum else {}),
    }


def interval(means: Sequence[float], k: int) -> list[float]:
    """95 % interval of a mean over questions, each question's mean in [0, 1]."""
    from scipy.stats import binomtest

    if k > 1 and len(set(means)) > 1:  # where all are alike a bootstrap has nothing to draw from
        return bootstrapped(means)
    found = binomtest(round(sum(means)), len(means)).proportion_ci(method="wilson")
    return [float(found.low), float(found.high)]


def bootstrapped(values: Sequence[float]) -> list[float]:
    """95 % percentile interval of the mean of values, one a question (10,000 draws, seed 0)."""
    import numpy as np
    from scipy.stats import bootstrap

    if len(set(values)) == 1:
        return [values[0], values[0]]
    found = bootstrap(
        (np.asarray(values),),
        np.mean,
        n_resamples=DRAWS,
        batch=max(1, DRAWN_AT_ONCE // len(values)),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return [float(found.low), float(found.high)]
