"""The axolotl plugin: it adds the `thinkswitch:` keys, seeds the adapter, and guards against a silent failure."""

from __future__ import annotations

from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from transformers import set_seed

from thinkswitch_plugin.distil import change, require_moved
from thinkswitch_plugin.errors import ThinkSwitchError


class ThinkSwitchPlugin(BasePlugin):  # type: ignore[misc]
    """`plugins: [thinkswitch_plugin.ThinkSwitchPlugin]` in a recipe."""

    def get_input_args(self) -> str:
        """Where axolotl finds the pydantic keys that this plugin adds."""
        return "thinkswitch_plugin.args.ThinkSwitchArgs"

    def pre_model_load(self, cfg: Any) -> None:
        """Seed the adapter's initial weights, and refuse evaluation during 4-bit training on a CPU.

        axolotl seeds only its trainer, which is built after the adapter. And one forward pass without
        gradients repacks bitsandbytes' weights on a CPU: the adapter then silently learns nothing.
        """
        if cfg.seed is not None:
            set_seed(int(cfg.seed))
        evaluates = cfg.val_set_size or cfg.test_datasets
        if cfg.load_in_4bit and evaluates and not torch.cuda.is_available():
            raise ThinkSwitchError(
                "4-bit training on a CPU does not survive an evaluation pass: "
                "set `val_set_size: 0` and remove `test_datasets`."
            )

    def post_train(self, cfg: Any, model: Any) -> None:
        """Stop with an error if the adapter did not move."""
        if cfg.adapter not in ("lora", "qlora"):
            return
        matrices = {
            # gathers a matrix that FSDP2 has spread over processes
            name: parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
            for name, parameter in model.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        }
        moved = change(matrices, cfg.lora_alpha / cfg.lora_r, cfg.output_dir)
        minimum = (cfg.thinkswitch or {}).get("min_adapter_change", 1e-4)
        require_moved(moved, float(minimum), cfg.output_dir)
