from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tests.checkpoints import qwen3, write
from thinkswitch_plugin import cli, files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging import kernel
from thinkswitch_plugin.merging import similarity as module
from thinkswitch_plugin.merging.kernel import measure
from thinkswitch_plugin.merging.similarity import layer_of, similarity


def test_sigma_and_angles_of_a_pair(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"w": torch.tensor([1.0, 0.0]), "x": torch.tensor([2.0])})
    b = write(tmp_path / "b", {"w": torch.tensor([0.0, 1.0]), "x": torch.tensor([2.0])})
    found = similarity(a, b)
    assert found["sigma"] == pytest.approx(2 / 6)
    assert found["angle"]["max"] == pytest.approx(math.pi / 2)
    assert found["angle"]["min"] == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [2**18, 100])
def test_reading_in_pieces_and_shards_gives_what_whole_tensors_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int
) -> None:
    monkeypatch.setattr(kernel, "CHUNK", chunk)
    a, b = ({name: t.to(dtype) for name, t in qwen3(seed).items()} for seed in (0, 1))
    sums = module.tensor_sums(write(tmp_path / "a", a), write(tmp_path / "b", b, shards=3))
    assert sums.keys() == a.keys()
    for name, s in sums.items():
        x, y = a[name].double(), b[name].double()
        assert s.angle == pytest.approx(measure(x, y).angle, rel=1e-4)
        assert s.distance == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-4)
        assert s.sigma == pytest.approx(float((y - x).abs().sum() / (x.abs() + y.abs()).sum()), rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_in_a_checkpoint_are_named(tmp_path: Path, value: float) -> None:
    a, b = write(tmp_path / "a", {"w": torch.tensor([1.0])}), write(tmp_path / "b", {"w": torch.tensor([value])})
    with pytest.raises(ThinkSwitchError, match="b: the tensor w holds NaN or infinity"):
        similarity(a, b)


def test_huge_finite_weights_are_no_reason_to_refuse(tmp_path: Path) -> None:
    a, b = (write(tmp_path / n, {"w": torch.tensor([1e30, s])}) for n, s in (("a", 0.0), ("b", 1e30)))
    assert similarity(a, b)["angle"]["max"] == pytest.approx(math.pi / 4)


def test_the_command_writes_figures_and_a_picture(tmp_path: Path) -> None:
    a, b = (write(tmp_path / n, qwen3(seed)) for n, seed in (("a", 0), ("b", 1)))
    done = CliRunner().invoke(cli.main, ["similarity", str(a), str(b), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "SLERP and linear interpolation differ by at most" in done.output and "σ = 0.02" in done.output
    data: dict[str, Any] = files.read_json(tmp_path / "out" / "similarity.json")
    assert {"sigma", "angle", "distance", "sphere_gap", "linear_in_mergekit", "layers", "tensors"} <= data.keys()
    assert [layer["layer"] for layer in data["layers"]] == [0, 1, 2]
    assert (tmp_path / "out" / "similarity.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out" / "similarity.svg").read_text()


def test_the_command_refuses_a_pair_that_is_none(tmp_path: Path) -> None:
    a, b = (write(tmp_path / n, qwen3(seed, layers)) for n, seed, layers in (("a", 0, 3), ("b", 1, 2)))
    done = CliRunner().invoke(cli.main, ["similarity", str(a), str(b), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and "not a compatible pair" in done.output
    assert not (tmp_path / "out").exists()


def test_layer_of_a_tensor() -> None:
    assert layer_of("model.layers.13.mlp.up_proj.weight") == 13
    assert layer_of("model.embed_tokens.weight") is None
