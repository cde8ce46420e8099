"""Hybrid checkpoints: one checkpoint, a switch in its chat template, and arguments for each mode."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

from experiments.controls import own_answers, run_control
from tests import checkpoints
from tests.conftest import BIN, ROOT, Command, once
from tests.report_run import make_run
from tests.test_contract import CHATML, QWEN3_HYBRID, tokenizer_of
from thinkswitch_plugin import files
from thinkswitch_plugin.args import PairKeys
from thinkswitch_plugin.data import batch, prompts, switches
from thinkswitch_plugin.data.traces import generation_prompt
from thinkswitch_plugin.demo.tokenizer import EMPTY_TRACE, build_tokenizer
from thinkswitch_plugin.engine_args import ModeArguments
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.export.template import combine
from thinkswitch_plugin.judging import compare
from thinkswitch_plugin.judging.model import ThinkSwitchLM
from thinkswitch_plugin.loop.check import pair as check_pair
from thinkswitch_plugin.recipe import load_recipe, recipe_path
from thinkswitch_plugin.report import write_report
from thinkswitch_plugin.router.switch import Switch
from thinkswitch_plugin.run import open_run
from thinkswitch_plugin.run.table import find_stage
from thinkswitch_plugin.training import distil

OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}
BOTH = {"instruct": OFF, "thinking": ON}
GRANITE = "{%- if thinking %}{{- 'Think first. ' }}{%- endif %}" + CHATML  # thinks only if it is told to


def recipe_with(folder: Path, change: Any, **more: Any) -> Path:
    """The hybrid's recipe with changed keys of its pair, and other keys beside them."""
    values = yaml.safe_load((ROOT / "recipes" / "arithmetic-hybrid.yaml").read_text()) | more
    values["thinkswitch"]["pair"] |= change
    path = folder / "arithmetic-hybrid.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        ({"chat_template_kwargs": {"instruct": ON, "thinking": ON}}, {}, "same for both modes; give each mode its own"),
        ({"chat_template_kwargs": {"instruckt": OFF}}, {}, "did you mean `instruct`"),
        ({"chat_template_kwargs": {"instruct": {"tokenize": True}}}, {}, "`tokenize` is set by the loop; remove it"),
        ({"chat_template_kwargs": {"instruct": {"x": float("nan")}}}, {}, "a value that JSON does not have"),
        ({}, {"chat_template_kwargs": ON}, "would train behind another prompt than is asked; give the same arguments"),
        ({"chat_template_kwargs": {}}, {}, "`thinkswitch.pair.chat_template_kwargs.instruct`, or leave the key out"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(
    change: dict[str, Any], more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ThinkSwitchError, match=message):
        load_recipe(recipe_with(tmp_path, change, **more))


@pytest.mark.parametrize(
    ("names", "template", "arguments", "message"),
    [
        ("aa", QWEN3_HYBRID, BOTH, None),
        ("aa", QWEN3_HYBRID, {"instruct": OFF}, None),
        ("aa", QWEN3_HYBRID, {}, "same prompt in both modes; write `chat_template_kwargs: {instruct: {enable_thinking: "
                                 "false}, thinking: {enable_thinking: true}}` under `thinkswitch.pair`"),
        ("aa", GRANITE, {}, "{instruct: {thinking: false}, thinking: {thinking: true}}"),
        ("aa", GRANITE, {"thinking": {"thinking": True}}, None),
        ("aa", CHATML, {}, "same prompt in both modes; it has no known switch: name two checkpoints"),
        ("aa", QWEN3_HYBRID, {"thinking": ON}, "same prompt in both modes"),
        ("aa", QWEN3_HYBRID, {"instruct": {"enable_thikning": False}},
         "`thinkswitch.pair.chat_template_kwargs.instruct` has `enable_thikning`, which the chat template of a ignores; "
         "its switch is `enable_thinking`"),
        ("ab", CHATML, BOTH, "the chat template of a ignores; it has no known switch: remove the argument"),
        ("ab", CHATML, {}, None),
        ("ab", QWEN3_HYBRID, {}, "a is a hybrid, whose chat template would ask it in thinking mode; write "
                                 "`chat_template_kwargs: {instruct: {enable_thinking: false}}` under"),
        ("ab", GRANITE, {}, "b is a hybrid, whose chat template would ask it in instruct mode; write "
                            "`chat_template_kwargs: {thinking: {thinking: true}}`"),
        ("ab", QWEN3_HYBRID, {"instruct": OFF}, None),
    ],
)  # fmt: skip
def test_a_templates_switch_is_found_and_the_lines_to_write_are_named(
    names: str, template: str, arguments: dict[str, Any], message: str | None
) -> None:
    keys = PairKeys.model_validate({"instruct": names[0], "thinking": names[1], "chat_template_kwargs": arguments})
    tokenizer = tokenizer_of(template, "<|im_end|>")
    found = switches.fault(keys, {"instruct": tokenizer, "thinking": tokenizer})
    assert (found is None) if message is None else (found is not None and message in found), found


def test_check_names_a_hybrid_and_refuses_a_pair_whose_modes_are_one(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "hybrid", checkpoints.qwen3(0))
    build_tokenizer("hybrid").save_pretrained(folder)
    recipe = load_recipe(recipe_path("arithmetic-hybrid"))
    pair = recipe.keys.pair.model_copy(update={"instruct": str(folder), "thinking": str(folder), "demo": False})
    assert "is a hybrid" in check_pair(recipe.keys.model_copy(update={"pair": pair}))
    pair = pair.model_copy(update={"chat_template_kwargs": ModeArguments.model_validate({})})
    with pytest.raises(ThinkSwitchError, match="gives the same prompt in both modes; write `chat_template_kwargs"):
        check_pair(recipe.keys.model_copy(update={"pair": pair}))


def test_training_is_held_against_the_prompt_that_is_asked_without_thinking(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "hybrid", checkpoints.qwen3(0))
    build_tokenizer("hybrid").save_pretrained(folder)
    recipe = load_recipe(recipe_path("arithmetic-hybrid"))
    assert recipe.axolotl["chat_template_kwargs"] == OFF
    distil.require_trainable(recipe, str(folder))
    tokenizer_of(QWEN3_HYBRID, "<|im_end|>").save_pretrained(folder)
    distil.require_trainable(recipe, str(folder))
    pair = {"instruct": "a", "thinking": "b", "chat_template_kwargs": {}}
    asked_otherwise = recipe_with(tmp_path, pair, chat_template_kwargs={})
    with pytest.raises(ThinkSwitchError, match=r"for the loop as `thinkswitch\.pair.chat_template_kwargs.instruct`"):
        distil.require_trainable(load_recipe(asked_otherwise), str(folder))


def test_each_mode_is_asked_with_its_own_arguments(tmp_path: Path) -> None:
    keys, tokenizer = load_recipe(recipe_path("arithmetic-hybrid")).keys, build_tokenizer("hybrid")
    for mode, arguments in BOTH.items():
        how = batch.asked_of(tokenizer, None, arguments)
        turns = prompts.messages(keys.prompts, "1+1")
        prompts.write_requests(tmp_path / mode, [("p0", turns)], model="m", how=how, sampling=keys.sampling, seed=0)
        _, request = next(batch.read_requests(tmp_path / mode))
        assert request["body"]["chat_template_kwargs"] == arguments
        assert request["body"]["metadata"] == {"prompt_id": "p0", "trace": "inline", "convention": "think"}
        lm = ThinkSwitchLM(tmp_path, "m", "vllm", keys.engine, tokenizer, how, tmp_path / "log")
        prompt = lm.apply_chat_template([{"role": "user", "content": "1+1"}])
        assert prompt.endswith(EMPTY_TRACE) == (mode == "instruct")
        assert lm._body(prompt, {}, 0)["chat_template_kwargs"] == arguments


def test_a_server_of_both_modes_needs_no_other_switch_than_its_own() -> None:
    given = ModeArguments(instruct={}, thinking={"thinking": True})
    tokenizer = tokenizer_of(GRANITE, "<|im_end|>")
    own = {mode: generation_prompt(tokenizer, getattr(given, mode)) for mode in BOTH}
    tokenizer.chat_template = combine(GRANITE, GRANITE, given)
    assert own["instruct"] != own["thinking"]
    assert {mode: generation_prompt(tokenizer, switch) for mode, switch in BOTH.items()} == own


def test_a_report_shows_each_checkpoint_of_a_hybrid_in_both_modes(tmp_path: Path) -> None:
    here = make_run(tmp_path, questions=30, domain="arithmetic-hybrid")
    run = open_run(here)
    outputs = {p.name for p in find_stage(run, "eval-instruct", 1).outputs}
    assert outputs == {"instruct", "instruct-as-thinking"}
    assert [p.name for p in find_stage(run, "eval-instruct", 0).outputs] == ["instruct"]
    write_report(run)
    zero, one, _ = files.read_json(here / "report.json")["iterations"]
    for entry in (zero, one):
        for name in ("instruct", "thinking"):
            assert {k: v for k, v in entry[name].items() if k not in BOTH} == entry[name][name]
    assert zero["instruct"]["thinking"] == zero["thinking"]["thinking"]
    assert one["instruct"]["thinking"]["think_ratio"] > 0.9 > one["thinking"]["instruct"]["think_ratio"]
    assert set(one["paired"]) == {"instruct", "thinking", "instruct-as-thinking", "thinking-as-instruct"}
    text = (here / "report.md").read_text()
    assert text.count("| instruct-as-thinking |") == 2 and "thinking-as-instruct, iteration 1 against 0: " in text
    assert "The starting checkpoint has both modes" in (here / "report.html").read_text()


@pytest.fixture(scope="session")
def hybrid_run(make: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One iteration of the demo hybrid with half the prompts and half the questions, by `make iterate`."""

    def iterate(runs: Path) -> None:
        runs.mkdir()
        guard = {"guard": ["thinkswitch_arithmetic_two"], "guard_limit": 60, "guard_margin": 0.9}
        half = {
            "pad_to_sequence_len": False,
            "thinkswitch": {"prompts": {"count": 256}, "evaluation": {"limit": 200, **guard}},
        }
        files.write_yaml(runs / "half.yaml", half)
        words = ("DOMAIN=arithmetic-hybrid", "ITERATIONS=1", "ENGINE=embedded", f"OVERLAY={runs / 'half.yaml'}")
        done = make("iterate", *words, f"RUNS={runs}", timeout=1800)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    return once(tmp_path_factory, "hybrid", iterate) / "arithmetic-hybrid"


@pytest.mark.slow
def test_the_loop_raises_a_hybrids_instruct_mode_and_keeps_its_thinking(hybrid_run: Path) -> None:
    zero, one = files.read_json(hybrid_run / "report.json")["iterations"]
    assert one["instruct"]["mean@k"] - zero["instruct"]["mean@k"] >= 0.15
    (guard,) = one["guard"].values()
    assert set(guard) == {"instruct", "thinking", "instruct-as-thinking", "thinking-as-instruct"}
    assert all(found["n"] == found["paired"]["n"] == 60 for found in guard.values())
    assert guard["thinking"]["mean@k"] > 0.9 and guard["thinking"]["tokens"] > guard["instruct"]["tokens"]
    assert zero["thinking"]["think_ratio"] >= 0.95
    assert one["thinking"]["think_ratio"] >= 0.98 * zero["thinking"]["think_ratio"]
    assert one["instruct"]["think_ratio"] == one["thinking"]["instruct"]["think_ratio"] == 0.0
    pair = files.read_json(hybrid_run / "iter-0" / "pair.json")
    assert pair["instruct"]["path"] == pair["thinking"]["path"]
    for mode in ("instruct", "thinking"):
        made = AutoTokenizer.from_pretrained(hybrid_run / "iter-1" / mode)
        assert made.chat_template == build_tokenizer("hybrid").chat_template


@pytest.mark.slow
def test_compare_the_switch_and_a_sweep_ask_in_the_mode_that_is_wanted(
    hybrid_run: Path, forked: Command, tmp_path: Path
) -> None:
    run = open_run(hybrid_run)
    answers = compare.compare(hybrid_run, "7*3+4*2", engine="embedded")
    assert [found.trace is not None for found in answers] == [False, False, True]
    done = forked(
        BIN / "thinkswitch", "sweep", "--domain", "arithmetic-hybrid", "--runs", hybrid_run.parent, "--iteration", "0"
    )
    assert done.returncode == 1 and "so there is nothing between them; of a hybrid's run, choose" in done.stderr
    router: Any = SimpleNamespace(p_think=lambda texts: np.full(len(texts), 0.5))
    folders = {mode: run.checkpoint(mode, 1) for mode in BOTH}
    for threshold, thinks in ((0.0, True), (1.0, False)):
        found = Switch(run, folders, router, threshold, {}).answer("7*3+4*2")
        assert found.reply is not None and (found.reply.trace is not None) == thinks
    for template, ratio in (("instruct", 0.0), ("thinking", 1.0)):
        words = ["--domain", "arithmetic-hybrid", "--runs", hybrid_run.parent, "--iteration", "1", "--lambdas", "1"]
        words += ["--mode", template, "--limit", "20", "--out", tmp_path / template]
        done = forked(BIN / "thinkswitch", "sweep", *words)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        (sweep,) = (tmp_path / template).glob("sweep*/sweep.json")
        assert files.read_json(sweep)["points"][0]["think_ratio"] == ratio


@pytest.mark.slow
def test_controls_of_a_hybrid_ask_it_without_thinking_and_refuse_an_interpolation_with_itself(hybrid_run: Path) -> None:
    run = open_run(hybrid_run)
    wanted = [row["custom_id"] for _, row in files.read_jsonl(hybrid_run / "iter-1" / "pairs.jsonl")][:20]
    answers = own_answers(run, wanted)
    assert len(answers) == 20 and all(len(answer) == 1 for answer in answers)
    with pytest.raises(ThinkSwitchError, match="a checkpoint interpolated with itself is itself"):
        run_control(run, "undistilled")
