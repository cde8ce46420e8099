from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.config import place_models, read_config, set_lambda
from thinkswitch_plugin.merging.method import module_kind


def test_lambda_becomes_each_methods_own_numbers() -> None:
    where = Path("m.yaml")
    assert set_lambda({"merge_method": "slerp", "base_model": "./thinking"}, 0.9, where)["parameters"] == {"t": 0.1}
    assert set_lambda({"merge_method": "thinkswitch", "base_model": "./thinking"}, 0.9, where)["parameters"] == {
        "lambda": 0.9
    }
    linear = {"merge_method": "linear", "models": [{"model": "thinking"}, {"model": "instruct"}]}
    shares = [m["parameters"]["weight"] for m in set_lambda(linear, 0.9, where)["models"]]
    assert shares == [0.9, 0.1]
    with pytest.raises(ThinkSwitchError, match="λ cannot be set"):
        set_lambda({"merge_method": "ties"}, 0.9, where)
    with pytest.raises(ThinkSwitchError, match="base_model"):
        set_lambda({"merge_method": "slerp", "base_model": "instruct"}, 0.9, where)


def test_only_model_names_are_replaced_by_folders() -> None:
    config = {"base_model": "./thinking", "models": [{"model": "./instruct", "parameters": {"path": "thinking"}}]}
    assert place_models(config, {"instruct": "I", "thinking": "T"}) == {
        "base_model": "T",
        "models": [{"model": "I", "parameters": {"path": "thinking"}}],
    }


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"lambda": 0.9, "lamda_ffn": 1}, "`lamda_ffn` is not a parameter"),
        ({"lambda": "high"}, "`lambda` is 'high'; use a finite number"),
        ({"lambda": float("nan")}, "use a finite number"),
        ({"lambda": 0.9, "path": "curved"}, "`path` is 'curved'"),
        ({"path": "linear"}, "`parameters.lambda` is missing"),
    ],
)
def test_bad_parameters_are_refused_before_any_model_is_looked_at(
    tmp_path: Path, parameters: dict[str, Any], message: str
) -> None:
    config = tmp_path / "merge.yaml"
    files.write_yaml(config, {"merge_method": "thinkswitch", "base_model": "nowhere", "parameters": parameters})
    with pytest.raises(ThinkSwitchError, match=message):
        read_config(config)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "attention"),
        ("model.layers.3.mlp.down_proj.weight", "ffn"),
        ("model.layers.3.input_layernorm.weight", "rest"),
        ("model.embed_tokens.weight", "rest"),
    ],
)
def test_kind_of_module(name: str, kind: str) -> None:
    assert module_kind(name) == kind
