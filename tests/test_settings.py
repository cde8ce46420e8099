from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tests.checkpoints import CONFIG, qwen3, write
from tests.test_merging import assert_refused, merge, pair, recipe
from thinkswitch_plugin import cli, files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.compatibility import require_compatible
from thinkswitch_plugin.merging.config import allow, place_models, read_config
from thinkswitch_plugin.merging.in_memory import load, merge_into
from thinkswitch_plugin.merging.settings import config_difference, resolve
from thinkswitch_plugin.merging.tensors import require_unquantised
from thinkswitch_plugin.recipe import load_recipe
from thinkswitch_plugin.search.pair import Pair

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("kind", "first", "second", "setting"),
    [
        ("qwen3", {}, {"rope_scaling": YARN}, "rope_parameters"),
        ("llama", {}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters"),
        ("mistral", {"sliding_window": None}, {"sliding_window": 4096}, "sliding_window"),
        ("qwen2", {"layer_types": ["full_attention"] * 32}, {"use_sliding_window": True}, "layer_types"),
        ("glm4", {"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 1.0}, "partial_rotary_factor"),
        ("qwen3_moe", {"num_experts_per_tok": 8}, {"num_experts_per_tok": 4}, "num_experts_per_tok"),
        ("qwen3_moe", {"norm_topk_prob": True}, {"norm_topk_prob": False}, "norm_topk_prob"),
        ("deepseek_v3", {}, {"routed_scaling_factor": 1.0}, "routed_scaling_factor"),
        ("qwen3", {}, {"hidden_act": "gelu"}, "hidden_act"),
        ("granite", {}, {"residual_multiplier": 0.22}, "residual_multiplier"),
        ("gemma3", {}, {"text_config": {"sliding_window": 512}}, "text_config.sliding_window"),
        ("qwen3_5", {}, {"text_config": {"hidden_act": "gelu"}}, "text_config.hidden_act"),
        ("novel", {}, {"hidden_act": "gelu"}, "hidden_act"),
        ("qwen3", {}, {"a_key_of_tomorrow": 1}, "a_key_of_tomorrow"),
    ],
)
def test_what_changes_the_computation_is_named(
    kind: str, first: dict[str, Any], second: dict[str, Any], setting: str
) -> None:
    a, b = {"model_type": kind, **first}, {"model_type": kind, **second}
    assert str(config_difference(a, b)).startswith(f"`{setting}` is ")
    assert str(config_difference(b, a)).startswith(f"`{setting}` is ")
    assert config_difference(a, b, may_differ=[setting.split(".")[0], "sliding_window", "rope_parameters"]) is None


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("qwen3", {}, {"tie_word_embeddings": False}),
        ("gemma3_text", {}, {"tie_word_embeddings": True}),
        ("qwen3", {"eos_token_id": 1}, {"eos_token_id": [2, 3], "pad_token_id": 4}),
        (
            "qwen3",
            {"torch_dtype": "bfloat16", "use_cache": False},
            {"dtype": "float32", "transformers_version": "4.51"},
        ),
        ("qwen2", {"max_window_layers": 28}, {"max_window_layers": 21}),
        ("qwen3", {"max_position_embeddings": 32768}, {"max_position_embeddings": 262144}),
        ("qwen3", {"rope_theta": 5e6, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 5000000}}),
        ("qwen3", {"rope_scaling": YARN}, {"rope_scaling": {**YARN, "type": "yarn", "beta_fast": 32.0}}),
        ("llama", {"temperature": 0.6, "attention_dropout": 0.1}, {"unsloth_fixed": True}),
        ("glm4_moe", {"num_nextn_predict_layers": 1}, {"num_nextn_predict_layers": 0}),
        ("gemma3", {"text_config": {"architectures": ["A"]}}, {"text_config": {"bos_token_id": 7}}),
    ],
)
def test_what_does_not_is_left_alone(kind: str, first: dict[str, Any], second: dict[str, Any]) -> None:
    assert config_difference({"model_type": kind, **first}, {"model_type": kind, **second}) is None


