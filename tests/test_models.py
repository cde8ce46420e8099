"""A few architectures of the table, with the functions that print it (`make models` tests all of them)."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from experiments.model_merges import merge_config, read
from experiments.model_pairs import EXPERTS, MODELS, Model, make_pair
from experiments.models import COLUMNS, note_of, table, try_all
from thinkswitch_plugin import files
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.environment import without_gpu_kernels
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.export.extract import require_extractable
from thinkswitch_plugin.merging.compatibility import require_compatible
from thinkswitch_plugin.merging.holding import Live, MergeJob
from thinkswitch_plugin.merging.similarity import similarity
from thinkswitch_plugin.recipe import load_recipe, recipe_path
from thinkswitch_plugin.run.checkpoint import adopt_mode
from thinkswitch_plugin.training.distil import require_trainable

OK = dict.fromkeys(COLUMNS, "ok")


def row(name: str) -> Model:
    return next(model for model in MODELS if model.name == name)


@pytest.mark.parametrize(
    "name",
    [
        "Qwen3-MoE, stored per expert",
        "Qwen3-MoE, one of each",
        "Qwen3-Next, MTP head in one",
        "Qwen3.5, text",
        "GLM-4.5-MoE, MTP layer in one",
        "Gemma 3, vision-language",
        "SmolLM3",
        "DeepSeek-V3",
    ],
)
def test_every_column_gives_what_float64_gives_and_loses_nothing(tmp_path: Path, name: str) -> None:
    assert try_all(row(name), tmp_path) == OK


@pytest.mark.parametrize(
    ("name", "message"),
    [("DeepSeek-V3, FP8", "holds quantised weights"), ("an architecture that transformers does not know", "novel")],
)
def test_a_pair_that_is_refused_is_refused_in_a_sentence_and_leaves_nothing(
    tmp_path: Path, name: str, message: str
) -> None:
    cells = try_all(row(name), tmp_path)
    assert message in cells["merge"] and message in cells["sweep in memory"]
    assert not any(cell.startswith("FAILED") for cell in cells.values())
    assert {path.name for path in tmp_path.iterdir()} == {"instruct", "thinking", "merge.yaml"}


def test_an_unknown_architecture_is_refused_before_training_and_export(tmp_path: Path) -> None:
    roles = make_pair(row("an architecture that transformers does not know"), tmp_path)
    with pytest.raises(ThinkSwitchError, match="does not know the `model_type` novel"):
        require_trainable(load_recipe(recipe_path("arithmetic")), str(roles["instruct"]))
    with pytest.raises(ThinkSwitchError, match="does not know the `model_type` novel"):
        require_extractable(roles["instruct"], roles["thinking"])


def test_a_server_is_not_started_for_what_cannot_be_merged(tmp_path: Path) -> None:
    for name, message in (("an architecture that transformers does not know", "novel"), ("DeepSeek-V3, FP8", "fp8")):
        roles = make_pair(row(name), tmp_path / message)
        job = MergeJob(roles["thinking"], roles["thinking"], EngineKeys(), tmp_path, tmp_path / "log", batch=1)
        with pytest.raises(ThinkSwitchError, match=message):
            Live(job)


def test_a_vision_language_checkpoint_is_trained_only_with_its_processor_which_its_merges_keep(tmp_path: Path) -> None:
    roles = make_pair(row("Gemma 3, vision-language"), tmp_path)
    recipe, instruct = load_recipe(recipe_path("arithmetic")), roles["instruct"]
    require_trainable(recipe, str(instruct))
    (tmp_path / "merged").mkdir()
    adopt_mode(instruct, tmp_path / "merged")
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()
    (instruct / "preprocessor_config.json").unlink()
    with pytest.raises(ThinkSwitchError, match=r"processor, and that cannot be loaded \(.+\); copy its `preprocessor"):
        require_trainable(recipe, str(instruct))


def test_refusals_that_differ_in_names_alone_share_a_note(tmp_path: Path) -> None:
    said = f"{tmp_path}/instruct: it would take model.layers.0.mlp.up_proj.bias of Qwen2ForCausalLM apart, 57 % of it"
    note = note_of(said, row("Qwen2.5"), tmp_path)
    assert note == "{checkpoint}: it would take {tensor} of {architecture} apart, {share} % of it"


def test_a_cell_that_was_not_tried_says_so() -> None:
    assert "| Qwen2.5 | ok | not run |" in table({"Qwen2.5": {"merge": "ok"}})


def test_a_failure_is_told_apart_from_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loses(*_: object) -> None:
        raise AssertionError("a tensor is lost")

    monkeypatch.setitem(COLUMNS, "merge", loses)
    cells = try_all(row("Qwen2.5"), tmp_path)
    assert cells["merge"] == "FAILED: AssertionError: a tensor is lost"
    assert "| Qwen2.5 | FAILED (1) | ok |" in table({"Qwen2.5": cells})


def test_what_merge_wrote_of_two_layouts_is_merged_again(tmp_path: Path) -> None:
    """`anchor: previous` from iteration 2 on, and a sweep of that pair."""
    from mergekit.options import MergeOptions

    from thinkswitch_plugin.merging.in_memory import load, merge_into
    from thinkswitch_plugin.merging.run import merge

    roles = make_pair(Model("", "Qwen3MoeForCausalLM", EXPERTS, fused=("instruct",)), tmp_path)
    options = MergeOptions(copy_tokenizer=False, quiet=True, device="cpu")
    for iteration in ("first", "second"):
        files.write_yaml(tmp_path / "merge.yaml", merge_config(roles))
        merge(tmp_path / "merge.yaml", tmp_path / iteration, options)
        roles["thinking"] = tmp_path / iteration
        require_compatible(roles["instruct"], roles["thinking"])
    nearness = [similarity(roles["instruct"], tmp_path / name)["sigma"] for name in ("thinking", "first", "second")]
    assert nearness[0] > nearness[1] > nearness[2] > 0
    files.write_yaml(tmp_path / "merge.yaml", merge_config(roles))
    merge(tmp_path / "merge.yaml", tmp_path / "third", options)
    model = load(roles["thinking"], {}, device="cpu")
    merge_into(model, merge_config(roles))
    written = load(tmp_path / "third", {}, device="cpu").state_dict()
    assert all(tensor.equal(written[name]) for name, tensor in model.state_dict().items())


def test_fused_and_per_expert_checkpoints_of_equal_weights_are_equal(tmp_path: Path) -> None:
    per_expert = make_pair(Model("", "Qwen3MoeForCausalLM", EXPERTS), tmp_path / "a")
    fused = make_pair(Model("", "Qwen3MoeForCausalLM", EXPERTS, fused=("instruct", "thinking")), tmp_path / "b")
    assert len(read(per_expert["instruct"])) > len(read(fused["instruct"]))
    assert similarity(per_expert["instruct"], fused["instruct"])["sigma"] == 0
    mixed, alike = (similarity(a["instruct"], fused["thinking"]) for a in (per_expert, fused))
    assert mixed["sigma"] == pytest.approx(alike["sigma"], rel=1e-5)
    assert mixed["angle"] == pytest.approx(alike["angle"], rel=1e-4)


def test_a_tensor_that_the_model_needs_and_only_one_has_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    roles = make_pair(Model("", "Qwen3MoeForCausalLM", EXPERTS, fused=("instruct",)), tmp_path)
    gone = "model.layers.2.mlp.experts.gate_up_proj"
    kept = {name: tensor for name, tensor in read(roles["instruct"]).items() if name != gone}
    save_file(kept, str(roles["instruct"] / "model.safetensors"))
    with pytest.raises(ThinkSwitchError, match=r"only .*thinking holds the tensor model\.layers\.2\.mlp\.experts\.0"):
        require_compatible(roles["instruct"], roles["thinking"])


def test_kernels_that_need_a_gpu_are_left_out_only_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_gpu in (True, False):
        monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        without_gpu_kernels()
        assert (sys.modules["fla"] is None) != has_gpu
