"""The tensors of a checkpoint folder, from its safetensors headers alone; and whether they are quantised."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError

if TYPE_CHECKING:
    import torch

FLOATS = ("F64", "F32", "F16", "BF16")
# What quantisers add beside the codes: FP8, compressed-tensors, GPTQ, AWQ, bitsandbytes, MXFP4.
SCALES = (
    *("weight_scale_inv", "weight_scale", "input_scale", "weight_packed"),
    *("qweight", "qzeros", "absmax", "quant_map"),
)


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its name, the file that holds it, its shape, and its dtype as safetensors names it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@contextmanager
def reading() -> Iterator[Callable[[TensorInfo], torch.Tensor]]:
    """A function that maps stored tensors into memory; each file is opened once."""
    with ExitStack() as stack:
        handles: dict[Path, Any] = {}

        def read(info: TensorInfo) -> torch.Tensor:
            if info.file not in handles:
                handles[info.file] = stack.enter_context(safe_open(str(info.file), framework="pt"))
            found: torch.Tensor = handles[info.file].get_tensor(info.name)
            return found

        yield read


def split_name(name: str) -> tuple[str, str, str]:
    """`model.layers.3.mlp.up_proj.weight` -> (`model.layers.`, `3`, `mlp.up_proj.weight`); empty without a number."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    if not place:
        return "", "", name
    return ".".join(parts[:place]) + ".", parts[place], ".".join(parts[place + 1 :])


def list_file(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order in which they lie there.

    Raises `ThinkSwitchError` naming the file if it is missing, damaged or cut short.
    """
    try:
        with safe_open(str(path), framework="np") as handle:
            slices = {name: handle.get_slice(name) for name in handle.offset_keys()}
            return {n: TensorInfo(n, path, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except FileNotFoundError:
        raise ThinkSwitchError(f"{path} is missing; copy or download it again.") from None
    except (SafetensorError, OSError) as error:
        raise ThinkSwitchError(
            f"{path} is not a whole safetensors file ({error}); copy or download it again."
        ) from None


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
            raise ThinkSwitchError(
                f"{checkpoint} contains no safetensors file; ThinkSwitch does not read other formats."
            )
        return {name: info for shard in shards for name, info in list_file(shard).items()}
    places = files.read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ThinkSwitchError(f"{index} has no `weight_map`; copy or download it again.")
    held = {shard: list_file(checkpoint / shard) for shard in sorted(set(places.values()))}
    for name, shard in places.items():
        if name not in held[shard]:
            raise ThinkSwitchError(
                f"{index} places the tensor {name} in {shard}, which does not contain it; copy or download both files again."
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
        for info in list_file(shard).values():
            packed = info.dtype[0] in "IU" and len(info.shape) > 1
            if packed or info.dtype.startswith(("F8", "F6", "F4")) or info.name.rsplit(".", 1)[-1] in SCALES:
                raise ThinkSwitchError(quantised(checkpoint, f"{info.name} is stored as {info.dtype}"))


def quantised(checkpoint: Path | str, why: str) -> str:
    """The sentence that refuses a quantised checkpoint."""
    return (
        f"{checkpoint} holds quantised weights ({why}), which cannot be trained further, compared, merged or exported; use "
        "the checkpoint that it was quantised from (often the same name without -FP8, -GPTQ, -AWQ or -bnb-4bit), or load "
        "it with transformers, call `model.dequantize()` and save it with `save_pretrained`."
    )
