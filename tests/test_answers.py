from __future__ import annotations

import threading
import time

import pytest

from thinkswitch_plugin.data import answers


def test_a_digit_is_the_whole_text_or_nothing() -> None:
    assert answers.extract("digit", " 7\n") == "7"
    assert answers.extract("digit", "7*3=1") is None
    assert answers.extract("digit", "17") is None
    assert answers.extract("digit", "٧") is None
    assert answers.extract("digit", None) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{055}", "55"),
        (r"\boxed{45.0}", "45"),
        (r"\boxed{16 \text{ feet}}", "16"),
        (r"\boxed{\text{016}}", "16"),
        (r"\boxed{70^\circ}", "70"),
        (r"\boxed{1,024}", "1024"),
        (r"\boxed{m+n = 113}", "113"),
        (r"\boxed{-5}", "-5"),
        (r"first \boxed{12}, no: \boxed{220}.", "220"),
        (r"\boxed{220} and then \boxed{}", "220"),
        (r"\boxed{\frac{90}{2}}", "45"),
        (r"\boxed{\sqrt{324^2 + (-432)^2}}", "540"),
        (r"\boxed{2^{10}}", "1024"),
        (r"\boxed{1\,024}", "1024"),
        (r"\boxed{{204}}", "204"),
        (r"\boxed{\textbf{(B) } 204}", "204"),
        (r"\boxed{204 \pmod{1000}}", "204"),
        (r"\boxed{204\text{ cm}^2}", "204"),
        (r"\boxed{\underline{204}}", "204"),
        (r"\boxed{16 \text{ m}}", "16"),
        (r"\boxed{5!}", "120"),
        (r"\boxed{\binom{10}{3}}", "120"),
        (r"\boxed{204}" + " and so on" * 1000, "204"),
        ("The result is 12 for small n. But no.\nTherefore m+n = 37.", "37"),
        (r"The result is $12\sqrt{3}$, so a+b = 15", "15"),
        (r"The answer is $2 \cdot 3^4 = 162$", "162"),
        ("My earlier answer 12 was wrong. The correct value is 204.", "204"),
        ("The number of pairs is 117 when n = 20.", "117"),
        ("Then N = 2016.\n\nThe remainder when 2016 is divided by 1000 is 16.", "16"),
        ("The greatest is 220.\n\nA check:\n- the sum is 990\n- the difference is 22", "220"),
        ("The answer to the problem is $\\boxed{}$ 33", "33"),
        (r"The answer is $25\pi$", None),
        (r"\boxed{2x}", None),
        (r"\boxed{12i}", None),
        (r"\boxed{m=3, n=4}", None),
        (r"\boxed{204 \text{ or } x = 7}", None),
        ("answer" + " " * 100_000 + "x", None),
        ("The answer is **220**.", "220"),
        ("Answer: 220.", "220"),
        ("**Final Answer**: 016", "16"),
        ("**220**", "220"),
        ("220", "220"),
        ("016\n", "16"),
        ("Therefore, the sum is\n$$1 + 9 + 31 = 41$$", "41"),
        ("Therefore, there are 117 ordered pairs $(x,y)$.", "117"),
        (r"\boxed{}" * 5000, None),
        (r"\boxed{" * 100_000, None),
        (r"\boxed{113}" + r"\boxed{" * 100_000, "113"),
        (r"\boxed{12.5}", None),
        (r"\boxed{\frac{1}{3}}", None),
        (r"\boxed{113 \text{ or } 371}", None),
        (r"\boxed{x+1}", None),
        ("It is either 3 or 4.", None),
        ("I cannot solve this.", None),
        ("", None),
        ("<answer>\n113\n</answer>", "113"),
        ("<response>\nThe answer is 113.\n</response>", "113"),
        ("12 of 13\n<final_answer>113</final_answer>", "113"),
        ("None of 1 to 4.\n\n<ANSWER>5</ANSWER>", "5"),
        (r"<answer>\boxed{113}</answer> That took 5 steps.", "113"),
        ("<|begin_of_box|>113<|end_of_box|>", "113"),
        ("<answer></answer> so 113", "113"),
        ("<answer>113", "113"),
        ("He walked 80 miles.#### 80", "80"),
        ("75 + 5 = 80\n#### 80", "80"),
        ("#### $80.", "80"),
        ("#### 2. The second case\nThere are 113.", "113"),
        (r"\boxed{12^{\text{th}}}", "12"),
        (r"\boxed{12^{th}}", "12"),
        (r"\boxed{12^\text{th}}", "12"),
        (r"\boxed{12\textsuperscript{th}}", "12"),
        (r"\boxed{12th}", "12"),
        ("It is the 12th.", "12"),
        (r"\framebox{113}", "113"),
        (r"\framebox[2cm]{113}", "113"),
        ("boxed{113}", "113"),
        ("\x08oxed{113}", "113"),
        (r"\boxed{\boxed{113}}", "113"),
        (r"$\boxed{113}$.", "113"),
        (r"\boxed{\mathbf{113}}", "113"),
        (r"\boxed{\textbf{\text{113}}}", "113"),
        (r"\boxed{\textcolor{red}{113}}", "113"),
        (r"\boxed{\displaystyle 113}", "113"),
        (r"\boxed{0113}", "113"),
        (r"\boxed{113\ \text{cm}^2}", "113"),
        (r"\boxed{113~\mathrm{m/s}}", "113"),
        (r"\boxed{113^{\text{o}}}", "113"),
        (r"\boxed{\$113}", "113"),
        (r"\boxed{113,}", "113"),
        (r"\boxed{1 024}", "1024"),
        (r"\boxed{x = 113 \text{ cm}}", "113"),
        (r"\boxed{\text{Area} = 113}", "113"),
        (r"\boxed{\text{The answer is } 113}", "113"),
        (r"\boxed{N \equiv 113 \pmod{1000}}", "113"),
        (r"\boxed{１１３}", "113"),
        ("答案是１１３。", "113"),
        ("Answer：113", "113"),
        ("the answer is −5", "-5"),
        ("**Answer:** 113", "113"),
        (r"Final answer: \(113\)", "113"),
        (r"Answer: $\mathbf{113}$", "113"),
        ('{\n"answer": "113",\n"confidence": 90\n}', "113"),
        ("The answer is: 113.</s>", "113"),
        ("Final Answer: 1 234", None),
        (r"\boxed{113, 371}", None),
        (r"\boxed{3:4}", None),
        (r"\boxed{\text{None}}", None),
    ],
)
def test_integers(text: str, expected: str | None) -> None:
    assert answers.extract("integer", text) == expected


