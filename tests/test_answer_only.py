"""The dataset type in real axolotl: which tokens have a loss, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from axolotl.utils.dict import DictDefault
from datasets import load_dataset

from tests.test_pairs import answer, request
from thinkswitch_plugin.answer_only import load
from thinkswitch_plugin.demo.tokenizer import build_tokenizer
from thinkswitch_plugin.errors import ThinkSwitchError

Write = Callable[[str, Sequence[object]], Path]


def tokenized(path: Path, trace: str | dict[str, str] = "auto", **answers: Any) -> list[dict[str, Any]]:
    tokenizer = build_tokenizer("instruct")
    cfg = DictDefault(
        {
            "sequence_len": 128,
            "train_on_inputs": False,
            "chat_template": "tokenizer_default",
            "thinkswitch": {"answers": answers, "trace": trace} if answers or trace != "auto" else None,
        }
    )
    ds_cfg = DictDefault({"path": str(path), "type": "thinkswitch_plugin.answer_only"})
    dataset = load_dataset("json", data_files=str(path), split="train")
    return list(load(tokenizer, cfg, ds_cfg).wrap_dataset(dataset, process_count=1))


def pair(question: str, text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": text}]}


def test_only_the_answer_and_its_end_token_carry_a_loss(write_jsonl: Write) -> None:
    (row,) = tokenized(write_jsonl("pairs.jsonl", [pair("7*3+4*2", "0")]))
    tokenizer = build_tokenizer("instruct")
    trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.convert_ids_to_tokens(trained) == ["0", "<|im_end|>"]
    assert tokenizer.decode(row["input_ids"]).startswith(
        "<|im_start|>user\n7*3+4*2<|im_end|>\n<|im_start|>assistant\n0"
    )


@pytest.mark.parametrize(
    "key", [{"roles_to_train": ["user"]}, {"train_on_eos": "none"}, {"train_on_eot": "all"}, {"train_on_inputs": True}]
)
def test_a_loss_that_this_type_does_not_have_is_refused(key: dict[str, Any]) -> None:
    tokenizer = build_tokenizer("instruct")
    cfg = DictDefault({"sequence_len": 128, "train_on_inputs": False, "chat_template": "tokenizer_default"})
    if "train_on_inputs" in key:  # axolotl's key for the whole config
        with pytest.raises(ThinkSwitchError, match=r"x.jsonl: `train_on_inputs: True` asks for another loss"):
            load(tokenizer, DictDefault({**cfg, **key}), DictDefault({"path": "x.jsonl"}))
        return
    with pytest.raises(ThinkSwitchError, match=rf"x.jsonl: `{next(iter(key))}: .*asks for another loss"):
        load(tokenizer, cfg, DictDefault({"path": "x.jsonl", **key}))
    load(tokenizer, cfg, DictDefault({"path": "x.jsonl", "roles_to_train": ["assistant"], "train_on_eos": "turn"}))


def test_generations_joined_with_their_requests_give_the_same_rows(write_jsonl: Write) -> None:
    texts = ["2+3", "4+4"]
    write_jsonl("requests.jsonl", [request(f"p{i}", text=t) for i, t in enumerate(texts)])
    generations = write_jsonl(
        "generations.jsonl", [answer("p1-s0", "4+4=8\n</think>\n\n8"), answer("p0-s0", "2+3=5\n</think>\n\n5")]
    )
    pairs = write_jsonl("pairs.jsonl", [pair("2+3", "5"), pair("4+4", "8")])
    assert tokenized(generations) == tokenized(pairs)


def test_selection_of_the_recipe_applies_to_generations(write_jsonl: Write) -> None:
    write_jsonl("requests.jsonl", [request("p0", s) for s in range(3)])
    generations = write_jsonl("generations.jsonl", [answer(f"p0-s{i}", f"t</think>{d}") for i, d in enumerate("344")])
    assert len(tokenized(generations)) == 1
    assert len(tokenized(generations, selection="all")) == 3
    (voted,) = tokenized(generations, selection="vote", kind="digit")
    assert "4" in build_tokenizer("instruct").decode([t for t in voted["labels"] if t != -100])


def test_the_key_of_a_plain_recipe_says_how_traces_are_written_where_the_requests_do_not(write_jsonl: Write) -> None:
    asked = [request(f"p{i}") for i in range(12)]
    for row in asked:
        del row["body"]["metadata"]["trace"]
    write_jsonl("requests.jsonl", asked)
    generations = write_jsonl("generations.jsonl", [answer(f"p{i}-s0", "~2+3~5") for i in range(12)])
    with pytest.raises(
        ThinkSwitchError, match=r"generations\.jsonl, line 1: .* begins '~2\+3~5': set `thinkswitch\.trace`"
    ):
        tokenized(generations)
    rows = tokenized(generations, trace={"open": "~2+", "close": "3~"})
    assert [t for t in rows[0]["labels"] if t != -100][:1] == build_tokenizer("instruct").encode("5")
    with pytest.raises(
        ThinkSwitchError, match=r"`thinkswitch\.trace` is 'thnk', and the nearest convention is 'think'"
    ):
        tokenized(generations, trace="thnk")
    write_jsonl("generations.jsonl", [answer(f"p{i}-s0", "5") for i in range(12)])
    assert len(tokenized(generations, trace="none")) == 12


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (pair("2+3", "2+3=5</think>5"), "pair 1: a trace tag is left in the answer"),
        ({"messages": [{"role": "user", "content": "2+3"}]}, "the last message must be an assistant's answer"),
        (pair("2+3", "5<|im_end|>"), r"pair 1: `messages\[1\]` holds '<\|im_end\|>'"),
        (pair("2+3", "<|channel>thought\n2+3=5<channel|>5"), r"pair 1: .*'<\|channel>"),
        (pair("2+3", "<seed:think>2+3=5</seed:think>5"), "pair 1: a trace tag is left in the answer, '<seed:think>'"),
        (
            pair("2+3", "&lt;think&gt;2+3=5&lt;/think&gt;5"),
            "pair 1: a trace tag is left in the answer, '&lt;think&gt;'",
        ),
        (pair("2+3", "analysis2+3=5assistantfinal5"), "pair 1: a trace tag is left in the answer, 'analysis'"),
        (
            pair("2+3", "## Thinking\n2+3=5\n## Final Response\n5"),
            "pair 1: a trace tag is left in the answer, '## Thinking'",
        ),
        (pair("2+3", "Here is my thought process: 5"), "pair 1: a trace tag is left in the answer, 'Here is my"),
        (pair("2+3", "<answer>5</answer>"), "pair 1: the answer holds '<answer>'"),
        (pair("2+3", "5</s>"), r"pair 1: `messages\[1\]` holds '</s>'"),
        (pair("2+3", "5[|endofturn|]"), r"pair 1: `messages\[1\]` holds '\[\|endofturn\|\]'"),
        (pair("2+3", ""), "the last message must be an assistant's answer"),
        ({"messages": [{"role": "user", "content": 5}]}, r"pair 1: `messages\[0\].content` is missing or not text"),
        ({"messages": "2+3"}, "pair 1: `messages` must be a list"),
        ({"text": "2+3"}, "neither `messages`"),
    ],
)
def test_a_row_that_is_no_clean_pair_is_refused(write_jsonl: Write, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ThinkSwitchError, match=message):
        tokenized(write_jsonl("pairs.jsonl", [row]))
