from __future__ import annotations

from thinkswitch_plugin import answers


def test_a_digit_is_the_whole_text_or_nothing() -> None:
    assert answers.extract("digit", " 7\n") == "7"
    assert answers.extract("digit", "7*3=1") is None
    assert answers.extract("digit", "17") is None
    assert answers.extract("digit", "٧") is None
    assert answers.extract("digit", None) is None


def test_majority_takes_the_earliest_of_equals_and_ignores_what_cannot_be_read() -> None:
    assert answers.majority(["2", None, "1", "1"]) == "1"
    assert answers.majority(["2", "1"]) == "2"
    assert answers.majority([None, None]) is None
