"""A checkpoint as a LoRA of another: mergekit extracts it, and the part that it cannot represent is measured.

mergekit's `mergekit-extract-lora` takes the difference of every matrix inside the layers and keeps its largest
singular values. Norms are not matrices, and vLLM serves no full-rank module (`modules_to_save`) beside a LoRA,
so norms and what lies outside the layers (embeddings, output layer) stay as the base has them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from thinkswitch_plugin import files
from thinkswitch_plugin.environment import has_cuda
from thinkswitch_plugin.errors import ThinkSwitchError, reason
from thinkswitch_plugin.merging.compatibility import list_weights, require_compatible
from thinkswitch_plugin.merging.kernel import all_finite, non_finite
from thinkswitch_plugin.merging.layout import align
from thinkswitch_plugin.merging.settings import require_known
from thinkswitch_plugin.merging.tensors import reading, split_name
from thinkswitch_plugin.run import processes
from thinkswitch_plugin.run.progress import Bar

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OUTSIDE_LAYERS = r"^(?!.*\.\d+\.)"  # a module name without a layer's number
PREFIX = "base_model.model."
MOST_LEFT_OUT = 0.01  # of a checkpoint's parameters, in matrices inside the layers
INSTEAD = "serve the two checkpoints one by one: make serve MODEL=."
MEANT_OTHERWISE = "+@,"  # mergekit reads `model@revision+lora`, lm-eval `key=value,key=value`


def extract(base: Path, checkpoint: Path, out: Path, rank: int, log: Path) -> float:
    """Have mergekit write the LoRA that turns `base` into `checkpoint` into the folder `out`; return its seconds.

    Args:
        base, checkpoint: compatible checkpoint folders.
        rank: the largest rank of a matrix; one that has fewer rows or columns gets as many.
        log: mergekit's output goes here.

    Raises:
        ThinkSwitchError: the two are no pair, a folder's name means something else to mergekit, or it failed.
    """
    for folder in (base, checkpoint, out):
        require_plain_name(folder)
    require_compatible(base, checkpoint)
    words: list[str | Path] = [
        "mergekit-extract-lora",
        *("--base-model", base, "--model", checkpoint, "--out-path", out, "--max-rank", str(rank)),
        *("--exclude-regex", OUTSIDE_LAYERS, "--skip-undecomposable"),
    ]
    return processes.run_logged(words + (["--cuda"] if has_cuda() else []), log, title="mergekit-extract-lora")


def require_extractable(base: Path, checkpoint: Path) -> None:
    """Refuse an export that mergekit could not finish, or whose adapters would leave out much, before any work.

    Raises `ThinkSwitchError` naming the tensor that mergekit cannot take apart, or the share of the parameters that
    no adapter would carry, such as experts.
    """
    from thinkswitch_plugin.merging.mergekit_private import extracted_tensors

    require_known(checkpoint)
    stored = list_weights(checkpoint)
    kind = (files.read_json(checkpoint / "config.json").get("architectures") or ["no architecture"])[0]
    try:
        carried = extracted_tensors(base, checkpoint, OUTSIDE_LAYERS)
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ThinkSwitchError(
            f"mergekit cannot extract an adapter from {checkpoint} ({kind}: {reason(error)}); {INSTEAD}"
        ) from None
    if carried is None:
        raise ThinkSwitchError(f"mergekit, which extracts the adapters, does not know {kind}; {INSTEAD}")
    for name in sorted(carried):
        if name not in stored or len(stored[name].shape) > 2:
            problem = f"has {len(stored[name].shape)} dimensions" if name in stored else "is not in the checkpoint"
            raise ThinkSwitchError(
                f"mergekit cannot extract an adapter from {checkpoint}: it would take {name} apart, which {problem}; "
                f"{INSTEAD}"
            )
    inside = {name for name, info in stored.items() if split_name(name)[1] and len(info.shape) > 1}
    left = sorted(inside - carried)
    share = sum(stored[name].elements for name in left) / sum(info.elements for info in stored.values())
    if share > MOST_LEFT_OUT:
        raise ThinkSwitchError(
            f"The adapters that mergekit extracts from {checkpoint} would leave out {100 * share:.0f} % of its "
            f"parameters, such as {left[0]}; {INSTEAD}"
        )


def require_plain_name(folder: Path) -> None:
    """Raise `ThinkSwitchError` for a folder whose name an engine would take apart."""
    for sign in MEANT_OTHERWISE:
        if sign in str(folder):
            raise ThinkSwitchError(f"The folder {folder} has a `{sign}` in its name; rename it.")


def cut(adapter: Path, out: Path, rank: int, *, base: str, revision: str | None) -> None:
    """Write a LoRA's leading `rank` singular directions as the PEFT adapter `out`: mergekit's extraction at that rank.

    Args:
        adapter: what `extract` wrote at this rank or a larger one.
        base, revision: how users find the base; a hub id, or a folder.

    Raises:
        ThinkSwitchError: the adapter holds NaN or infinity, so a checkpoint does.
    """
    kept: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for name, tensor in load_file(str(adapter / WEIGHTS)).items():
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            continue  # the difference of a bias, which neither PEFT nor vLLM would add
        if not all_finite(tensor):
            raise ThinkSwitchError(non_finite("The base or the exported checkpoint", name))
        first = name.endswith(".lora_A.weight")
        kept[name] = (tensor[:rank] if first else tensor[:, :rank]).contiguous()
        ranks[re.sub(r"\.lora_[AB]\.weight$", "", name).removeprefix(PREFIX)] = kept[name].shape[0 if first else 1]
    largest = max(ranks.values())
    fewer = {module: found for module, found in sorted(ranks.items()) if found < largest}
    config = {
        **files.read_json(adapter / CONFIG),
        "base_model_name_or_path": base,
        "revision": revision,
        "r": largest,
        "lora_alpha": largest,  # the scale alpha / r is 1: the factors are the difference itself
        "rank_pattern": fewer,
        "alpha_pattern": fewer,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in ranks}),
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(kept, str(out / WEIGHTS), metadata={"format": "pt"})
    files.write_json(out / CONFIG, config)


def losses(base: Path, checkpoint: Path, adapters: Sequence[Path]) -> list[dict[str, Any]]:
    """What is lost of the difference D between a checkpoint and its base when adapters stand for it.

    Reads one tensor of each checkpoint at a time, and works in float32 (float64 for float64 tensors).

    Returns:
        For every adapter, with D̂ the difference that base + adapter makes, and all norms over all weights:
        ``error`` = ‖D − D̂‖/‖D‖; ``error_in_matrices``, the same over the matrices in the adapter alone;
        ``left_out`` = the share of ‖D‖² in tensors that it leaves as the base has them;
        ``tensors_left_out`` = how many of those differ. All are 0 where there is no difference.
    """
    aligned = align({folder: list_weights(folder) for folder in (base, checkpoint)})
    left, right = aligned.checkpoints[base], aligned.checkpoints[checkpoint]
    factors = [{name: t.float() for name, t in load_file(str(adapter / WEIGHTS)).items()} for adapter in adapters]
    inside, outside, differ = 0.0, 0.0, 0
    missed = [0.0] * len(adapters)
    with reading() as read, Bar(len(left), f"{checkpoint.name}: what is lost", unit="tensor") as bar:
        for name, info in left.items():
            dtype = torch.float64 if "F64" in (info.dtype, right[name].dtype) else torch.float32
            difference = right[name].tensor(read).to(dtype) - info.tensor(read).to(dtype)
            down, up = (f"{PREFIX}{name.removesuffix('.weight')}.lora_{side}.weight" for side in "AB")
            squares = _squares(difference)
            if down in factors[0]:
                inside += squares
                for i, found in enumerate(factors):
                    missed[i] += _squares(difference - found[up] @ found[down])
            else:
                outside += squares
                differ += squares > 0
            bar.update(1)
    whole = inside + outside
    return [
        {
            "error": math.sqrt((found + outside) / whole) if whole else 0.0,
            "error_in_matrices": math.sqrt(found / inside) if inside else 0.0,
            "left_out": outside / whole if whole else 0.0,
            "tensors_left_out": differ,
        }
        for found in missed
    ]


def _squares(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
