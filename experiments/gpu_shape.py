"""The model that the GPU check measures: Qwen3-4B's shape or a tiny one, with random weights near a real pair's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NOISE = 0.0011  # standard deviation between the two checkpoints: the real pair's σ of about .027
SHARD = 2 * 10**9  # bytes

Record = Callable[..., None]  # record(case, seconds=…, rate=…, unit=…, allocated=…, reserved=…, note=…)


@dataclass(frozen=True)
class Setting:
    """What is measured, and where. Lengths are in tokens; `steps` are optimizer steps at each, the first to warm up."""

    work: Path
    device: str
    dtype: torch.dtype
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    lengths: tuple[int, ...]
    steps: int
    new_tokens: int
    limit: int  # bytes of device memory that the recipe may take

    @property
    def checkpoint(self) -> Path:
        """The folder of the random checkpoint."""
        return self.work / "checkpoint"

    @property
    def on_gpu(self) -> bool:
        """Whether this is the real measurement."""
        return self.device == "cuda"


def full(work: Path) -> Setting:
    """Qwen3-4B on the GPU, held to 8 GB (10⁹ bytes): a card with 8 GiB has 0.6 GB more, for CUDA itself."""
    lengths = (512, 1024, 2048, 4096)
    return Setting(
        work,
        "cuda",
        torch.bfloat16,
        36,
        2560,
        9728,
        32,
        8,
        128,
        151_936,
        lengths,
        steps=3,
        new_tokens=64,
        limit=8 * 10**9,
    )


def tiny(work: Path) -> Setting:
    """The same on the CPU, in seconds."""
    return Setting(
        work, "cpu", torch.float32, 2, 64, 128, 4, 2, 16, 512, (64, 128), steps=2, new_tokens=4, limit=8 * 10**9
    )


def shapes(setting: Setting) -> dict[str, tuple[int, ...]]:
    """The tensors of a Qwen3 checkpoint with tied embeddings, by name."""
    hidden, queries, keys = setting.hidden, setting.heads * setting.head, setting.kv_heads * setting.head
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (setting.vocabulary, hidden)}
    for layer in range(setting.layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        found |= {f"{attention}.q_proj.weight": (queries, hidden), f"{attention}.o_proj.weight": (hidden, queries)}
        found |= {f"{attention}.{n}_proj.weight": (keys, hidden) for n in "kv"}
        found |= {f"{attention}.{n}_norm.weight": (setting.head,) for n in "qk"}
        found |= {f"{mlp}.{n}_proj.weight": (setting.ffn, hidden) for n in ("gate", "up")}
        found |= {f"{mlp}.down_proj.weight": (hidden, setting.ffn)}
        found |= {f"model.layers.{layer}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    return found | {"model.norm.weight": (hidden,)}


def random_tensors(setting: Setting) -> Iterator[tuple[str, torch.Tensor]]:
    """Random weights on the device, one tensor at a time: normal with deviation .02, norms 1."""
    generator = torch.Generator(setting.device).manual_seed(0)
    for name, shape in shapes(setting).items():
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=setting.dtype, device=setting.device)
        else:
            yield name, _normal(shape, setting, generator).mul_(0.02)


def pair(setting: Setting) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two checkpoints on the device, as near each other as the real instruct and thinking ones."""
    first = dict(random_tensors(setting))
    noise = torch.Generator(setting.device).manual_seed(1)
    return first, {n: t + _normal(t.shape, setting, noise).mul_(NOISE) for n, t in first.items()}


def _normal(shape: tuple[int, ...], setting: Setting, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, dtype=setting.dtype, device=setting.device, generator=generator)


def write_checkpoint(setting: Setting) -> None:
    """Write the random checkpoint with a tokenizer of a few words, as transformers and axolotl load it."""
    from safetensors.torch import save_file

    folder = setting.checkpoint
    folder.mkdir(parents=True)
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}

    def write_shard() -> None:
        file = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(shard, str(folder / file), metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in random_tensors(setting):
        shard[name] = tensor.cpu()
        if sum(t.nbytes for t in shard.values()) > SHARD:
            write_shard()
    write_shard()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(_config(setting)))
    _write_tokenizer(folder)


def _config(setting: Setting) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": setting.hidden,
        "intermediate_size": setting.ffn,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": setting.heads,
        "num_key_value_heads": setting.kv_heads,
        "head_dim": setting.head,
        "vocab_size": setting.vocabulary,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "dtype": str(setting.dtype).removeprefix("torch."),
    }


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|endoftext|>", "<|im_end|>", "[UNK]", *"0123456789"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="[UNK]"
    )
    tokenizer.save_pretrained(folder)


def synchronize(setting: Setting) -> None:
    """Wait for the GPU, before a clock is read."""
    if setting.on_gpu:
        torch.cuda.synchronize()


def peak(setting: Setting) -> dict[str, float]:
    """The most memory allocated and reserved by torch since the last reset, in GB (10⁹ bytes); empty on a CPU."""
    if not setting.on_gpu:
        return {}
    return {
        "allocated": torch.cuda.max_memory_allocated() / 1e9,
        "reserved": torch.cuda.max_memory_reserved() / 1e9,
    }
