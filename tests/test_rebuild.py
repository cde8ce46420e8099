from __future__ import annotations

import pytest

from thinkswitch_plugin.merging.rebuild import still_thinks


@pytest.mark.parametrize(
    ("closed", "whole", "asked", "accepted"),
    [
        (64, 64, 64, True),
        (62, 64, 64, True),
        (61, 64, 64, False),
        (14, 15, 15, True),
        (13, 15, 15, False),
        (3, 3, 15, False),
        (490, 500, 500, True),
        (489, 500, 500, False),
    ],
)
def test_the_check_has_one_prompt_of_tolerance_on_small_sets_only(
    closed: int, whole: int, asked: int, accepted: bool
) -> None:
    assert still_thinks(closed, whole, asked, needed=0.98, whole_share=1.0) is accepted


def test_a_candidate_may_be_cut_as_often_as_the_original_was() -> None:
    assert still_thinks(5, 5, 15, needed=0.98, whole_share=0.5)
    assert not still_thinks(2, 2, 15, needed=0.98, whole_share=0.5)
    assert not still_thinks(0, 0, 15, needed=0.0, whole_share=0.0)
