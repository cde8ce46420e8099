"""QLoRA by axolotl: derive an iteration's config, check what it can train, train, and check the adapter."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import PairKeys
from thinkswitch_plugin.data import switches
from thinkswitch_plugin.environment import has_cuda
from thinkswitch_plugin.errors import ThinkSwitchError, reason
from thinkswitch_plugin.recipe import PREPARED, Recipe
from thinkswitch_plugin.run import checkpoint, processes
from thinkswitch_plugin.training.layout import spread

if TYPE_CHECKING:
    from torch import Tensor

TRAINER_STATE = "trainer_state.json"
MOST_LOSSES = 200  # that a stamp holds of one training
# What axolotl and its engines are told in every stage of ours.
ENGINE_ENV = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "warning",  # with less, the trainer writes no progress into its log
}


def require_trainable(recipe: Recipe, checkpoint: str, revision: str | None = None) -> None:
    """Refuse a recipe that cannot train this checkpoint as described; this needs only its config and tokenizer.

    Raises `ThinkSwitchError` for an architecture that transformers does not know, the chat template, a mixture's
    experts (see `contract` and `reach`), or a processor for images that cannot be loaded.
    """
    os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"  # before axolotl is imported, which would report its use
    from thinkswitch_plugin.merging.settings import require_known
    from thinkswitch_plugin.training.reach import require_reach
    from thinkswitch_plugin.training.strategy import require_template

    values = {**recipe.axolotl, "revision_of_model": revision}
    if (Path(checkpoint) / "config.json").is_file():
        require_known(Path(checkpoint))
    try:
        require_reach(values, checkpoint)
        require_processor(checkpoint, revision)
        require_template(values, checkpoint, recipe.keys.prompts.system)
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # what transformers raises for files that are missing or broken
        raise ThinkSwitchError(
            f"The config or the tokenizer of {checkpoint} cannot be loaded ({reason(error)}); check the folder, or the "
            "hub id, the network and your access to it."
        ) from None


def require_processor(checkpoint: str, revision: str | None) -> None:
    """Refuse a vision-language checkpoint whose processor cannot be loaded: axolotl loads it even for rows of text."""
    from axolotl.loaders.constants import MULTIMODAL_AUTO_MODEL_MAPPING
    from transformers import AutoProcessor, PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(checkpoint, revision=revision)
    if config.get("model_type") not in MULTIMODAL_AUTO_MODEL_MAPPING:
        return
    try:
        AutoProcessor.from_pretrained(checkpoint, revision=revision)
    except (AttributeError, ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise ThinkSwitchError(
            f"{checkpoint} is a vision-language model, which axolotl trains with its processor, and that cannot be loaded "
            f"({reason(error).partition('. ')[0]}); copy its `preprocessor_config.json` and the like from the original checkpoint, or "
            "install what is missing."
        ) from None


def require_switch(keys: PairKeys, checkpoints: Mapping[str, str]) -> None:
    """Refuse template arguments that do not tell the modes of a pair apart; this needs only the two tokenizers.

    Args:
        checkpoints: folder or hub id by mode.

    Raises `ThinkSwitchError` with the lines to write; see `switches.fault`.
    """
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    try:
        tokenizers = {
            mode: AutoTokenizer.from_pretrained(name, revision=getattr(keys, f"revision_{mode}"))
            for mode, name in checkpoints.items()
        }
        problem = switches.fault(keys, tokenizers) if all(t.chat_template for t in tokenizers.values()) else None
    except (OSError, ValueError, TypeError, RuntimeError, TemplateError) as error:
        raise ThinkSwitchError(
            f"A tokenizer or a chat template of the pair cannot be used ({reason(error)})."
        ) from None
    if problem:
        raise ThinkSwitchError(f"{problem[0].upper()}{problem[1:]}." if problem.startswith("the ") else f"{problem}.")


def train(config: dict[str, Any], here: Path, *, options: Sequence[str], minimum: float) -> dict[str, Any]:
    """Have axolotl train one adapter into `here/adapter`, with its config in `here/axolotl.yaml`.

    Goes on with what it finds there, which must have been made from the same inputs; see `stamp.once`.

    Args:
        config: complete, with `here/adapter` and `here/prepared` in it.
        options: further options for `axolotl train`; see `layout.spread`.
        minimum: how far the adapter must have moved; see `require_moved`.

    Returns:
        `adapter_change`; `processes` that trained; `resumed_from`, the trainer's checkpoint that a killed attempt had
        left, or None; `losses`, see `training_losses`.

    Raises:
        ThinkSwitchError: axolotl fails or the adapter did not move.
    """
    adapter, building, prepared = here / "adapter", files.temporary_sibling(here / "adapter"), here / PREPARED
    files.remove(prepared)  # axolotl would take up prepared data of other pairs
    if adapter.is_dir() and (here / "axolotl.yaml").is_file():
        console.say("  the adapter of these pairs is whole")
        moved = adapter_change(adapter)
        require_moved(moved, minimum, adapter)
        return {"adapter_change": moved, "resumed_from": None}
    before = whole_checkpoints(building)
    if before:
        console.say(f"  resuming from {before[-1].name} of the interrupted training")
    config, options, world = spread(config, options)
    files.write_yaml(here / "axolotl.yaml", config, header="Runs by itself: axolotl train THIS_FILE")
    command: list[str | Path] = ["axolotl", "train", here / "axolotl.yaml", "--output-dir", building]
    env = ENGINE_ENV
    if not has_cuda():
        command += ["--launcher", "python"]
        env = ENGINE_ENV | {"TORCH_COMPILE_DISABLE": "1"}  # the KD loss needs a C++ compiler, and longer than it saves
        if world > 1:
            env["ACCELERATE_USE_CPU"] = "true"  # else each process would learn from all rows, by itself
    command += options
    try:
        processes.run_logged(command, here / "logs" / "train.log", env=env, title="axolotl train")
    except ThinkSwitchError:
        if before and whole_checkpoints(building) == before:
            files.remove(before[-1])  # it may be what failed: the next attempt takes the one before
        raise
    moved = adapter_change(building)
    require_moved(moved, minimum, building)
    for checkpoint_folder in building.glob("checkpoint-*"):
        files.remove(checkpoint_folder)
    losses = training_losses(building / TRAINER_STATE)
    files.remove(building / TRAINER_STATE)  # not a part of the adapter
    files.put_in_place(building, adapter)
    files.remove(prepared)
    resumed = before[-1].name if before else None
    return {"adapter_change": moved, "processes": world, "resumed_from": resumed, "losses": losses}


def training_losses(state: Path) -> list[list[float]]:
    """(step, training loss) as the trainer logged them, at most `MOST_LOSSES` evenly spread; none if it kept no log."""
    history = files.read_json(state).get("log_history", []) if state.is_file() else []
    found = [[row["step"], row["loss"]] for row in history if "loss" in row and "step" in row]
    return found[:: math.ceil(len(found) / MOST_LOSSES) or 1]


def whole_checkpoints(building: Path) -> list[Path]:
    """The trainer's checkpoints to resume from, oldest first; one whose writing was cut short is removed."""
    found = [p for p in building.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    kept = []
    for folder in sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-"))):
        try:
            files.read_json(folder / TRAINER_STATE)  # the trainer writes this last
        except ThinkSwitchError:
            files.remove(folder)
        else:
            kept.append(folder)
    return kept


def adapter_change(adapter: Path | str) -> float:
    """How far a saved adapter moved; see `change`.

    Raises `ThinkSwitchError` if the folder holds no adapter.
    """
    from safetensors import safe_open

    folder = Path(adapter)
    weights = folder / checkpoint.ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ThinkSwitchError(
            f"{weights} does not exist; axolotl saved no adapter; see `logs/train.log` in the same folder."
        )
    config = files.read_json(folder / "adapter_config.json")
    with safe_open(str(weights), framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return change(tensors, config["lora_alpha"] / config["r"], str(weights))


def change(tensors: Mapping[str, Tensor], scale: float, where: str) -> float:
    """How far an adapter moved: the median over its matrices of ‖s·B·A‖ / ‖A‖ (Frobenius norms, s = α/r).

    B starts at zero, so an adapter that did not train gives 0 or nearly so; one that did
    gives the size of its B, whatever the size of the model.

    Args:
        tensors: every LoRA matrix by name, `…lora_A…` (r, in) and `…lora_B…` (out, r).

    Raises:
        ThinkSwitchError: there is none, or one holds NaN or infinity.
    """
    import torch

    changes = []
    for name in sorted(n for n in tensors if ".lora_B." in n):
        a, b = tensors[name.replace(".lora_B.", ".lora_A.")].float(), tensors[name].float()
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ThinkSwitchError(f"{where}: {name} holds NaN or infinity; lower the learning rate.")
        changes.append(float(torch.linalg.matrix_norm(scale * b @ a) / torch.linalg.matrix_norm(a)))
    if not changes:
        raise ThinkSwitchError(f"{where} contains no LoRA matrices; use `adapter: qlora` or `lora` in the recipe.")
    return sorted(changes)[len(changes) // 2]


def require_moved(change: float, minimum: float, adapter: Path | str) -> None:
    """Raise `ThinkSwitchError` if an adapter did not learn anything."""
    if change < minimum:
        raise ThinkSwitchError(
            f"{adapter}: the adapter did not move (change {change:.2e}, expected at least {minimum:.0e}), so nothing "
            "was learnt. On a CPU 4-bit training fails so after an evaluation pass; see docs/faq.md."
        )
