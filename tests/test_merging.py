from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mergekit.merge_methods.slerp import slerp as mergekit_slerp
from safetensors.torch import load_file, save_file

from tests.conftest import BIN
from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.compatibility import require_compatible
from thinkswitch_plugin.merging.config import check_config, place_models, set_lambda
from thinkswitch_plugin.merging.kernel import angle, interpolate
from thinkswitch_plugin.merging.method import module_kind
from thinkswitch_plugin.merging.rebuild import still_thinks
from thinkswitch_plugin.merging.similarity import similarity

weights = st.floats(-0.5, 1.5, allow_nan=False)


def pair_of_tensors(seed: int, far: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(8, 16, generator=generator)
    return a, a + far * torch.randn(8, 16, generator=generator)


def test_lambda_0_and_1_return_the_inputs() -> None:
    a, b = pair_of_tensors(0)
    for spherical in (True, False):
        assert torch.equal(interpolate(a, b, 0.0, spherical=spherical), a)
        assert torch.equal(interpolate(a, b, 1.0, spherical=spherical), b)


@given(st.integers(0, 50), weights)
def test_spherical_agrees_with_mergekits_slerp_and_is_symmetric(seed: int, weight: float) -> None:
    a, b = pair_of_tensors(seed)
    ours = interpolate(a, b, weight)
    theirs = mergekit_slerp(torch.tensor([1 - weight]), b[None], a[None])[0]
    assert torch.allclose(ours, theirs, atol=2e-5)
    assert torch.allclose(ours, interpolate(b, a, 1 - weight), atol=2e-5)


@given(st.integers(0, 50), st.floats(0, 1))
def test_spherical_keeps_the_norm_of_equal_norm_inputs(seed: int, weight: float) -> None:
    a, b = pair_of_tensors(seed)
    b = b * (a.norm() / b.norm())
    assert interpolate(a, b, weight).norm().item() == pytest.approx(a.norm().item(), rel=1e-5)


def test_spherical_meets_linear_as_the_angle_goes_to_zero() -> None:
    for far in (1e-2, 1e-4, 1e-6):
        a, b = pair_of_tensors(3, far)
        difference = (interpolate(a, b, 0.4) - interpolate(a, b, 0.4, spherical=False)).norm() / a.norm()
        assert difference.item() < max(far**2, 1e-6)


def test_angle_is_exact_where_the_arc_cosine_is_not() -> None:
    for theta in (1e-6, 0.05, 1.0, 3.0):
        a = torch.tensor([1.0, 0.0], dtype=torch.float64)
        b = torch.tensor([math.cos(theta), math.sin(theta)], dtype=torch.float64)
        assert angle(a, b) == pytest.approx(theta, rel=1e-9)
    assert angle(torch.zeros(3), torch.ones(3)) == 0.0


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


Write = Callable[[str, dict[str, torch.Tensor], dict[str, Any]], Path]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Write:
    def write(name: str, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, str(folder / "model.safetensors"))
        files.write_json(folder / "config.json", {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 8, **config})
        return folder

    return write


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"w": torch.zeros(2, 3)}, {}, r"w has shape \[2, 2\] and \[2, 3\]"),
        ({"w": torch.zeros(2, 2), "x": torch.zeros(1)}, {}, "only .*b holds the tensor x"),
        ({"w": torch.zeros(2, 2).half()}, {}, "w is stored as F32 and F16"),
        ({"w": torch.zeros(2, 2)}, {"vocab_size": 9}, "`vocab_size` is 8 and 9"),
        ({"w": torch.zeros(2, 2)}, {"tie_word_embeddings": True}, "`tie_word_embeddings` is None and True"),
    ],
)
def test_a_pair_that_does_not_match_is_named(
    checkpoint: Write, tensors: dict[str, torch.Tensor], config: dict[str, Any], message: str
) -> None:
    a = checkpoint("a", {"w": torch.zeros(2, 2)}, {})
    with pytest.raises(ThinkSwitchError, match=message):
        require_compatible(a, checkpoint("b", tensors, config))


def test_a_truncated_file_is_named(checkpoint: Write) -> None:
    a, b = (checkpoint(n, {"w": torch.zeros(64, 64)}, {}) for n in "ab")
    weights_file = b / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-10])
    with pytest.raises(ThinkSwitchError, match=r"b/model\.safetensors is \d+ bytes long where its header promises"):
        require_compatible(a, b)


def test_sigma_and_angles_of_a_pair(checkpoint: Write) -> None:
    a = checkpoint("a", {"w": torch.tensor([1.0, 0.0]), "x": torch.tensor([2.0])}, {})
    b = checkpoint("b", {"w": torch.tensor([0.0, 1.0]), "x": torch.tensor([2.0])}, {})
    found = similarity(a, b)
    assert found["sigma"] == pytest.approx(2 / 6)
    assert found["angle"]["max"] == pytest.approx(math.pi / 2)
    assert found["angle"]["min"] == 0.0


def test_nan_in_a_checkpoint_is_named(checkpoint: Write) -> None:
    a = checkpoint("a", {"w": torch.tensor([1.0])}, {})
    b = checkpoint("b", {"w": torch.tensor([float("nan")])}, {})
    with pytest.raises(ThinkSwitchError, match="b: the tensor w holds NaN"):
        similarity(a, b)


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


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"lambda": 0.9, "lamda_ffn": 1}, "`lamda_ffn` is no parameter"),
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
        check_config(config)


@pytest.mark.slow
def test_our_method_through_mergekit_uses_lambda_by_module(finished_run: Path, tmp_path: Path, command: Any) -> None:
    pair = files.read_json(finished_run / "iter-0" / "pair.json")
    a, b = (Path(pair[m]["path"]) for m in ("instruct", "thinking"))
    config = tmp_path / "merge.yaml"
    files.write_yaml(
        config,
        {
            "merge_method": "thinkswitch",
            "base_model": str(b),
            "models": [{"model": str(b)}, {"model": str(a)}],
            "parameters": {"lambda": 0.5, "lambda_ffn": 1.0, "lambda_attention": 0.0, "path": "linear"},
        },
    )
    done = command(BIN / "thinkswitch", "merge", config, tmp_path / "out", "--copy-tokenizer")
    assert done.returncode == 0, done.stderr[-2000:]
    merged, left, right = (load_file(str(f / "model.safetensors")) for f in (tmp_path / "out", a, b))
    for name, tensor in merged.items():
        expected = {"ffn": right[name], "attention": left[name]}.get(
            module_kind(name), 0.5 * left[name] + 0.5 * right[name]
        )
        assert torch.allclose(tensor, expected, atol=1e-6), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
