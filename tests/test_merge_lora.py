"""The merge of an adapter by real axolotl: in full precision, with the parent's dtype and layout, one shard at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.checkpoints import equal, qwen3, read
from tests.checkpoints import write as write_checkpoint
from tests.conftest import ROOT
from thinkswitch_plugin import files
from thinkswitch_plugin.demo.tokenizer import build_tokenizer
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.loop import work
from thinkswitch_plugin.merging import lora
from thinkswitch_plugin.merging.compatibility import require_compatible
from thinkswitch_plugin.merging.tensors import list_tensors
from thinkswitch_plugin.recipe import iteration_config, load_recipe
from thinkswitch_plugin.run.checkpoint import ADAPTER_WEIGHTS
from thinkswitch_plugin.training import distil


def legacy(config: dict[str, Any], here: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What axolotl's other method makes of the same adapter, in this process."""
    os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
    from axolotl.cli.merge_lora import do_cli

    files.write_yaml(here / "legacy.yaml", {**config, "merge_method": "legacy"})
    do_cli(str(here / "legacy.yaml"), lora_model_dir=str(adapter), output_dir=str(here / "legacy"))
    return read(here / "legacy" / "merged")


def bfloat16_checkpoint(folder: Path) -> Path:
    """A bfloat16 Qwen3 for the demo domain, with separate head and embedding, in several shards."""
    tokenizer = build_tokenizer("instruct")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        **sizes,
        **heads,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("forked_engines")
def test_a_bfloat16_checkpoint_trained_on_a_cpu_is_merged_in_bfloat16(
    tmp_path: Path, write_jsonl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    parent = bfloat16_checkpoint(tmp_path / "parent")
    rows = [
        {"messages": [{"role": "user", "content": f"{d}+1"}, {"role": "assistant", "content": str((d + 1) % 10)}]}
        for d in range(8)
    ]
    config = iteration_config(
        load_recipe(ROOT / "recipes" / "arithmetic.yaml"),
        base_model=str(parent),
        pairs=write_jsonl("pairs.jsonl", rows),
        here=tmp_path,
        seed=0,
    )
    distil.train(config, tmp_path, options=(), minimum=1e-4)
    assert lora.in_small_files(parent, tmp_path / "small") == parent, "its files are small enough"
    monkeypatch.setattr(lora, "FILE_BYTES", 20_000)  # so that the parent's files are too large
    work.merge_adapter(tmp_path, str(parent), tmp_path / "out")
    require_compatible(tmp_path / "out", parent)

    assert files.read_yaml(tmp_path / "merge-lora.yaml")["merge_method"] == "memory_efficient"
    before, merged = read(parent), read(tmp_path / "out")
    assert {info.dtype for info in list_tensors(tmp_path / "out").values()} == {"BF16"}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > len(list(parent.glob("*.safetensors"))) > 2
    assert not list(tmp_path.glob(".out*")), "the copy in smaller files is gone"
    trained = {name for name in before if "_proj." in name}
    assert {name for name in before if not torch.equal(before[name], merged[name])} == trained
    in_bfloat16 = config | lora.DTYPE_KEYS["BF16"] | {"adapter": "lora", "load_in_4bit": False}
    assert equal(merged, legacy(in_bfloat16, tmp_path, tmp_path / "adapter"))


@pytest.mark.slow
def test_the_adapter_of_the_tiny_pair_is_merged_as_legacy_does(finished_run: Path, tmp_path: Path) -> None:
    here = finished_run / "iter-1"
    config = files.read_yaml(here / "merge-lora.yaml")
    assert (config["merge_method"], config["adapter"]) == ("memory_efficient", "lora")
    assert equal(read(here / "instruct"), legacy(config, tmp_path, here / "adapter"))


@pytest.mark.slow
@pytest.mark.usefixtures("forked_engines")
def test_two_processes_learn_the_same_steps_as_one_and_their_adapter_merges(finished_run: Path, tmp_path: Path) -> None:
    config = files.read_yaml(finished_run / "iter-1" / "axolotl.yaml") | {"max_steps": 12, "logging_steps": 1}

    def trained(name: str, *options: str) -> dict[str, Any]:
        here = tmp_path / name
        places = {"output_dir": str(here / "adapter"), "dataset_prepared_path": str(here / "prepared")}
        return distil.train(config | places, here, options=options, minimum=1e-4)

    one = trained("one")
    two = trained("two", "--launcher", "torchrun", "--", "--standalone", "--nproc_per_node", "2")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert files.read_yaml(tmp_path / "two" / "axolotl.yaml")["micro_batch_size"] * 2 == config["micro_batch_size"]
    alone, shared = ([loss for _, loss in notes["losses"]] for notes in (one, two))
    assert shared == pytest.approx(alone, rel=1e-3) and shared[-1] < shared[0] / 2
    work.merge_adapter(tmp_path / "two", config["base_model"], tmp_path / "out")
    require_compatible(tmp_path / "out", Path(config["base_model"]))


def adapter_for(folder: Path, *names: str) -> Path:
    """An adapter with matrices of these names, by the header alone."""
    folder.mkdir()
    tensors = {f"base_model.model.{name}": torch.zeros(2, 2) for name in names}
    save_file(tensors, str(folder / ADAPTER_WEIGHTS))
    return folder


UP = ("model.layers.0.mlp.up_proj.lora_A.weight", "model.layers.0.mlp.up_proj.lora_B.weight")
EXPERTS = {"model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize(
    ("adapter", "extra", "shards", "method"),
    [
        (UP, {}, 1, "memory_efficient"),
        (UP, {}, 3, "memory_efficient"),
        ((*UP, "perception.queries"), {}, 1, "legacy"),
        (("model.layers.0.mlp.experts.lora_A.weight",), {}, 1, "legacy"),
        (("model.layers.0.mlp.up_proj.lora_magnitude_vector",), {}, 1, "legacy"),
        (("language_model.layers.0.mlp.up_proj.lora_A.weight",), {}, 1, "legacy"),
        (UP, EXPERTS, 1, "legacy"),  # the other method stores them fused
    ],
)
def test_the_method_is_the_one_that_leaves_nothing_out(
    adapter: tuple[str, ...], extra: dict[str, torch.Tensor], shards: int, method: str, tmp_path: Path
) -> None:
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in (qwen3(0) | extra).items()}
    parent = write_checkpoint(tmp_path / "parent", tensors, shards=shards)
    trained = {"adapter": "qlora", "load_in_4bit": True, "bf16": False, "quantize_moe_experts": True}
    config = lora.merge_config(trained, adapter_for(tmp_path / "adapter", *adapter), parent)
    assert (config["merge_method"], config["adapter"], config["load_in_4bit"]) == (method, "lora", False)
    assert "quantize_moe_experts" not in config
    if method == "legacy":
        assert config["bfloat16"] is True, "the parent's dtype, whatever the training computed in"


