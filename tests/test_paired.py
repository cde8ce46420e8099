"""Comparisons of two checkpoints, checked against scipy and statsmodels on the same data."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from scipy import stats

from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging import paired
from thinkswitch_plugin.judging.figures import Sample, interval


def sample(doc_id: int, correct: list[bool]) -> Sample:
    k = len(correct)
    found = ["right" if c else f"wrong {j}" for j, c in enumerate(correct)]
    return Sample(doc_id, correct, found, [True] * k, [5] * k, [False] * k)


def table(both: int, won: int, lost: int, neither: int) -> tuple[list[Sample], list[Sample]]:
    cells = [(True, True)] * both + [(False, True)] * won + [(True, False)] * lost + [(False, False)] * neither
    return [sample(n, [old]) for n, (old, _) in enumerate(cells)], [
        sample(n, [new]) for n, (_, new) in enumerate(cells)
    ]


@pytest.mark.parametrize(
    "cells",
    [(10, 5, 1, 4), (36, 2, 12, 0), (200, 40, 41, 119), (0, 6, 0, 0), (3, 1, 0, 9), (50, 0, 7, 3), (1, 4, 4, 1)],
)
def test_the_test_is_that_of_statsmodels_and_of_scipy(cells: tuple[int, int, int, int]) -> None:
    from statsmodels.stats.contingency_tables import mcnemar

    both, won, lost, neither = cells
    found = paired.compare(*table(*cells))
    assert (len(found["won"]), len(found["lost"])) == (won, lost)
    assert found["p"] == pytest.approx(mcnemar([[both, lost], [won, neither]], exact=True).pvalue, abs=1e-12)
    assert found["p"] == pytest.approx(stats.binomtest(won, won + lost, 0.5).pvalue, abs=1e-12)
    assert found["verdict"] == ("more than noise" if found["p"] < 0.05 else "within noise")


def test_nothing_changed_is_within_noise_and_still_uncertain() -> None:
    found = paired.compare(*table(20, 0, 0, 10))
    assert found["p"] == 1.0 and found["difference"] == 0.0 and found["verdict"] == "within noise"
    assert "None changed" in found["sentence"] and "too few to tell" in found["sentence"]
    low, high = found["ci95"]
    assert low < 0 < high


@pytest.mark.parametrize(("won", "told"), [(5, False), (6, True)])
def test_five_changed_questions_cannot_tell_and_six_can(won: int, told: bool) -> None:
    found = paired.compare(*table(20, won, 0, 10))
    assert ("too few to tell" in found["sentence"]) is not told
    assert (found["verdict"] == paired.MORE) is told


def test_the_sentence_counts_and_judges() -> None:
    text = paired.compare(*table(200, 60, 20, 120))["sentence"]
    assert text.startswith("60 questions won and 20 lost of 400 (exact McNemar p < .001): more than noise. ")
    assert "Accuracy +10.0 points (95 % interval +5.7 to +14.2)." in text


def test_the_length_of_the_answers_is_compared_question_by_question() -> None:
    draw = random.Random(0)
    before, after = table(20, 10, 2, 8)
    for one, other in zip(before, after, strict=True):
        one.tokens[0] = draw.randrange(10, 200)
        other.tokens[0] = one.tokens[0] + draw.randrange(0, 9)
    found = paired.compare(before, after)
    differences = [other.tokens[0] - one.tokens[0] for one, other in zip(before, after, strict=True)]
    test = stats.ttest_1samp(differences, 0)
    tokens = found["tokens"]
    assert (tokens["p"], tokens["ci95"]) == (test.pvalue, pytest.approx(list(test.confidence_interval())))
    assert (
        tokens["difference"] == pytest.approx(tokens["after"] - tokens["before"]) and tokens["verdict"] == paired.MORE
    )
    assert f"Tokens an answer {tokens['before']:.1f} → {tokens['after']:.1f} (+" in found["sentence"]
    same = paired.compare(before, before)["tokens"]
    assert (same["ci95"], same["p"], same["verdict"]) == ([0.0, 0.0], 1.0, paired.NOISE)


def test_the_vote_decides_where_there_are_several_samples_and_the_mean_is_bootstrapped() -> None:
    draw = random.Random(0)
    before = [sample(n, [draw.random() < 0.4 for _ in range(8)]) for n in range(60)]
    after = [sample(n, [draw.random() < 0.6 for _ in range(8)]) for n in range(60)]
    found = paired.compare(before, after)
    voted = [(one.found.count("right") > 1 or one.correct[0], other.found.count("right") > 1 or other.correct[0])
             for one, other in zip(before, after, strict=True)]  # fmt: skip
    assert found["won"] == [n for n, (old, new) in enumerate(voted) if new and not old]
    differences = [(sum(b.correct) - sum(a.correct)) / 8 for a, b in zip(before, after, strict=True)]
    expected = stats.bootstrap(
        (differences,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert found["ci95"] == pytest.approx([expected.low, expected.high], abs=1e-12)
    assert found["difference"] == pytest.approx(np.mean(differences)) and "By vote, " in found["sentence"]
    means = [[sum(s.correct) / 8 for s in side] for side in (after, before)]
    assert found["p"] == pytest.approx(stats.ttest_rel(*means).pvalue, abs=1e-12)
    assert found["p_of_vote"] == pytest.approx(
        stats.binomtest(len(found["won"]), len(found["won"]) + len(found["lost"])).pvalue, abs=1e-12
    )


def test_a_mean_that_rises_where_no_vote_changes_is_more_than_noise() -> None:
    before = [sample(n, [n % 2 == 0] + [False] * 7) for n in range(30)]
    after = [sample(n, [False] * (5 + n % 3) + [True] * (3 - n % 3)) for n in range(30)]
    for one in (*before, *after):
        one.found[:] = ["wrong"] * 8  # the majority is wrong throughout
        one.correct.sort()
    found = paired.compare(before, after)
    assert not found["won"] and not found["lost"] and found["ci95"][0] > 0
    assert found["verdict"] == paired.MORE and paired.direction(found) == "better"
    assert found["sentence"].startswith("Mean@8 +") and "too few" not in found["sentence"]
    assert paired.direction(paired.compare(after, before)) == "worse"


@pytest.mark.parametrize("n", [1, 5])
def test_equal_differences_of_means_show_nothing(n: int) -> None:
    before, after = [sample(j, [False, False]) for j in range(n)], [sample(j, [True, False]) for j in range(n)]
    assert paired.compare(before, after)["verdict"] == paired.NOISE
    assert paired.compare(before, before)["p"] == 1.0


def test_a_bootstrap_in_parts_draws_what_one_in_one_piece_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from thinkswitch_plugin.judging import figures

    values = list(np.random.default_rng(1).integers(0, 9, 501) / 8)
    whole = interval(values, 8)
    for size in (501, 5010, 50_100):  # 1, 10 and 100 draws at once
        monkeypatch.setattr(figures, "DRAWN_AT_ONCE", size)
        assert interval(values, 8) == whole
    unbatched = stats.bootstrap(
        (np.asarray(values),), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert whole == [unbatched.low, unbatched.high]


def test_newcombes_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Exact coverage over every outcome of 14 questions, for three true tables."""
    n = 14
    for truth in ((0.4, 0.3, 0.1, 0.2), (0.7, 0.1, 0.1, 0.1), (0.2, 0.2, 0.4, 0.2)):
        covered = 0.0
        for both, won, lost in itertools.product(range(n + 1), repeat=3):
            neither = n - both - won - lost
            if neither >= 0:
                low, high = paired.newcombe(both, won, lost, n)
                if low <= truth[1] - truth[2] <= high:
                    covered += stats.multinomial.pmf((both, won, lost, neither), n, truth)
        assert 0.925 < covered < 0.99, truth