@pytest.mark.parametrize("box", ["9^{9^{9^{9}}}", "(10^9)!", "2^{99999999}", "9^9^9^9", "1" * 5000])
def test_what_would_take_for_ever_is_no_answer_and_quick_in_any_thread(box: str) -> None:
    found: list[str | None] = ["unset"]
    started = time.monotonic()
    thread = threading.Thread(target=lambda: found.__setitem__(0, answers.extract("integer", rf"\boxed{{{box}}}")))
    thread.start()
    thread.join(20)
    assert found == [None] and time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("016", "16"),
        ("45.0", "45"),
        ("204", "204"),
        (r"\boxed{7}", "7"),
        (r"90^\circ", "90"),
        (r"\frac{90}{2}", "45"),
        ("5 + 75 = 80\n#### 80", "80"),
        (r"\frac{8}{21}", None),
        (r"\left( 3, \frac{\pi}{2} \right)", None),
        ("2024 or 5", None),
        (r"\text{Evelyn}", None),
        ("p - q", None),
        ("", None),
    ],
)
def test_published_answers(text: str, expected: str | None) -> None:
    assert answers.gold("integer", text) == expected
    assert answers.gold("matharena", text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{12} is it, and", "12"),
        ("<answer>12</answer> and", "12"),
        ("**Final Answer:** 12\nTo check", "12"),
        ("### Final Answer\n\n12\n\nTo check", "12"),
        ("so 7 + 5 = 12\n#### 12\n", "12"),
        (r"so \boxed{12} or rather \boxed{1", None),
        (r"Maybe \boxed{12}? Let me", None),
        ("<answer>12", None),
        ("Final answer: 12", None),  # it may go on: 120
        ("#### 12", None),
        ("The answer is 12. Let me check it", None),
        ("It is **12**.\nLet me check", None),
        ("12", None),
        ("", None),
    ],
)
def test_an_unfinished_text_has_the_answer_that_it_stated_as_final(text: str, expected: str | None) -> None:
    assert answers.extract_unfinished("integer", text) == expected


