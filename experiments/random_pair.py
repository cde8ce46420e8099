"""Random checkpoints of any shape, as near each other as a real pair's: for the rehearsal, the benchmarks and the GPU check.

Needs torch, transformers and safetensors only, so that `gpu_check.py` can use it on a bare machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

SIZE = 0.02  # standard deviation of the weights
NOISE = 0.0011  # and of the difference of the two checkpoints: the real pair's σ of about .027
SHARD = 4 * 10**9  # bytes, about what published checkpoints have
BLOCK = 2**22 + 9  # random numbers that are drawn; tensors repeat them, shifted, to save time
SHIFTS = 1000

QWEN3_4B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 262_144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5_000_000,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a config.json, as transformers stores them; no memory is used for them.

    Raises `ValueError` for an architecture that is not one of transformers' language models.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    model.tie_weights()
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def random_tensors(
    config: Mapping[str, Any], noise: float = 0.0, device: str = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Random weights in the config's dtype, one tensor at a time: normal, but norms are 1 and biases 0.

    Args:
        noise: standard deviation of what is added; the weights without it are always the same.
    """
    dtype = getattr(torch, config["dtype"])
    generator = torch.Generator(device).manual_seed(0)
    block, other = (torch.randn(BLOCK, device=device, generator=generator) for _ in range(2))
    weights, around_one, around_zero = (
        (start + noise * other).to(dtype) for start in (SIZE * block, torch.ones(()), torch.zeros(()))
    )
    for name, shape in shapes(config).items():
        values = around_zero if name.endswith("bias") else around_one if len(shape) == 1 else weights
        count, shift = torch.Size(shape).numel(), hash(shape) % SHIFTS
        repeats = count // (BLOCK - SHIFTS) + 1
        yield name, values[shift:].repeat(repeats)[:count].view(shape)


def write_checkpoint(folder: Path, config: Mapping[str, Any], noise: float = 0.0, device: str = "cpu") -> None:
    """Write `random_tensors` as shards, with an index and the config.json; nothing of a tokenizer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    total = 0

    def write_shard() -> None:
        file = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(shard, str(folder / file), metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in random_tensors(config, noise, device):
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD:
            write_shard()
        shard[name] = tensor.cpu()
        total += tensor.nbytes
    write_shard()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
