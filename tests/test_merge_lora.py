"""The adapter's merge by real axolotl: full precision, the parent's dtype and layout, a shard at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.checkpoints import equal, read
from tests.conftest import ROOT
from thinkswitch_plugin import distil, files, loop
from thinkswitch_plugin.demo.tokenizer import build_tokenizer
from thinkswitch_plugin.merging.compatibility import list_tensors, require_compatible
from thinkswitch_plugin.recipe import load_recipe


def legacy(config: dict[str, Any], here: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What axolotl's other method makes of the same adapter, in this process."""
    os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
    from axolotl.cli.merge_lora import do_cli

    files.write_yaml(here / "legacy.yaml", {**config, "merge_method": "legacy"})
    do_cli(str(here / "legacy.yaml"), lora_model_dir=str(adapter), output_dir=str(here / "legacy"))
    return read(here / "legacy" / "merged")


def bfloat16_checkpoint(folder: Path) -> Path:
    """A bfloat16 Qwen3 for the embedded domain, its head apart from its embedding, in several shards."""
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
def test_a_bfloat16_checkpoint_trained_on_a_cpu_is_merged_in_bfloat16(tmp_path: Path, write_jsonl: Any) -> None:
    parent = bfloat16_checkpoint(tmp_path / "parent")
    rows = [
        {"messages": [{"role": "user", "content": f"{d}+1"}, {"role": "assistant", "content": str((d + 1) % 10)}]}
        for d in range(8)
    ]
    config = distil.iteration_config(
        load_recipe(ROOT / "recipes" / "arithmetic.yaml"),
        base_model=str(parent),
        pairs=write_jsonl("pairs.jsonl", rows),
        adapter=tmp_path / "adapter",
        prepared=tmp_path / distil.PREPARED,
        seed=0,
        on_cpu=True,
    )
    distil.train(config, tmp_path, resume=False, options=(), minimum=1e-4)
    loop.merge_adapter(tmp_path, str(parent), tmp_path / "out")
    require_compatible(tmp_path / "out", parent)

    assert files.read_yaml(tmp_path / "merge-lora.yaml")["merge_method"] == "memory_efficient"
    before, merged = read(parent), read(tmp_path / "out")
    assert {info.dtype for info in list_tensors(tmp_path / "out").values()} == {"BF16"}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(list(parent.glob("*.safetensors"))) > 2
    trained = {name for name in before if "_proj." in name}
    assert {name for name in before if not torch.equal(before[name], merged[name])} == trained
    in_bfloat16 = config | distil.DTYPE_KEYS["BF16"] | {"adapter": "lora", "load_in_4bit": False}
    assert equal(merged, legacy(in_bfloat16, tmp_path, tmp_path / "adapter"))


def test_the_adapter_of_the_tiny_pair_is_merged_as_legacy_does(finished_run: Path, tmp_path: Path) -> None:
    here = finished_run / "iter-1"
    config = files.read_yaml(here / "merge-lora.yaml")
    assert (config["merge_method"], config["adapter"]) == ("memory_efficient", "lora")
    assert equal(read(here / "instruct"), legacy(config, tmp_path, here / "adapter"))
