"""`loss: distribution`: what is asked, kept, aligned with the student's tokens, learnt by axolotl's KD trainer, and refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from axolotl.utils.dict import DictDefault
from datasets import load_dataset

from experiments.losses import run_losses
from tests.conftest import ROOT
from tests.faulty_server import FaultyServer
from tests.test_pairs import answer, request
from thinkswitch_plugin import files
from thinkswitch_plugin.answer_only import load
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.data import distributions
from thinkswitch_plugin.data.pairs import write_pairs
from thinkswitch_plugin.demo.tokenizer import build_tokenizer
from thinkswitch_plugin.engines.generate import generate
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.plugin import ThinkSwitchPlugin
from thinkswitch_plugin.pre_thinking import load as load_pre
from thinkswitch_plugin.recipe import Recipe, iteration_config, load_recipe
from thinkswitch_plugin.run import Run, open_run, stages
from thinkswitch_plugin.training import distil
from thinkswitch_plugin.training.targets import targets

Write = Callable[[str, Sequence[object]], Path]
TOKENIZER = build_tokenizer("thinking")


def entries(text: str, second: float = 0.1) -> list[dict[str, Any]]:
    """What a server returns for a completion: each token with probability 1 - second, and another one with the rest."""
    found = []
    for token in TOKENIZER.encode(text):
        top = [(token, math.log(1 - second)), ((token + 1) % len(TOKENIZER), math.log(second))]
        found.append(distributions.entry(token, TOKENIZER.decode([token]), top))
    return found


def answered(custom_id: str, content: str, end: str = "<|im_end|>", **others: Any) -> dict[str, Any]:
    row = answer(custom_id, content)
    row["response"]["body"]["choices"][0]["logprobs"] = {"content": entries(content + end), **others}
    return row


def asked(prompt: str, text: str = "2+3") -> dict[str, Any]:
    row = request(prompt, text=text)
    row["body"] |= {"max_tokens": 64, **distributions.request(2)}
    return row


def named(row: dict[str, Any]) -> list[str]:
    return [TOKENIZER.decode([distributions.token_id(one)]) for one in row["logprobs"]]


def tokenized(path: Path, **keys: Any) -> list[dict[str, Any]]:
    cfg = DictDefault({"sequence_len": 128, "train_on_inputs": False, "chat_template": "tokenizer_default", **keys})
    ds_cfg = DictDefault({"path": str(path), "type": "thinkswitch_plugin.answer_only"})
    dataset = load_dataset("json", data_files=str(path), split="train")
    return list(load(build_tokenizer("instruct"), cfg, ds_cfg).wrap_dataset(dataset, process_count=1))


def test_a_pair_keeps_the_distributions_of_its_answers_tokens_and_end_only(write_jsonl: Write, tmp_path: Path) -> None:
    requests = write_jsonl("requests.jsonl", [asked("p0"), asked("p1"), request("p2")])
    texts = ["2+3=5\n</think>\n\n5", "2+3=5</think><answer>15</answer>", "2+3=5</think>5"]
    rows = [answered(f"p{place}-s0", text) for place, text in enumerate(texts)]
    write_pairs(requests, write_jsonl("generations.jsonl", rows), tmp_path / "pairs.jsonl")
    first, wrapped, plain = (row for _, row in files.read_jsonl(tmp_path / "pairs.jsonl"))
    assert named(first) == ["5", "<|im_end|>"]
    assert named(wrapped)[:2] == ["1", "5"] and wrapped["messages"][-1]["content"] == "15"
    assert "logprobs" not in plain  # its request did not ask for them


def test_row_t_holds_the_distribution_of_token_t_plus_1_and_only_where_the_answer_is_learnt(write_jsonl: Write) -> None:
    pair = {"messages": [{"role": "user", "content": "7*3"}, {"role": "assistant", "content": "21"}]}
    path = write_jsonl("pairs.jsonl", [{**pair, "logprobs": entries("21<|im_end|>", 0.2)}])
    (row,) = tokenized(path, kd_trainer=True, kd_temperature=2.0)
    trained = [place for place, label in enumerate(row["labels"]) if label != -100]
    assert TOKENIZER.convert_ids_to_tokens([row["labels"][place] for place in trained]) == ["2", "1", "<|im_end|>"]
    share = math.sqrt(0.8) / (math.sqrt(0.8) + math.sqrt(0.2))  # p ** (1 / temperature), together 1
    for place in range(len(row["labels"])):
        ids, logprobs = row["target_token_ids"][place], row["target_logprobs"][place]
        if place + 1 in trained:
            assert ids == [row["input_ids"][place + 1], (row["input_ids"][place + 1] + 1) % len(TOKENIZER)]
            assert [math.exp(value) for value in logprobs] == pytest.approx([share, 1 - share])
            assert row["target_mask"][place] == [1, 1]
        else:
            assert (ids, logprobs, row["target_mask"][place]) == ([], [], [])
    (plain,) = tokenized(path)
    assert {name: row[name] for name in plain} == plain  # the same ids and labels; no columns for another trainer
    assert "target_mask" not in plain


def test_generations_with_their_requests_give_the_same_columns(write_jsonl: Write, tmp_path: Path) -> None:
    requests = write_jsonl("requests.jsonl", [asked("p0"), asked("p1")])
    rows = [answered("p0-s0", "2+3=5</think>5"), answered("p1-s0", "4+4=8</think>\n\n8")]
    generations = write_jsonl("generations.jsonl", rows)
    write_pairs(requests, generations, tmp_path / "pairs.jsonl")
    assert tokenized(generations, kd_trainer=True) == tokenized(tmp_path / "pairs.jsonl", kd_trainer=True)


def test_a_token_that_the_teacher_did_not_write_is_learnt_as_itself() -> None:
    found = targets(
        [-100, 7, 8, 9],
        [*entries("2")[:0], {"token": "token_id:7", "top_logprobs": [{"token": "token_id:7", "logprob": -3.0}]}],
    )
    assert found["target_token_ids"] == [[7], [8], [9], []]
    assert found["target_logprobs"] == [[0.0], [0.0], [0.0], []]


def test_what_is_left_of_a_trace_before_the_answer_does_not_stand_for_it() -> None:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": f"token_id:{token}",
            "top_logprobs": [{"token": f"token_id:{token}", "logprob": logprob}] * 1
            + [{"token": "token_id:1", "logprob": 0.0}],
        }

    trace, answer = [entry(7, -9.0), entry(8, -9.0)], [entry(7, -1.0), entry(8, -1.0)]
    assert targets([-100, 7, 8], [*trace, *answer]) == targets([-100, 7, 8], answer)


def recipe(**keys: Any) -> Recipe:
    loaded = load_recipe(ROOT / "recipes" / "arithmetic.yaml")
    values = loaded.keys.model_dump(by_alias=True, exclude_defaults=True) | {"loss": "distribution", **keys}
    return replace(loaded, keys=type(loaded.keys).model_validate(values))


def test_a_changed_key_asks_again_only_if_other_distributions_are_needed(tmp_path: Path) -> None:
    def values(loaded: Recipe) -> dict[str, Any]:
        run = Run(tmp_path / "arithmetic", loaded, 0, "embedded", 1)
        return {stage.name: stage.values for stage in stages(run) if stage.iteration == 1}

    def changed(loaded: Recipe) -> set[str]:
        return {name for name, found in values(loaded).items() if found != before[name]}

    before = values(recipe())
    assert changed(recipe(distribution={"temperature": 2.0, "beta": 0.5, "cross_entropy": 0.1})) == {"train"}
    assert changed(recipe(distribution={"top_k": 4})) == {"requests"}
    assert changed(recipe(loss="answers")) == {"requests", "train"}


@pytest.mark.slow
@pytest.mark.usefixtures("forked_engines")
def test_axolotls_kd_trainer_brings_instruct_nearer_to_the_distributions(finished_run: Path, tmp_path: Path) -> None:
    requests, generations, pairs = (tmp_path / name for name in ("requests.jsonl", "generations.jsonl", "pairs.jsonl"))
    start = files.read_json(finished_run / "iter-0" / "pair.json")
    rows = itertools.islice(files.read_jsonl(finished_run / "iter-1" / "requests.jsonl"), 64)
    bodies = ({**row, "body": {**row["body"], **distributions.request(4)}} for _, row in rows)
    requests.write_bytes(b"".join(map(files.dumps_line, bodies)))
    learnt = recipe(distribution={"top_k": 4, "beta": 0.0, "cross_entropy": 0.25})
    generate(requests, generations, start["thinking"]["path"], "embedded", learnt.keys.engine, log=tmp_path / "log")
    write_pairs(requests, generations, pairs)
    for _, row in files.read_jsonl(pairs):
        assert row["messages"][-1]["content"] in "".join(named(row)) and len(row["logprobs"]) == 2  # digit and end
        assert all(len(one["top_logprobs"]) == 4 for one in row["logprobs"])
    config = iteration_config(learnt, base_model=start["instruct"]["path"], pairs=pairs, here=tmp_path, seed=0)
    assert config["plugins"][-1] == "axolotl.integrations.kd.KDPlugin"
    losses = distil.train({**config, "logging_steps": 1}, tmp_path, options=(), minimum=1e-4)["losses"]
    assert losses[-1][1] < 0.5 * losses[0][1]


@pytest.mark.slow
def test_losses_are_compared_only_on_a_run_that_has_distributions(finished_run: Path) -> None:
    with pytest.raises(ThinkSwitchError, match=r"has no distributions, or one sample a prompt; .*make losses"):
        run_losses(open_run(finished_run))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"distribution": {"top_k": 50}}, r"`distribution.top_k: 50` is more than vLLM returns \(20; hosted"),
        ({"distribution": {"cross_entropy": 1.0}}, "less than 1"),
        ({"engine": {"server": {"stream": True}}}, r"remove `engine\.server\.stream`"),
    ],
)
def test_keys_that_cannot_be_carried_out_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**keys)


def test_vllm_returns_more_if_it_is_told_to() -> None:
    found = recipe(distribution={"top_k": 50}, engine={"vllm_args": ["--max-logprobs", "64"]})
    assert found.keys.distribution.top_k == 50


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "pair 1: `logprobs` are missing"),
        (
            {"logprobs": entries("47")},
            r"pair 1: the tokens of `logprobs` are '47' to the tokenizer .* not the answer '5'",
        ),
        ({"logprobs": [{**entries("5")[0], "token": "token_id:99999"}]}, "the teacher has another tokenizer"),
        ({"logprobs": [{**entries("5")[0], "token": "5"}]}, "a token is named '5', not by its id"),
    ],
)
def test_pairs_whose_distributions_are_missing_or_of_another_tokenizer_are_refused(
    write_jsonl: Write, row: dict[str, Any], message: str
) -> None:
    pair = {"messages": [{"role": "user", "content": "2+3"}, {"role": "assistant", "content": "5"}]}
    with pytest.raises(ThinkSwitchError, match=message):
        tokenized(write_jsonl("pairs.jsonl", [{**pair, **row}]), kd_trainer=True)


def test_an_id_above_those_of_the_tokenizer_in_an_answer_has_no_text_and_keeps_its_distribution(
    write_jsonl: Write,
) -> None:
    padding = distributions.entry(len(TOKENIZER) + 3, "", [(len(TOKENIZER) + 3, -2.0), (4, -0.2)])
    wrote = [*entries("7")[:1], padding, *entries("9<|im_end|>")]  # at a high temperature a model may write such an id
    pair = {"messages": [{"role": "user", "content": "2+3"}, {"role": "assistant", "content": "79"}]}
    (row,) = tokenized(write_jsonl("pairs.jsonl", [{**pair, "logprobs": wrote}]), kd_trainer=True)
    known = [ids for ids in row["target_token_ids"] if ids]
    assert [ids[0] for ids in known] == [
        row["input_ids"][place] for place, label in enumerate(row["labels"]) if label != -100
    ]
    assert all(len(ids) == 2 for ids in known)


def test_stored_answers_without_distributions_are_named_by_their_line(write_jsonl: Write, tmp_path: Path) -> None:
    requests = write_jsonl("requests.jsonl", [asked("p0"), asked("p1")])
    rows = [answered("p0-s0", "2+3=5</think>5"), answer("p1-s0", "2+3=5</think>5")]
    with pytest.raises(
        ThinkSwitchError, match=r"generations\.jsonl, line 2: the completion has no distributions \(it has no"
    ):
        write_pairs(requests, write_jsonl("generations.jsonl", rows), tmp_path / "pairs.jsonl")


def test_a_server_that_returns_none_or_fewer_ends_the_generation_at_its_first_answer(
    write_jsonl: Write, tmp_path: Path
) -> None:
    rows = [asked(f"p{place}", text=f"answer {place}") for place in range(20)]
    for row in rows:
        row["body"]["metadata"]["trace"] = "none"
    requests, out = write_jsonl("requests.jsonl", rows), tmp_path / "generations.jsonl"
    keys = EngineKeys(concurrency=2, timeout=5)  # type: ignore[call-arg]
    few = {"error": {"message": "Requested sample logprobs of 2, which is greater than max allowed: 1"}}
    for refuse, message in (
        (lambda body: None, "The answer to p.-s0 has no distributions .it has no `logprobs`"),
        (lambda body: (400, few), "refuses to return distributions .*max allowed: 1.*lower `thinkswitch.distribution"),
    ):
        with FaultyServer(refuse=refuse) as server, pytest.raises(ThinkSwitchError, match=message):
            generate(requests, out, "m", server.url, keys, log=tmp_path / "log")
        assert not out.exists() or not out.read_bytes()


def test_a_plain_config_that_would_train_on_the_answers_alone_is_refused() -> None:
    cfg = DictDefault({"thinkswitch": {"loss": "distribution"}})
    with pytest.raises(ThinkSwitchError, match="learnt by axolotl's KD trainer, which this config does not use"):
        ThinkSwitchPlugin().pre_model_load(cfg)
    with pytest.raises(ThinkSwitchError, match=r"x\.jsonl: pre_thinking also trains the trace"):
        load_pre(TOKENIZER, DictDefault({"kd_trainer": True}), DictDefault({"path": "x.jsonl"}))
