"""The merge of an adapter by axolotl, in full precision: the config it is given, and what it must leave as it was."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.compatibility import list_weights
from thinkswitch_plugin.merging.tensors import list_file, list_tensors, reading
from thinkswitch_plugin.run.checkpoint import ADAPTER_WEIGHTS, MODULE
from thinkswitch_plugin.run.progress import Bar

# How axolotl's `legacy` merge is told the dtype to write, by the name that safetensors has for it.
DTYPE_KEYS: dict[str, dict[str, bool]] = {"BF16": {"bfloat16": True}, "F16": {"float16": True}, "F32": {}}

FILE_BYTES = 10**9  # of weights in one file, as the recipes' merges write them


def read_by_merge(trained: dict[str, Any]) -> dict[str, Any]:
    """The config of a training without the keys of ours that no merge reads; an older run's may have former names."""
    ours = {key: value for key, value in (trained.get("thinkswitch") or {}).items() if key == "perception"}
    rest = {key: value for key, value in trained.items() if key != "thinkswitch"}
    return rest | ({"thinkswitch": ours} if ours else {})


def merge_config(config: dict[str, Any], adapter: Path, parent: Path) -> dict[str, Any]:
    """The config with which `axolotl merge-lora` merges an adapter in full precision, in the dtype of its parent.

    Both of axolotl's methods then write the same bits. `memory_efficient` reads and writes a shard at a time, and
    rounds through NF4 only if the config says that the adapter was trained on a 4-bit model. `legacy` loads the
    whole model, and takes what the other would leave out; see `merges_by_shard`.

    Args:
        config: the one that the adapter was trained with.
        adapter, parent: the adapter's folder and that of the checkpoint it was trained on.
    """
    plain = {**config, "adapter": "lora", "load_in_4bit": False, "load_in_8bit": False}
    plain.pop("quantize_moe_experts", None)  # axolotl refuses it without a quantized model
    if merges_by_shard(adapter, parent):
        return plain | {"merge_method": "memory_efficient"}
    stored, _ = Counter(info.dtype for info in list_tensors(parent).values()).most_common(1)[0]
    asked = {"bf16": False, "fp16": False, "tf32": False, **DTYPE_KEYS.get(stored, {})}
    return plain | {"merge_method": "legacy", **asked}


def merges_by_shard(adapter: Path, parent: Path) -> bool:
    """Whether axolotl's `memory_efficient` merge covers an adapter and keeps the parent's layout.

    It does if every part of the adapter is a LoRA of a matrix that the parent stores under the same name. It would
    leave out a perception module and LoRAs of fused experts, write experts that are stored one by one in another
    layout, and write no index for a single shard that has one.
    """
    stored = list_tensors(parent)
    shards = {info.file for info in stored.values()}
    named = len(shards) > 1 or shards == {parent / "model.safetensors"}
    return (
        named
        and shards == set(parent.glob("model*.safetensors"))
        and not any(re.search(r"\.experts\.\d+\.", name) for name in stored)
        and all(lora_target(name) in stored for name in list_file(adapter / ADAPTER_WEIGHTS))
    )


def in_small_files(parent: Path, folder: Path) -> Path:
    """A checkpoint whose files axolotl, which holds one of them at a time, can hold: `parent`, or a copy in `folder`.

    Raises `ThinkSwitchError` if the disk is too small for the copy.
    """
    stored = list_tensors(parent)
    sizes = Counter[Path]({info.file: info.file.stat().st_size for info in stored.values()})
    largest = max(info.elements for info in stored.values()) * 4  # bytes at most; a tensor is not split
    if max(sizes.values()) <= max(2 * FILE_BYTES, largest):
        return parent
    from mergekit.io.tensor_writer import TensorWriter

    what = f"The merge, with a copy of {parent} in smaller files,"
    files.require_space(folder.parent, 2 * sizes.total(), what)
    writer, bar = TensorWriter(str(folder), max_shard_size=FILE_BYTES), Bar(len(stored), "smaller files", unit="tensor")
    with reading() as read:
        for info in stored.values():
            writer.save_tensor(info.name, read(info))
            bar.update(1)
        writer.finalize()
    bar.close()
    for file in parent.iterdir():
        if file.is_file() and "safetensors" not in file.name:
            files.link(file, folder / file.name)
    return folder


def lora_target(name: str) -> str | None:
    """The tensor that a matrix of an adapter is for; None if the matrix is not one of a LoRA."""
    found = re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", name)
    return f"{found.group(1)}.weight" if found else None


def restore(parent: Path, merged: Path) -> None:
    """Put back, as the parent stores it, what a `legacy` merge changes although no LoRA touches it.

    It casts a whole model to one dtype (GLM's and DeepSeek's routers keep a vector in float32 beside bfloat16 matrices),
    and leaves out what the model class has no place for (heads for multi-token prediction). One shard is in memory at a
    time.
    """
    from safetensors.torch import load_file, save_file

    from thinkswitch_plugin.merging.layout import Layout, skeleton

    before, after = list_weights(parent), list_weights(merged)
    vectors = [name for name, info in after.items() if name in before and len(info.shape) == 1]
    places = {name: after[name].file for name in vectors if after[name].dtype != before[name].dtype}
    lost = before.keys() - after.keys()
    model = skeleton(parent) if lost else None
    if model is not None:
        places |= dict.fromkeys(lost & {*Layout(model, before).ignored}, max(info.file for info in after.values()))
    for shard in sorted(set(places.values())):
        tensors = load_file(str(shard))
        with reading() as read:
            tensors |= {name: read(before[name]) for name, file in places.items() if file == shard}
        whole = files.temporary_sibling(shard)
        save_file(tensors, str(whole), metadata={"format": "pt"})
        files.put_in_place(whole, shard)
    index = merged / "model.safetensors.index.json"
    if index.is_file() and places:
        values = files.read_json(index)
        values["weight_map"] |= {name: file.name for name, file in places.items()}
        files.write_json(index, values)


def require_same_layout(parent: Path, merged: Path) -> None:
    """Raise `ThinkSwitchError` unless a merged checkpoint has its parent's tensors, with their shapes and dtypes."""
    before, after = list_weights(parent), list_weights(merged)
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old and new and (old.shape, old.dtype) == (new.shape, new.dtype):
            continue
        was, became = (f"{info.dtype} {list(info.shape)}" if info else "missing" for info in (old, new))
        if not old and name.startswith(f"{MODULE}."):
            continue  # a perception module was trained along
        raise ThinkSwitchError(
            f"axolotl merged the adapter into a checkpoint of another layout: {name} is {was} in {parent} and {became} "
            "in the result; this architecture cannot be distilled with the axolotl that is installed."
        )
