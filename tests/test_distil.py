from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from thinkswitch_plugin import files, recipe
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.recipe import iteration_config
from thinkswitch_plugin.training import distil


def adapter(folder: Path, b: torch.Tensor) -> Path:
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    save_file({name.format("A"): torch.ones(2, 4), name.format("B"): b}, str(folder / "adapter_model.safetensors"))
    files.write_json(folder / "adapter_config.json", {"r": 2, "lora_alpha": 4})
    return folder


def test_an_adapter_that_did_not_move_is_an_error(tmp_path: Path) -> None:
    still = distil.adapter_change(adapter(tmp_path, torch.zeros(3, 2)))
    assert still == 0.0
    with pytest.raises(ThinkSwitchError, match="the adapter did not move"):
        distil.require_moved(still, 1e-4, tmp_path)


def test_the_change_is_the_norm_of_the_update_over_that_of_a(tmp_path: Path) -> None:
    b = torch.tensor([[0.1, 0.0], [0.0, 0.0], [0.0, 0.0]])
    expected = (2 * b @ torch.ones(2, 4)).norm() / torch.ones(2, 4).norm()
    assert distil.adapter_change(adapter(tmp_path, b)) == pytest.approx(expected.item())


def test_nan_and_a_missing_adapter_are_named(tmp_path: Path) -> None:
    with pytest.raises(ThinkSwitchError, match="axolotl saved no adapter"):
        distil.adapter_change(tmp_path)
    with pytest.raises(ThinkSwitchError, match="holds NaN"):
        distil.adapter_change(adapter(tmp_path, torch.full((3, 2), float("nan"))))


def test_an_iterations_config_is_the_recipe_with_that_iterations_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    loaded = recipe.load_recipe(Path("recipes/arithmetic.yaml"))
    config = iteration_config(loaded, base_model="B", pairs=Path("P"), here=Path("H"), seed=7)
    assert (config["base_model"], config["datasets"][0]["path"], config["output_dir"]) == ("B", "P", "H/adapter")
    assert (config["dataset_prepared_path"], config["seed"], config["merge_method"]) == ("H/prepared", 7, "legacy")
    assert config["learning_rate"] == loaded.axolotl["learning_rate"]
    assert config["bf16"] is False and config["thinkswitch"]["domain"] == "arithmetic"
    assert "base_model" in loaded.axolotl and loaded.axolotl["base_model"] != "B"