def test_an_adapter_that_was_trained_when_keys_had_former_names_is_merged_all_the_same() -> None:
    former = {"labels": {"answer": "digit"}, "domain": "arithmetic"}
    assert lora.read_by_merge({"adapter": "lora", "thinkswitch": former}) == {"adapter": "lora"}
    kept: dict[str, Any] = {"adapter": "lora", "thinkswitch": {"perception": {"tokens": 4}}}
    assert lora.read_by_merge({**kept, "thinkswitch": former | kept["thinkswitch"]}) == kept


def test_a_single_shard_with_an_index_keeps_its_index(tmp_path: Path) -> None:
    parent = write_checkpoint(tmp_path / "parent", qwen3(0))
    (parent / "model.safetensors").rename(parent / "model-00001-of-00001.safetensors")
    places = dict.fromkeys(qwen3(0), "model-00001-of-00001.safetensors")
    files.write_json(parent / "model.safetensors.index.json", {"weight_map": places})
    assert not lora.merges_by_shard(adapter_for(tmp_path / "adapter", *UP), parent)


def test_a_merge_into_another_layout_or_dtype_is_refused(tmp_path: Path) -> None:
    parent = write_checkpoint(tmp_path / "parent", qwen3(0) | EXPERTS)
    lora.require_same_layout(parent, write_checkpoint(tmp_path / "same", qwen3(1) | EXPERTS, shards=2))
    tied = write_checkpoint(tmp_path / "tied", qwen3(1) | EXPERTS | {"lm_head.weight": torch.zeros(96, 32)})
    lora.require_same_layout(parent, tied)
    other = {name: tensor.to(torch.bfloat16) for name, tensor in qwen3(1).items()} | EXPERTS
    with pytest.raises(
        ThinkSwitchError, match=r"model\.embed_tokens\.weight is F32 \[96, 32\] in .* and BF16 \[96, 32"
    ):
        lora.require_same_layout(parent, write_checkpoint(tmp_path / "other", other))
    with pytest.raises(ThinkSwitchError, match=r"experts\.0\.up_proj\.weight is F32 \[2, 2\] in .* and missing"):
        lora.require_same_layout(parent, write_checkpoint(tmp_path / "fused", qwen3(1)))


@pytest.mark.parametrize("shards", [1, 3])
def test_what_no_lora_touches_is_the_parents_again_after_a_merge(tmp_path: Path, shards: int) -> None:
    vector, head = "model.layers.0.mlp.gate.e_score_correction_bias", "mtp.layers.0.self_attn.q_proj.weight"
    bfloat16 = {name: tensor.to(torch.bfloat16) for name, tensor in qwen3(0).items()}
    own = {vector: torch.tensor([1.001, 2.002]), head: torch.ones(4, 4)}
    parent = write_checkpoint(tmp_path / "parent", bfloat16 | own, shards=2)
    cast = {vector: torch.ones(2, dtype=torch.bfloat16)}
    merged = write_checkpoint(tmp_path / "merged", bfloat16 | cast, shards=shards)
    lora.restore(parent, merged)
    lora.require_same_layout(parent, merged)
    assert equal(read(merged), read(parent))
    assert not list(merged.glob("*.partial"))
