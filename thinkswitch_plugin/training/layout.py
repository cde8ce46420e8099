"""How training is spread over GPUs and machines, which must not change what is learnt.

Each process of a data-parallel training adds its own rows to a step. So that a step has the recipe's number of rows
whatever the number of processes, they share it; a number that cannot be shared is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thinkswitch_plugin.engine_args import LAUNCH_OPTIONS, option_name, option_values
from thinkswitch_plugin.environment import visible_gpus
from thinkswitch_plugin.errors import ThinkSwitchError

BATCH, ACCUMULATION = "micro_batch_size", "gradient_accumulation_steps"


def rows_of_a_step(config: dict[str, Any]) -> int:
    """The rows that one step learns from. Raises `ThinkSwitchError` if a key is not a number."""
    try:
        return int(config.get(BATCH) or 1) * int(config.get(ACCUMULATION) or 1)
    except (TypeError, ValueError):
        raise ThinkSwitchError(f"`{BATCH}` and `{ACCUMULATION}` have to be whole numbers.") from None


def _count(options: Sequence[str], name: str, default: int) -> int:
    text = dict(option_values(options)).get(name)  # the last one counts
    if text is None:
        return default
    if text in ("gpu", "auto"):
        return max(1, visible_gpus())
    largest = text.rpartition(":")[2]  # torchrun's `--nnodes 1:4`
    if not (largest.isdecimal() and int(largest)):
        raise ThinkSwitchError(f"`thinkswitch.axolotl_args`: {name} is {text!r}; use a whole number above 0.")
    return int(largest)


def _launcher(options: Sequence[str]) -> str:
    return dict(option_values(options)).get("--launcher", "accelerate")


def world_size(options: Sequence[str]) -> int:
    """How many processes `axolotl train` starts with options that name a launcher or what it is to do.

    Raises `ThinkSwitchError` for a number that cannot be read.
    """
    launcher = _launcher(options)
    if launcher == "python":
        return 1
    if launcher == "torchrun":
        return _count(options, "--nproc-per-node", 1) * _count(options, "--nnodes", 1)
    return _count(options, "--num-processes", max(1, visible_gpus()))


def shared(config: dict[str, Any], processes: int) -> dict[str, Any] | None:
    """The config with which a step of `processes` processes has as many rows as of one; None if they cannot be shared."""
    if processes == 1:
        return config
    rows, left = divmod(rows_of_a_step(config), processes)
    if left:
        return None
    size = max(n for n in range(1, int(config.get(BATCH) or 1) + 1) if rows % n == 0)
    return {**config, BATCH: size, ACCUMULATION: rows // size}


def usable_gpus(config: dict[str, Any]) -> int:
    """The largest number of visible GPUs that can share the rows of a step; 1 without any.

    axolotl's KD trainer (0.19) does not find the output head of a model that is spread over processes.
    """
    if config.get("kd_trainer"):
        return 1
    return max((n for n in range(1, visible_gpus() + 1) if rows_of_a_step(config) % n == 0), default=1)


def spread(config: dict[str, Any], options: Sequence[str]) -> tuple[dict[str, Any], list[str], int]:
    """How a config is trained on this machine: the config, the options of `axolotl train`, the number of processes.

    Options that say nothing about the launcher get one that uses as many of the visible GPUs as can share a step.

    Raises `ThinkSwitchError` if the options start a number of processes that cannot.
    """
    if any(LAUNCH_OPTIONS.fullmatch(option_name(word)) for word in options):
        processes = world_size(options)
        if processes > 1 and config.get("kd_trainer"):
            raise ThinkSwitchError(
                f"`thinkswitch.axolotl_args` starts {processes} processes, but axolotl's KD trainer, which `thinkswitch.loss: "
                "distribution` uses, works with one; remove these options."
            )
        if processes > 1 and _launcher(options) == "accelerate" and not visible_gpus():
            raise ThinkSwitchError(
                f"`thinkswitch.axolotl_args` starts {processes} processes through accelerate, which needs GPUs; use "
                f"[--launcher, torchrun, --, --nproc_per_node, {processes}] on this machine."
            )
        if (found := shared(config, processes)) is None:
            rows = rows_of_a_step(config)
            raise ThinkSwitchError(
                f"`thinkswitch.axolotl_args` starts {processes} processes, but a step learns from {rows} rows ({BATCH} × "
                f"{ACCUMULATION}), which they cannot share equally; use a number of processes that divides {rows}, or "
                "change one of these keys."
            )
        return found, list(options), processes
    processes = usable_gpus(config)
    if visible_gpus() < 2:
        return config, list(options), 1
    own = [*options, "--"].index("--")
    launcher = ["--launcher", "torchrun", "--", "--nproc_per_node", str(processes)]
    return shared(config, processes) or config, [*options[:own], *launcher, *options[own + 1 :]], processes