def test_a_longest_context_counts_where_the_rotary_embedding_is_scaled_by_it() -> None:
    rope = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    a, b = ({"model_type": "qwen3", **rope, "max_position_embeddings": n} for n in (1024, 2048))
    assert "`max_position_embeddings` is 1024 and 2048" in str(config_difference(a, b))


def test_a_value_that_transformers_refuses_is_one_sentence() -> None:
    with pytest.raises(ThinkSwitchError, match="transformers refuses a value"):
        resolve({"model_type": "qwen3", "hidden_size": "wide"})


def test_code_that_comes_with_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    custom = {"model_type": "novel", "auto_map": {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"}}
    a, b = (write(tmp_path / name, qwen3(seed), **custom) for seed, name in enumerate(("a", "b")))
    for folder in (a, b):
        (folder / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Config: pass\n")
    require_compatible(a, b)
    done = merge(tmp_path, recipe("thinkswitch", a, b, **{"lambda": 0.5}))
    assert done.exit_code == 1 and "does not know the `model_type` novel" in done.output
    assert not (tmp_path / "out").exists() and not (tmp_path / "sprung").exists()


def with_yarn(folder: Path) -> tuple[Path, Path]:
    a, b = pair(folder)
    files.write_json(a / "config.json", {**CONFIG, "rope_scaling": YARN})
    return a, b


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_setting_that_may_differ_has_the_named_checkpoints_value(tmp_path: Path, side: str) -> None:
    a, b = with_yarn(tmp_path)
    config = recipe("thinkswitch", a, b, **{"lambda": 0.5})
    assert_refused(tmp_path, merge(tmp_path, config), "`rope_parameters` is ")
    config["may_differ"] = {"rope_parameters": str(tmp_path / side)}
    done = merge(tmp_path, config)
    assert done.exit_code == 0, done.output
    kind = {"a": "yarn", "b": "default"}[side]
    assert files.read_json(tmp_path / "out" / "config.json")["rope_parameters"]["rope_type"] == kind
    model = load(b, {"rope_parameters": tmp_path / side}, device="cpu")
    merge_into(model, config)
    assert model.config.rope_parameters["rope_type"] == kind == model.model.rotary_emb.rope_type


@pytest.mark.parametrize(
    ("may_differ", "message"),
    [
        ({"rope_parameters": "./elsewhere"}, "names ./elsewhere, which is not a model of this config"),
        (["rope_parameters"], "must map settings of config.json to models"),
        ({"rope_parameters": 1}, "must map settings of config.json to models"),
    ],
)
def test_a_wrong_may_differ_is_refused_before_any_work(tmp_path: Path, may_differ: Any, message: str) -> None:
    config = {"merge_method": "linear", "models": [{"model": "./instruct"}], "may_differ": may_differ}
    files.write_yaml(tmp_path / "merge.yaml", config)
    with pytest.raises(ThinkSwitchError, match=message):
        read_config(tmp_path / "merge.yaml")


def test_a_setting_that_there_is_not_is_named(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    config = recipe("thinkswitch", a, b, **{"lambda": 0.5}) | {"may_differ": {"rope_scalin": str(a)}}
    assert_refused(tmp_path, merge(tmp_path, config), "has no setting `rope_scalin`")


def test_the_recipes_key_goes_into_the_merge_config_with_the_runs_folders() -> None:
    config = allow({"merge_method": "slerp", "base_model": "./thinking"}, {"rope_parameters": "instruct"})
    placed = place_models(config, {"instruct": "I", "thinking": "T"})
    assert placed == {"merge_method": "slerp", "base_model": "T", "may_differ": {"rope_parameters": "I"}}
    assert allow({"merge_method": "slerp"}, {}) == {"merge_method": "slerp"}


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        ({"w": torch.ones(2, 2).to(torch.float8_e4m3fn)}, {}),
        ({"w.weight_scale_inv": torch.ones(1, 1)}, {}),
        ({"w.qweight": torch.ones(2, 2, dtype=torch.int32)}, {}),
        ({"w": torch.ones(8, 1, dtype=torch.uint8)}, {}),
        ({"w": torch.ones(2, 2)}, {"quantization_config": {"quant_method": "gptq"}}),
        ({"w": torch.ones(2, 2)}, {"text_config": {"quantization_config": {"quant_method": "fp8"}}}),
    ],
)
def test_quantised_weights_are_refused_everywhere(
    tmp_path: Path, tensors: Mapping[str, torch.Tensor], config: dict[str, Any]
) -> None:
    a, b = (write(tmp_path / name, dict(tensors), **config) for name in ("a", "b"))
    assert_refused(tmp_path, merge(tmp_path, recipe("slerp", a, b, t=0.5)), "without -FP8, -GPTQ, -AWQ or -bnb-4bit")
    done = CliRunner().invoke(cli.main, ["similarity", str(a), str(b), "--out", str(tmp_path / "out")])
    assert_refused(tmp_path, done, "holds quantised weights")


def test_masks_and_counters_are_not_quantised_weights(tmp_path: Path) -> None:
    tensors = {"mask": torch.ones(4, 4, dtype=torch.bool), "positions": torch.arange(8), "w": torch.ones(2, 2)}
    require_unquantised(write(tmp_path / "a", tensors, quantization_config=None))
    packed = tensors | {"positions": torch.arange(8).view(2, 4)}
    with pytest.raises(ThinkSwitchError, match=r"b holds quantised weights \(positions is stored as I64\)"):
        require_unquantised(write(tmp_path / "b", packed))


def test_what_mergekits_plan_leaves_out_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    """By `modules:` the plan is mergekit's own, whose table of Qwen3 has no such tensor."""
    extra = "model.layers.1.self_attn.sinks"
    a, b = (write(tmp_path / n, qwen3(s) | {extra: torch.ones(2)}) for n, s in (("a", 1), ("b", 2)))
    config = recipe("thinkswitch", a, b, **{"lambda": 0.5})
    named = {**config, "modules": {"default": {"models": config["models"]}}}
    del named["models"]
    assert_refused(tmp_path, merge(tmp_path, named), f"mergekit would leave out 1 of 36 tensors ({extra})")
    done = merge(tmp_path, config)
    assert done.exit_code == 0, done.output


def test_what_is_lost_of_stacked_layers_is_found_too(tmp_path: Path) -> None:
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    extra = "model.layers.1.self_attn.sinks"
    a, b = (write(tmp_path / n, qwen3(s) | {extra: torch.ones(2)}, **llama) for n, s in (("a", 1), ("b", 2)))
    slices = [{"sources": [{"model": str(m), "layer_range": [1, 3]}]} for m in (a, b)]
    done = merge(tmp_path, {"merge_method": "passthrough", "slices": slices})
    lost = "model.layers.0.self_attn.k_norm.weight … model.layers.3.self_attn.q_norm.weight"
    assert_refused(tmp_path, done, f"of 48 tensors ({lost})")


def test_slices_may_leave_layers_out(tmp_path: Path) -> None:
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    tensors = [{name: t for name, t in qwen3(seed).items() if "_norm." not in name} for seed in (1, 2)]
    a, b = (write(tmp_path / n, t, **llama) for n, t in zip(("a", "b"), tensors, strict=True))
    sources = [{"model": str(folder), "layer_range": [0, 2]} for folder in (a, b)]
    config = {**recipe("thinkswitch", a, b, **{"lambda": 0.5}), "slices": [{"sources": sources}]}
    del config["models"]
    done = merge(tmp_path, config)
    assert done.exit_code == 0, done.output
    assert files.read_json(tmp_path / "out" / "config.json")["num_hidden_layers"] == 2


def test_a_common_ancestor_of_another_shape_is_refused_before_any_work(tmp_path: Path) -> None:
    keys = load_recipe(Path("recipes/arithmetic.yaml")).keys
    a, b = pair(tmp_path)
    roles = {"instruct": a, "thinking": b, "base": write(tmp_path / "base", qwen3(3, layers=2), num_hidden_layers=2)}
    subject = Pair(keys, roles, 0, "embedded", tmp_path, tmp_path, 1, True)
    with pytest.raises(ThinkSwitchError, match="base are not a compatible pair: `num_hidden_layers` is 3 and 2"):
        subject.fetch(["base", "thinking"])