def test_newcombes_interval_is_that_of_independent_proportions_where_pairs_are_uncorrelated() -> None:
    from statsmodels.stats.proportion import confint_proportions_2indep

    found = paired.newcombe(both=24, won=36, lost=16, n=100)  # 60 % and 40 % right, independent: 24 = 100 · .6 · .4
    assert found == pytest.approx(confint_proportions_2indep(60, 100, 40, 100, method="newcomb"), abs=1e-12)


def test_newcombes_interval_swaps_its_sides_when_before_and_after_are_swapped() -> None:
    low, high = paired.newcombe(30, 12, 3, 60)
    assert paired.newcombe(30, 3, 12, 60) == pytest.approx([-high, -low])


def test_questions_are_paired_by_their_id_and_others_left_out() -> None:
    before = [sample(3, [True]), sample(1, [False]), sample(9, [True])]
    after = [sample(1, [True]), sample(2, [True]), sample(3, [False])]
    found = paired.compare(before, after)
    assert (found["n"], found["won"], found["lost"]) == (2, [1], [3])
    with pytest.raises(ThinkSwitchError, match="no question in common"):
        paired.compare(before, [sample(7, [True])])


def test_a_p_is_never_written_as_if_it_were_on_the_other_side_of_the_level() -> None:
    assert [paired.p_value(p) for p in (0.0499, 0.04951, 0.0494, 0.05, 0.0502)] == [
        "p < .05",
        "p < .05",
        "p = .049",
        "p = .050",
        "p = .050",
    ]
    assert [paired.p_value(p) for p in (0.0, 0.00099, 0.001, 0.9999, 1.0)] == ["p < .001"] * 2 + [
        "p = .001",
        "p = 1",
        "p = 1",
    ]


@pytest.mark.parametrize(("won", "lost", "where"), [(20, 2, "better"), (2, 20, "worse"), (5, 4, ""), (0, 0, "")])
def test_a_loss_is_not_taken_for_a_gain(won: int, lost: int, where: str) -> None:
    assert paired.direction(paired.compare(*table(20, won, lost, 10))) == where
