"""Can checkpoints be merged tensor by tensor? Decided from configs and safetensors headers alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkswitch_plugin import files
from thinkswitch_plugin.checkpoint import require_plain
from thinkswitch_plugin.errors import ThinkSwitchError

CONFIG_FIELDS = (
    "architectures",
    "tie_word_embeddings",
    "vocab_size",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
)
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies (bytes from the file's start) and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    length: int


@dataclass(frozen=True)
class Allowances:
    """Differences between checkpoints that a merge config copes with.

    Attributes:
        architecture: other architectures, depths and widths, and tensors that only one has
            (`--allow-crimes`, slices of unlike models).
        vocabulary: other vocabularies (mergekit aligns the tokenizers, or cuts the embeddings).
        dtype: other dtypes (the config casts all inputs to one).
    """

    architecture: bool = False
    vocabulary: bool = False
    dtype: bool = False


def list_file(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, its header checked against the file's length.

    Raises `ThinkSwitchError` naming the file if it is missing, damaged or cut short.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > size:
                raise ValueError("header longer than the file")
            header: dict[str, Any] = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        found = {
            name: TensorInfo(
                path,
                tuple(entry["shape"]),
                entry["dtype"],
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
    except FileNotFoundError:
        raise ThinkSwitchError(f"{path} is missing; copy or download it again.") from None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ThinkSwitchError(f"{path} is no whole safetensors file ({error}); copy or download it again.") from None
    end = max((info.start + info.length for info in found.values()), default=8 + length)
    if size != end:
        raise ThinkSwitchError(
            f"{path} is {size} bytes long where its header promises {end}; copy or download it again."
        )
    return found


def list_tensors(checkpoint: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint folder by name: those of its index, or of its one file.

    Raises `ThinkSwitchError`: no safetensors, a shard missing or damaged, a tensor that
    the index places in a shard that does not hold it.
    """
    index = checkpoint / "model.safetensors.index.json"
    if not index.is_file():
        single = checkpoint / "model.safetensors"
        shards = [single] if single.is_file() else sorted(checkpoint.glob("*.safetensors"))
        if not shards:
            raise ThinkSwitchError(f"{checkpoint} holds no safetensors file; ThinkSwitch reads no other weights.")
        return {name: info for shard in shards for name, info in list_file(shard).items()}
    places = files.read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ThinkSwitchError(f"{index} has no `weight_map`; copy or download it again.")
    held = {shard: list_file(checkpoint / shard) for shard in sorted(set(places.values()))}
    for name, shard in places.items():
        if name not in held[shard]:
            raise ThinkSwitchError(
                f"{index} places the tensor {name} in {shard}, which does not hold it; copy or download both again."
            )
    return {name: held[shard][name] for name, shard in places.items()}


def list_weights(checkpoint: Path) -> dict[str, TensorInfo]:
    """`list_tensors` without a head that is the embedding again: some savers store it, others leave it out."""
    tied = files.read_json(checkpoint / "config.json").get("tie_word_embeddings")
    return {name: info for name, info in list_tensors(checkpoint).items() if not (tied and name == HEAD)}


def config_difference(first: dict[str, Any], second: dict[str, Any], allowed: Allowances | None = None) -> str | None:
    """The first setting of two `config.json` that keeps their checkpoints from being interpolated, in words."""
    allowed = allowed or Allowances()
    for field in CONFIG_FIELDS:
        if (allowed.architecture and field != "vocab_size") or (allowed.vocabulary and field == "vocab_size"):
            continue
        if first.get(field) != second.get(field):
            return f"`{field}` is {first.get(field)} and {second.get(field)}"
    bases = [rope_base(config) for config in (first, second)]
    if not allowed.architecture and None not in bases and bases[0] != bases[1]:
        return f"`rope_theta` is {bases[0]:g} and {bases[1]:g}"
    return None


def rope_base(config: dict[str, Any]) -> float | None:
    """The base of the rotary embedding, where transformers 5 writes it or where older ones did; None if nowhere."""
    places = (config.get("rope_parameters"), config)
    found = next((place["rope_theta"] for place in places if isinstance(place, dict) and "rope_theta" in place), None)
    return float(found) if isinstance(found, int | float) else None


def tensor_difference(
    left: dict[str, TensorInfo], right: dict[str, TensorInfo], allowed: Allowances
) -> tuple[str, str] | None:
    """The first tensor, and how it differs, that keeps two lists of tensors from being interpolated."""
    for name, info in left.items():
        other = right.get(name)
        if other is None:
            continue
        outside_layers = not any(part.isdigit() for part in name.split("."))
        if info.shape != other.shape and not (
            allowed.vocabulary and outside_layers and info.shape[1:] == other.shape[1:]
        ):
            return name, f"has shape {list(info.shape)} and {list(other.shape)}"
        if info.dtype != other.dtype and not allowed.dtype:
            return name, f"is stored as {info.dtype} and {other.dtype}"
    return None


def require_compatible(first: Path, second: Path, allowed: Allowances | None = None) -> None:
    """Check that two checkpoint folders can be interpolated tensor by tensor.

    Raises `ThinkSwitchError` naming the first difference: architecture, tied
    embeddings, vocabulary, a tensor that only one has, a shape or a dtype.
    """
    allowed = allowed or Allowances()
    for folder in (first, second):
        require_plain(folder)
    refusal = f"{first} and {second} are no compatible pair"
    a, b = files.read_json(first / "config.json"), files.read_json(second / "config.json")
    if difference := config_difference(a, b, allowed):
        raise ThinkSwitchError(f"{refusal}: {difference}; both must come from one base.")
    left, right = list_weights(first), list_weights(second)
    for name in sorted(left.keys() ^ right.keys()):
        if not allowed.architecture:
            owner = first if name in left else second
            raise ThinkSwitchError(f"{refusal}: only {owner} holds the tensor {name}; both must come from one base.")
    if found := tensor_difference(left, right, allowed):
        raise ThinkSwitchError(f"{refusal}: {found[0]} {found[1]}; both must come from one base.")
    if not allowed.vocabulary:
        vocabularies = [_vocabulary(first), _vocabulary(second)]
        if None not in vocabularies and vocabularies[0] != vocabularies[1]:
            raise ThinkSwitchError(f"{refusal}: their tokenizers' vocabularies differ; both must share one.")


def require_all_compatible(checkpoints: Iterable[Path], allowed: Allowances | None = None) -> None:
    """Check every checkpoint against the first. Raises `ThinkSwitchError` for the first pair that differs."""
    first, *others = checkpoints
    for other in others:
        require_compatible(first, other, allowed)


def _vocabulary(checkpoint: Path) -> Any:
    path = checkpoint / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = files.read_json(path)
    vocabulary = tokenizer.get("model", {}).get("vocab")
    added = {(t["id"], t["content"]) for t in tokenizer.get("added_tokens") or []}
    # Added tokens may sit in either list, so they are compared together.
    return {**(vocabulary if isinstance(vocabulary, dict) else {}), **{c: i for i, c in added}}
