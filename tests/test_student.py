"""The student: the same weights, the format tokens, and placeholders that only the template inserts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import checkpoints
from thinkswitch_plugin.data import traces
from thinkswitch_plugin.data.formats import ANSWER, POST, PRE, THINK, render
from thinkswitch_plugin.demo.tokenizer import build_tokenizer
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.perception.student import SOFT, make_student


def base(folder: Path, mode: Any = "instruct", **config: Any) -> Path:
    checkpoints.write(folder, checkpoints.qwen3(0), **config)
    build_tokenizer(mode).save_pretrained(folder)
    return folder


def asked(student: Path, *turns: tuple[str, str]) -> str:
    tokenizer = AutoTokenizer.from_pretrained(student)
    messages = [{"role": role, "content": content} for role, content in turns]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def test_new_tokens_start_like_trained_ones_and_all_other_rows_stay(tmp_path: Path) -> None:
    make_student(base(tmp_path / "base"), tmp_path / "student", soft_tokens=0)
    old, new = checkpoints.read(tmp_path / "base"), checkpoints.read(tmp_path / "student")
    added = sorted(AutoTokenizer.from_pretrained(tmp_path / "student").convert_tokens_to_ids([*ANSWER, SOFT]))
    first = added[0]
    table = "model.embed_tokens.weight"
    changed = (old[table] != new[table]).any(dim=1).nonzero().flatten().tolist()
    assert changed == added
    norms = new[table].float().norm(dim=1)
    assert 0.5 < float(norms[added].mean() / norms[:first].mean()) < 2
    make_student(tmp_path / "student", tmp_path / "again", soft_tokens=4)  # nothing is new now
    assert checkpoints.equal(new, checkpoints.read(tmp_path / "again"))


def test_it_has_the_weights_of_its_base_and_every_format_token_is_one_token(tmp_path: Path) -> None:
    make_student(base(tmp_path / "base"), tmp_path / "student", soft_tokens=0)
    old, new = checkpoints.read(tmp_path / "base"), checkpoints.read(tmp_path / "student")
    tables = ("embed_tokens.weight", "lm_head.weight")
    assert checkpoints.equal(*({k: v for k, v in held.items() if not k.endswith(tables)} for held in (old, new)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    old = build_tokenizer("instruct").get_vocab()
    assert {token: place for token, place in tokenizer.get_vocab().items() if token in old} == old
    for token in (*THINK, *ANSWER, SOFT):
        assert len(tokenizer.encode(token)) == 1
    for form in (PRE, POST):
        text = render(form, "2+3=5\n5*2=0", "0")
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").config.vocab_size == checkpoints.VOCABULARY


def test_the_base_stays_as_it_is_when_the_student_is_written_again(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for soft in (4, 0):
        make_student(folder, tmp_path / "student", soft_tokens=soft)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "student"]


def test_without_placeholders_the_template_is_that_of_the_base(tmp_path: Path) -> None:
    make_student(base(tmp_path / "base"), tmp_path / "student", soft_tokens=0)
    turns = ("user", "2+3"), ("assistant", "5"), ("user", "4+4")
    assert asked(tmp_path / "student", *turns) == asked(tmp_path / "base", *turns)


@pytest.mark.parametrize("soft", [1, 4])
def test_the_placeholders_begin_the_last_user_turn_and_no_other(tmp_path: Path, soft: int) -> None:
    make_student(base(tmp_path / "base"), tmp_path / "student", soft_tokens=soft)
    turns = ("system", "s"), ("user", "2+3"), ("assistant", "5"), ("user", "4+4")
    marked = (*turns[:3], ("user", SOFT * soft + "4+4"))
    assert asked(tmp_path / "student", *turns) == asked(tmp_path / "base", *marked)
    answered = (*turns[:1], ("user", "2+3"), ("assistant", "5"))
    assert asked(tmp_path / "student", *answered) == asked(
        tmp_path / "base", turns[0], ("user", SOFT * soft + "2+3"), ("assistant", "5")
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "2+3"}], return_dict=False)
    assert ids.count(tokenizer.convert_tokens_to_ids(SOFT)) == soft
    assert not traces.opens_trace(tokenizer)
    assert traces.control_token(f"what is {SOFT}?") == SOFT  # so no prompt can contain one


def test_what_cannot_be_a_student_is_refused(tmp_path: Path) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(ThinkSwitchError, match=message):
            make_student(folder, tmp_path / "student", soft_tokens=4)
        assert not (tmp_path / "student").exists()

    refused(base(tmp_path / "thinking", "thinking"), "opens the trace by itself")
    refused(base(tmp_path / "full", vocab_size=54), r"has 54 rows, and with <answer>, </answer>, <\|soft\|> its")
    silent = base(tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    refused(silent, "has no chat template")
    refused(tmp_path / "nothing", "is not a checkpoint folder")


def test_tokens_that_are_there_are_taken_as_they_are(tmp_path: Path) -> None:
    make_student(base(tmp_path / "base"), tmp_path / "first", soft_tokens=0)
    make_student(tmp_path / "first", tmp_path / "second", soft_tokens=0)
    names = ("tokenizer.json", "chat_template.jinja")
    first, second = ([(tmp_path / n / name).read_text() for name in names] for n in ("first", "second"))
    assert json.loads(first[0]) == json.loads(second[0]) and first[1] == second[1]
