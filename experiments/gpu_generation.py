"""Generation by transformers at the measured shape: a reference, not what the recipe generates with (vLLM is)."""

from __future__ import annotations

import time
from typing import Any

import torch
from gpu_shape import Record, Setting, peak, synchronize

PROMPT = 64  # tokens


def generation(setting: Setting, record: Record) -> None:
    """Tokens a second at batch 1 and 8, greedy, in the checkpoint's dtype and with weights in 8 bits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kinds: dict[str, dict[str, Any]] = {
        str(setting.dtype).removeprefix("torch."): {},
        "8-bit weights (bitsandbytes)": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
    }
    for kind, options in kinds.items():
        model = AutoModelForCausalLM.from_pretrained(
            setting.checkpoint, dtype=setting.dtype, device_map={"": setting.device}, **options
        ).eval()
        for batch in (1, 8):
            ids = torch.randint(setting.vocabulary, (batch, PROMPT), device=setting.device)
            _generate(model, ids, 4)  # warms up
            if setting.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            synchronize(setting)
            began = time.perf_counter()
            _generate(model, ids, setting.new_tokens)
            synchronize(setting)
            seconds = time.perf_counter() - began
            record(
                f"{kind}, batch {batch}, {PROMPT} + {setting.new_tokens} tokens",
                seconds=seconds,
                rate=batch * setting.new_tokens / seconds,
                unit="tokens/s",
                **peak(setting),
            )
        del model


def _generate(model: Any, ids: torch.Tensor, count: int) -> None:
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
        )
