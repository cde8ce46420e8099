"""The model that the GPU check measures: Qwen3-4B's shape or a tiny one, with random weights near a real pair's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import random_pair
import torch

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
    """The tensors of the checkpoint, by name."""
    return random_pair.shapes(_config(setting))


def random_tensors(setting: Setting, noise: float = 0.0) -> Iterator[tuple[str, torch.Tensor]]:
    """Random weights on the device, one tensor at a time; see `random_pair`."""
    return random_pair.random_tensors(_config(setting), noise, setting.device)


def pair(setting: Setting) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two checkpoints on the device, as near each other as the real instruct and thinking ones."""
    return dict(random_tensors(setting)), dict(random_tensors(setting, random_pair.NOISE))


def write_checkpoint(setting: Setting) -> None:
    """Write the random checkpoint with a tokenizer of a few words, as transformers and axolotl load it."""
    random_pair.write_checkpoint(setting.checkpoint, _config(setting), device=setting.device)
    _write_tokenizer(setting.checkpoint)


def _config(setting: Setting) -> dict[str, Any]:
    return {
        **random_pair.QWEN3_4B,
        "hidden_size": setting.hidden,
        "intermediate_size": setting.ffn,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": setting.heads,
        "num_key_value_heads": setting.kv_heads,
        "head_dim": setting.head,
        "vocab_size": setting.vocabulary,
        "max_position_embeddings": 8192,
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
