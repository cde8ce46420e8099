"""What a recipe's LoRA cannot reach: the experts of a mixture, which transformers holds as one parameter a layer.

`lora_target_linear` takes the linear layers of a model. The experts are none: of Qwen3-30B-A3B it would train the
attention alone. They are reached by `lora_target_parameters`, which names parameters by the end of their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkswitch_plugin.environment import without_gpu_kernels
from thinkswitch_plugin.errors import ThinkSwitchError

AFTER_THE_LAYER = re.compile(r"^.*\.\d+\.")


@dataclass(frozen=True)
class Experts:
    """The fused experts of a model: how `lora_target_parameters` names them, and their share of all parameters."""

    names: tuple[str, ...]
    share: float


def find_experts(checkpoint: str | Path, revision: str | None = None) -> Experts | None:
    """The fused experts of a checkpoint, by its config alone; None if it has none, or transformers does not know it."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    without_gpu_kernels()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint, revision=revision))
    except ValueError:
        return None  # axolotl itself says so
    convolutions = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)
    }
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    fused = [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 2 and name not in convolutions and AFTER_THE_LAYER.match(name)
    ]
    if not fused:
        return None
    names = dict.fromkeys(AFTER_THE_LAYER.sub("", name) for name in fused)
    return Experts(tuple(names), sum(sizes[name] for name in fused) / sum(sizes.values()))


def require_reach(values: Mapping[str, Any], checkpoint: str | Path) -> None:
    """Refuse a recipe that asks for LoRA on every linear layer of a mixture of experts, and so leaves out the experts.

    A recipe that names what it trains (`lora_target_parameters`, or `lora_target_modules` without
    `lora_target_linear`) is taken at its word.

    Args:
        values: axolotl's keys.

    Raises:
        ThinkSwitchError: the experts would not be trained; the sentence names their share of the parameters.
    """
    modules = values.get("lora_target_modules") or []
    everything = values.get("lora_target_linear") or "all-linear" in modules
    if not values.get("adapter") or not everything or values.get("lora_target_parameters"):
        return
    if experts := find_experts(checkpoint, values.get("revision_of_model")):
        named = ", ".join(experts.names)
        raise ThinkSwitchError(
            f"`lora_target_linear` does not reach the experts of {checkpoint}, {100 * experts.share:.0f} % of its "
            f"parameters; add `lora_target_parameters: [{named}]` to train them, or, to leave them as they are, name "
            "the matrices to train in `lora_target_modules` and take `lora_target_linear` out."
        )
