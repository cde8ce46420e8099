"""QLoRA by the recipe `recipes/aime.yaml`: through axolotl, or with the same parts through peft and bitsandbytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from gpu_probe import Probe, limit_memory
from gpu_shape import Record, Setting
from torch.utils.data import SequentialSampler

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
CHUNKS = 8  # axolotl's default for `chunked_cross_entropy`


def recipe(setting: Setting) -> dict[str, Any]:
    """The axolotl keys of the recipe, with the published CPU overlay on a CPU."""
    keys: dict[str, Any] = yaml.safe_load((RECIPES / "aime.yaml").read_text(encoding="utf-8"))
    if not setting.on_gpu:
        keys |= yaml.safe_load((RECIPES / "cpu.overlay.yaml").read_text(encoding="utf-8"))
    del keys["thinkswitch"]
    return keys


def rows(setting: Setting, accumulation: int) -> list[dict[str, list[int]]]:
    """Random token ids, shortest rows first: enough rows of each length for `steps` optimizer steps."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for length in setting.lengths:
        for _ in range(setting.steps * accumulation):
            ids = torch.randint(setting.vocabulary, (length,), generator=generator).tolist()
            found.append({"input_ids": ids, "attention_mask": [1] * length, "labels": ids})
    return found


def through_axolotl(setting: Setting, record: Record, *, limited: bool) -> None:
    """`axolotl train` in this process, with a plugin that only watches. Raises `ImportError` if it is not installed."""
    import gpu_axolotl
    from axolotl.cli.main import cli

    keys = recipe(setting)
    gpu_axolotl.setting, gpu_axolotl.limited = setting, limited
    gpu_axolotl.probe = Probe(setting, keys["gradient_accumulation_steps"], record)
    folder = setting.work / ("axolotl-limited" if limited else "axolotl")
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(setting, keys["gradient_accumulation_steps"])))
    keys |= {
        "base_model": str(setting.checkpoint),
        "plugins": ["gpu_axolotl.ProbePlugin"],
        "datasets": [{"path": str(data), "ds_type": "json", "type": None}],  # already tokenized
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "adapter"),
        "num_epochs": 1,
        "save_strategy": "no",
        # in the order of the file, each row alone and at its own length
        "curriculum_sampling": True,
        "shuffle_merged_datasets": False,
        "sample_packing": False,
        "pad_to_sequence_len": False,
    }
    config = folder / "axolotl.yaml"
    config.write_text(yaml.safe_dump(keys), encoding="utf-8")
    _watched(
        lambda: cli.main(["train", str(config), "--launcher", "python"], standalone_mode=False),
        gpu_axolotl.probe,
        limited,
    )


def through_peft(setting: Setting, record: Record, *, limited: bool) -> None:
    """The same model, adapter, optimizer and loss by transformers' trainer, peft and bitsandbytes."""
    import transformers
    from transformers.loss.loss_utils import LOSS_MAPPING

    class InOrder(transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    LOSS_MAPPING["ForCausalLM"] = chunked_cross_entropy
    keys = recipe(setting)
    limit_memory(setting, limited)
    probe = Probe(setting, keys["gradient_accumulation_steps"], record)
    arguments = transformers.TrainingArguments(
        output_dir=str(setting.work / "peft"),
        num_train_epochs=1,
        per_device_train_batch_size=keys["micro_batch_size"],
        gradient_accumulation_steps=keys["gradient_accumulation_steps"],
        gradient_checkpointing=keys["gradient_checkpointing"],
        optim=keys["optimizer"],
        learning_rate=keys["learning_rate"],
        bf16=keys["bf16"],
        tf32=keys["tf32"],
        use_cpu=not setting.on_gpu,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = InOrder(
        _adapted(setting, keys),
        arguments,
        train_dataset=rows(setting, keys["gradient_accumulation_steps"]),
        data_collator=transformers.default_data_collator,
        callbacks=[probe],
    )
    _watched(trainer.train, probe, limited)


def _adapted(setting: Setting, keys: dict[str, Any]) -> Any:
    """The model in NF4 with double quantization and its LoRA, types as axolotl leaves them."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    rounding = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=setting.dtype,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        setting.checkpoint,
        quantization_config=rounding,
        dtype=setting.dtype,
        device_map={"": setting.device},
        attn_implementation=keys["attn_implementation"],
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=keys["gradient_checkpointing"])
    for name, module in model.named_modules():
        if "norm" in name or "embed_tokens" in name or name == "lm_head":
            module.to(setting.dtype)
    adapter = LoraConfig(
        r=keys["lora_r"], lora_alpha=keys["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, adapter)


def chunked_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any
) -> torch.Tensor:
    """Cross-entropy that holds a float32 copy of an eighth of the logits at a time, as axolotl's chunked loss does.

    Args:
        logits: (batch, tokens, vocabulary).
        labels: (batch, tokens), −100 where nothing is to be learnt; shifted here.
        vocab_size: given by the model, not needed.
        num_items_in_batch: what the sum is divided by; the number of labels if None.
    """
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
    chunks = zip(logits.chunk(CHUNKS, dim=1), labels.chunk(CHUNKS, dim=1), strict=True)
    total = sum(F.cross_entropy(x.flatten(0, 1).float(), y.flatten(), reduction="sum") for x, y in chunks)
    return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def _watched(train: Any, probe: Probe, limited: bool) -> None:
    """Run a training; running out of memory is a result, not a failure."""
    try:
        train()
    except torch.OutOfMemoryError as error:
        under = f"under {probe.setting.limit / 1e9:g} GB" if limited else "on this card"
        wanted = str(error).split("Tried to allocate ")[-1].split(". ")[0]
        probe.record(f"{probe.length} tokens, a step", note=f"does not fit {under}: {wanted} more wanted")
