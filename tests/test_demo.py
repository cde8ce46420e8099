from __future__ import annotations

from thinkswitch_plugin.data.traces import opens_trace, split
from thinkswitch_plugin.demo import task
from thinkswitch_plugin.demo.tokenizer import build_tokenizer


def test_a_chain_is_worked_from_left_to_right_modulo_10() -> None:
    assert task.steps("7*3+4*2") == ["7*3=1", "1+4=5", "5*2=0"]
    assert task.answer("2-5-9") == "8"
    assert split(task.trace("7*3+4*2")).answer == "0"


def test_held_out_questions_are_fixed_distinct_and_never_trained_on() -> None:
    held_out = task.held_out()
    assert len(set(held_out)) == 400 and held_out == task.held_out()
    assert not set(held_out) & set(task.training_prompts(0, 2048))
    assert {len(q) for q in held_out} == {5, 7}
    assert task.training_prompts(0, 8) != task.training_prompts(1, 8)


def test_the_tokenizer_gives_back_what_it_read_and_only_thinking_opens_a_trace() -> None:
    instruct, thinking = build_tokenizer("instruct"), build_tokenizer("thinking")
    text = "<think>\n7*3=1\n1+4=5\n</think>\n\n5"
    assert instruct.decode(instruct.encode(text)) == text
    assert (opens_trace(instruct), opens_trace(thinking)) == (False, True)
    assert instruct.get_vocab() == thinking.get_vocab()
