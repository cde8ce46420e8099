"""Checkpoint folders for tests: a few tensors, or a complete Qwen3 with three narrow layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from thinkswitch_plugin import files

HIDDEN, FFN, HEADS, HEAD, VOCABULARY = 32, 64, 2, 16, 96
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HEAD,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "dtype": "float32",
}


def qwen3(seed: int, layers: int = 3) -> dict[str, torch.Tensor]:
    """The tensors of a Qwen3; those of every seed are close to those of seed 0, like the two checkpoints of a pair."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + f"self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in "qkvo"}
        shapes |= {prefix + f"self_attn.{n}_norm.weight": (HEAD,) for n in "qk"}
        shapes |= {prefix + f"mlp.{n}_proj.weight": (FFN, HIDDEN) for n in ("gate", "up")}
        shapes |= {prefix + "mlp.down_proj.weight": (HIDDEN, FFN)}
        shapes |= {prefix + f"{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    start, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    near = 0.05 if seed else 0.0
    return {
        name: torch.randn(shape, generator=start) + near * torch.randn(shape, generator=noise)
        for name, shape in sorted(shapes.items())
    }


def write(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, **config: Any) -> Path:
    """A checkpoint folder, its tensors dealt out to a number of files."""
    folder.mkdir(parents=True)
    files.write_json(folder / "config.json", {**CONFIG, **config})
    if shards == 1:
        save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
        return folder
    places = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(places.values()):
        save_file(
            {n: tensors[n] for n in tensors if places[n] == shard}, str(folder / shard), metadata={"format": "pt"}
        )
    files.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(str(folder / "model.safetensors"))
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
        found |= load_file(str(folder / shard))
    return found


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two checkpoints contain the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
