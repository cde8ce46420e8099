"""The tensors of a checkpoint folder, from its safetensors headers alone; and whether they are quantised."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError

FLOATS = ("F64", "F32", "F16", "BF16")
# What quantisers add beside the codes: FP8, compressed-tensors, GPTQ, AWQ, bitsandbytes, MXFP4.
SCALES = (
    "weight_scale_inv",
    "weight_scale",
    "input_scale",
    "weight_packed",
    "qweight",
    "qzeros",
    "absmax",
    "quant_map",
)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies (bytes from the file's start) and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    length: int


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
        raise ThinkSwitchError(
            f"{path} is not a whole safetensors file ({error}); copy or download it again."
        ) from None
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


def quantisation(config: Any) -> str | None:
    """How a `config.json` says that its weights are quantised (`fp8`, `gptq`); None if they are not."""
    nested = [config, *(v for v in config.values() if isinstance(v, dict))] if isinstance(config, dict) else []
    found = next((place.get("quantization_config") for place in nested if place.get("quantization_config")), None)
    return str(found.get("quant_method", "unnamed") if isinstance(found, dict) else found) if found else None


def require_unquantised(checkpoint: Path) -> None:
    """Raise `ThinkSwitchError` if a checkpoint's weights are codes with scales (FP8, GPTQ, AWQ, bitsandbytes, MXFP4)."""
    path = checkpoint / "config.json"
    if method := quantisation(files.read_json(path) if path.is_file() else {}):
        raise ThinkSwitchError(quantised(checkpoint, f"its config.json has a `quantization_config` ({method})"))
    for shard in sorted(checkpoint.glob("*.safetensors")):
        for name, info in list_file(shard).items():
            if _is_code(name, info):
                raise ThinkSwitchError(quantised(checkpoint, f"{name} is stored as {info.dtype}"))


def quantised(checkpoint: Path | str, why: str) -> str:
    """The sentence that refuses a quantised checkpoint."""
    return (
        f"{checkpoint} holds quantised weights ({why}), which cannot be trained further, compared, merged or exported; use "
        "the checkpoint that it was quantised from (often the same name without -FP8, -GPTQ, -AWQ or -bnb-4bit), or load "
        "it with transformers, call `model.dequantize()` and save it with `save_pretrained`."
    )


def _is_code(name: str, info: TensorInfo) -> bool:
    packed = info.dtype[0] in "IU" and len(info.shape) > 1
    return packed or info.dtype.startswith(("F8", "F6", "F4")) or name.rsplit(".", 1)[-1] in SCALES