def test_an_unfinished_text_is_no_answer_where_all_of_it_would_be() -> None:
    for kind in ("exact", "digit"):
        assert answers.extract_unfinished(kind, r"\boxed{7}") is None
        assert answers.extract_unfinished(kind, "7") is None
    assert answers.extract_unfinished("decision", "**Final Answer:** maybe\nSince") == "maybe"
    assert answers.extract_unfinished("decision", "The answer is maybe. Since") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{7} and then \boxed{042}", "42"),
        (r"\boxed{\frac{84}{2}}, since 3 is odd", "42"),
        ("There are 40 + 2 = 42 of them", "42"),
        ("It is 42, in 7 steps", "7"),
        (r"\boxed{12.5}", None),  # not its last integer, 5
        ("none", None),
    ],
)
def test_matharena_reads_the_last_box_else_the_last_integer(text: str, expected: str | None) -> None:
    assert answers.extract("matharena", text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"),
        ("**Maybe**, since the trials differ.", "maybe"),
        ("B. no", "no"),
        ("(C)", "maybe"),
        ("A\n", "yes"),
        ('{"step_by_step_thinking": "no, yes, maybe", "answer_choice": "B"}', "no"),
        ('{"answer_choice": "C. maybe", "reason": "yes', "maybe"),
        ("Some say yes, some no.\nFinal Answer: maybe", "maybe"),
        ("Yes or no? The evidence is thin.\n**Final Answer:** **No**", "no"),
        (r"Therefore \boxed{\text{yes}}", "yes"),
        ('Therefore, the answer is "maybe".', "maybe"),
        ("The data support it, so yes.", "yes"),
        ("It could be yes, no or maybe.", None),
        ("If the trial failed, the answer is no. If it did not", None),
        ("The options are A, B and C for yes, no and maybe.", None),
        ("A trial of 40 patients was held", None),
        ("Final Answer: 8", None),
        ("A 12-week program reduced pain", None),
        ("A Cochrane review disagrees", None),
        ("No evidence contradicts the benefit; more trials follow", None),
        ("Conclusion: No difference in mortality, yet symptoms improved.", None),
        ("Option A: yes\nOption B: no\nOption C: maybe\n\nI choose B.", "no"),
        ("yes\n\nExplanation: the answer is no in the subgroup", "yes"),
        ("Final answer: yes, no, maybe", None),
        ("Yes, but with caveats. Final: maybe", "maybe"),
        ("It is unclear if the effect holds\n### Final Answer: no\n\nThe trial was small", "no"),
        ("### Answer\nmaybe\n### Reason\nTrials differ", "maybe"),
        ("The answer is yes in most patients.", "yes"),
        ("<answer>\nNo\n</answer>", "no"),
        ("<response>The trial shows benefit.\nFinal answer: no</response>", "no"),
        ("It may be no.\n<answer>A</answer>", "yes"),
        (r"\framebox{no}", "no"),
        (r"\boxed{\textbf{Maybe.}}", "maybe"),
        (r"Final answer: \(\text{no}\)", "no"),
        ("**Final answer (yes, no or maybe): yes**", "yes"),
        ("ＹＥＳ", "yes"),
        ("#### yes", "yes"),
        (r"\boxed{\text{yes/no/maybe}}", None),
        ("", None),
    ],
)
def test_decisions(text: str, expected: str | None) -> None:
    assert answers.extract("decision", text) == expected


def test_letters_mean_what_the_options_say() -> None:
    assert answers.extract("decision", "B", {"A": "yes", "B": "maybe", "C": "no"}) == "maybe"
    assert answers.extract("decision", "C. no", {"A": "yes", "B": "maybe", "C": "no"}) == "no"


def test_majority_takes_the_earliest_of_equals_and_ignores_what_cannot_be_read() -> None:
    assert answers.majority(["2", None, "1", "1"]) == "1"
    assert answers.majority(["2", "1"]) == "2"
    assert answers.majority([None, None]) is None
