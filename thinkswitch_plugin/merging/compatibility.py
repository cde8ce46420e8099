"""Are two checkpoints a compatible pair? Decided from configs and safetensors headers alone."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, checked against the file's length.

    Raises `ThinkSwitchError` naming the file if it is damaged or cut short.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > size:
                raise ValueError("header longer than the file")
            header: dict[str, Any] = json.loads(handle.read(length))
    except FileNotFoundError:
        raise ThinkSwitchError(f"{path} is missing.") from None
    except (struct.error, ValueError) as error:
        raise ThinkSwitchError(f"{path} is no whole safetensors file ({error}); copy or download it again.") from None
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != 8 + length + end:
        raise ThinkSwitchError(
            f"{path} is {size} bytes long where its header promises {8 + length + end}; copy or download it again."
        )
    return header


def list_tensors(checkpoint: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint folder by name.

    Raises `ThinkSwitchError`: no safetensors, a shard missing or damaged.
    """
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted({checkpoint / name for name in files.read_json(index)["weight_map"].values()})
    else:
        shards = sorted(checkpoint.glob("*.safetensors"))
    if not shards:
        raise ThinkSwitchError(f"{checkpoint} holds no safetensors file; ThinkSwitch reads no other weights.")
    found: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, entry in read_header(shard).items():
            found[name] = TensorInfo(shard, tuple(entry["shape"]), entry["dtype"])
    return found


def config_difference(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """The first setting of two `config.json` that keeps their checkpoints from being interpolated, in words."""
    for field in ("architectures", "tie_word_embeddings", "vocab_size", "num_hidden_layers", "hidden_size"):
        if first.get(field) != second.get(field):
            return f"`{field}` is {first.get(field)} and {second.get(field)}"
    return None


def require_compatible(instruct: Path, thinking: Path) -> None:
    """Check that two checkpoint folders can be interpolated tensor by tensor.

    Raises `ThinkSwitchError` naming the first difference: architecture, tied
    embeddings, vocabulary, a tensor that only one has, a shape or a dtype.
    """
    a, b = files.read_json(instruct / "config.json"), files.read_json(thinking / "config.json")
    if difference := config_difference(a, b):
        raise ThinkSwitchError(f"{instruct} and {thinking} are no compatible pair: {difference}.")
    left, right = list_tensors(instruct), list_tensors(thinking)
    for name in sorted(left.keys() ^ right.keys()):
        owner = instruct if name in left else thinking
        raise ThinkSwitchError(
            f"{instruct} and {thinking} are no compatible pair: only {owner} holds the tensor {name}."
        )
    for name, info in left.items():
        other = right[name]
        if info.shape != other.shape:
            raise ThinkSwitchError(
                f"{instruct} and {thinking} are no compatible pair: {name} has shape "
                f"{list(info.shape)} and {list(other.shape)}."
            )
        if info.dtype != other.dtype:
            raise ThinkSwitchError(
                f"{instruct} and {thinking} are no compatible pair: {name} is stored as {info.dtype} and {other.dtype}."
            )
    vocabularies = [_vocabulary(instruct), _vocabulary(thinking)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise ThinkSwitchError(
            f"{instruct} and {thinking} are no compatible pair: their tokenizers' vocabularies differ."
        )


def _vocabulary(checkpoint: Path) -> Any:
    path = checkpoint / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = files.read_json(path)
    vocabulary = tokenizer.get("model", {}).get("vocab")
    added = {(t["id"], t["content"]) for t in tokenizer.get("added_tokens") or []}
    # Added tokens may sit in either list, so they are compared together.
    return {**(vocabulary if isinstance(vocabulary, dict) else {}), **{c: i for i, c in added}}
