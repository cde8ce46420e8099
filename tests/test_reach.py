"""Mixtures of experts: which parameters a LoRA reaches, checked before training; and that trained experts are merged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GptOssConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.checkpoints import read
from thinkswitch_plugin import files, places
from thinkswitch_plugin.demo.tokenizer import build_tokenizer
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging import lora
from thinkswitch_plugin.merging.compatibility import require_compatible
from thinkswitch_plugin.plugin import ThinkSwitchPlugin
from thinkswitch_plugin.recipe import load_recipe, overlay_path, recipe_path
from thinkswitch_plugin.training.reach import find_experts, require_reach

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
CONFIGS = {
    "qwen3_moe": Qwen3MoeConfig(**SIZES, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": GptOssConfig(
        **SIZES,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
    ),
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LINEAR = {"adapter": "qlora", "lora_target_linear": True}


def checkpoint(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name]).to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer("instruct").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_a_lora_that_leaves_the_experts_out_is_refused_with_their_share(name: str, tmp_path: Path) -> None:
    CONFIGS[name].save_pretrained(tmp_path)  # the config is enough: nothing has been downloaded yet
    sizes = AutoModelForCausalLM.from_config(CONFIGS[name])
    share = sum(p.numel() for p in sizes.parameters() if p.ndim == 3) / sum(p.numel() for p in sizes.parameters())
    message = rf"does not reach the experts of .*, {100 * share:.0f} % of .* `lora_target_parameters: \[{EXPERTS[0]}, "
    for values in (LINEAR, {"adapter": "lora", "lora_target_modules": ["all-linear"]}):
        with pytest.raises(ThinkSwitchError, match=message):
            require_reach(values, tmp_path)
    require_reach({**LINEAR, "lora_target_parameters": EXPERTS}, tmp_path)
    require_reach({"adapter": "qlora", "lora_target_modules": ["q_proj"]}, tmp_path)
    require_reach({"lora_target_linear": True}, tmp_path)


def test_the_recipe_for_a_mixture_reaches_its_experts(tmp_path: Path) -> None:
    CONFIGS["qwen3_moe"].save_pretrained(tmp_path)
    loaded = load_recipe(recipe_path("aime"), (overlay_path("qwen3-30b"),))
    require_reach(loaded.axolotl, tmp_path)
    experts = find_experts(tmp_path)
    assert experts is not None and list(experts.names) == loaded.axolotl["lora_target_parameters"]
    with pytest.raises(ThinkSwitchError, match="does not reach the experts"):
        require_reach(load_recipe(recipe_path("aime")).axolotl, tmp_path)


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    Qwen3Config(**SIZES).save_pretrained(tmp_path)
    assert find_experts(tmp_path) is None
    require_reach(LINEAR, tmp_path)


@pytest.mark.parametrize(("name", "four_bit"), [("qwen3_moe", True), ("mixtral", False), ("gpt_oss", True)])
def test_experts_named_by_lora_target_parameters_are_trained_and_merged(
    name: str, four_bit: bool, tmp_path: Path
) -> None:
    """peft as axolotl calls it, and the merge that our config chooses: experts one by one, or fused, as they were."""
    os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
    from axolotl.cli.merge_lora import do_cli
    from axolotl.monkeypatch.moe_quant import patch_peft_target_parameters_matching
    from peft import LoraConfig, PeftModel, get_peft_model

    patch_peft_target_parameters_matching()  # the order in which axolotl nests the two
    parent = checkpoint(name, tmp_path / "parent")
    quantized = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32, **(quantized if four_bit else {}))
    settings = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], target_parameters=EXPERTS, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, settings)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(64).reshape(4, 16)
    losses = []
    for _ in range(5):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")

    trained = {"base_model": str(parent), "adapter": "qlora", "load_in_4bit": True, "lora_r": 4, "lora_alpha": 8}
    config = lora.merge_config(
        {**trained, "datasets": [{"path": "x", "type": "alpaca"}], "micro_batch_size": 1, "learning_rate": 1e-3}
        | {"gradient_accumulation_steps": 1, "num_epochs": 1, "lora_target_parameters": EXPERTS}
        | files.read_yaml(places.find(places.CPU_OVERLAY)),
        tmp_path / "adapter",
        parent,
    )
    assert config["merge_method"] == "legacy"  # the other one drops the experts' LoRAs
    files.write_yaml(tmp_path / "merge-lora.yaml", config)
    do_cli(
        str(tmp_path / "merge-lora.yaml"), lora_model_dir=str(tmp_path / "adapter"), output_dir=str(tmp_path / "out")
    )
    before, after = read(parent), read(tmp_path / "out" / "merged")
    lora.require_same_layout(parent, tmp_path / "out" / "merged")
    require_compatible(parent, tmp_path / "out" / "merged")
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {
        n for n in before if (".experts." in n and "bias" not in n) or "q_proj.w" in n or "v_proj.w" in n
    }
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    with torch.no_grad():
        base = plain(input_ids=ids).logits
        expected = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))(input_ids=ids).logits
        assert (merged(input_ids=ids).logits - expected).norm() < 0.2 * (base - expected).norm()


def test_plain_axolotl_is_stopped_before_it_loads_the_model(tmp_path: Path) -> None:
    from axolotl.utils.dict import DictDefault

    CONFIGS["mixtral"].save_pretrained(tmp_path)
    with pytest.raises(ThinkSwitchError, match="does not reach the experts"):
        ThinkSwitchPlugin().pre_model_load(DictDefault({**LINEAR, "base_model": str(tmp_path)}))
