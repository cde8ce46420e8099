"""`thinkswitch serve`: print the vLLM command that serves both modes, or one checkpoint, and become it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import ThinkSwitchKeys
from thinkswitch_plugin.engines.generate import room_for
from thinkswitch_plugin.engines.servers import VLLM_ENVIRONMENT, free_port, lora_arguments, vllm_command
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.export.template import SWITCH
from thinkswitch_plugin.recipe import Recipe, load_recipe, overlay_path, recipe_of
from thinkswitch_plugin.run import MODES, checkpoint, run_around


def serve(export: Path, model: str, rank: int | None, keys: ThinkSwitchKeys, port: int, extra: Sequence[str]) -> None:
    """Serve an export's two modes under the names `instruct` and `thinking`, or one checkpoint; does not return.

    Args:
        export: the folder that `export-loras` wrote.
        model: a checkpoint to serve instead, under its own name.
        rank: which of the exported ranks; None is the one that the export found to be enough.
        extra: further options of vLLM; the last of two counts.

    Raises:
        ThinkSwitchError: no export, no vLLM, a file is missing, or the port is taken.
    """
    if model:
        folder, options = str(checkpoint.resolve(model, None, "served")[0]), ["--served-model-name", model]
    else:
        folder, options = both_modes(export, rank)
    room = room_for(folder, keys.longest_answer)
    command = [*vllm_command(folder, free_port(port), keys.engine, room), *options, *extra]
    console.say(f"$ {shlex.join(command)}")
    os.execve(command[0], command, {**os.environ, **VLLM_ENVIRONMENT})


def recipe_to_serve(model: str, domain: str, overlays: Sequence[str]) -> Recipe:
    """The recipe whose limits and options a server gets: of the run that a checkpoint lies in, else of the domain."""
    run = run_around(Path(model)) if model and Path(model).is_dir() else None
    if run is None:
        return recipe_of(domain, overlays)
    return load_recipe(run.recipe.path, tuple(map(overlay_path, overlays)) or run.recipe.overlays)


def both_modes(export: Path, rank: int | None) -> tuple[str, list[str]]:
    """The base of an export, and vLLM's options that serve both modes on it.

    A mode whose checkpoint is the base itself is served as the base.
    Raises `ThinkSwitchError` if there is no such export, or a part of it has gone.
    """
    path = export / "export.json"
    if not path.is_file():
        raise ThinkSwitchError(
            f"{export} contains no export; run `make export-loras` first, or select a checkpoint with MODEL=."
        )
    found = files.read_json(path)
    chosen = next((row for row in found["ranks"] if row["rank"] == (rank or found["rank"])), None)
    if chosen is None:
        has = ", ".join(str(row["rank"]) for row in found["ranks"])
        raise ThinkSwitchError(f"{path} has no rank {rank}; it has {has}. Run `make export-loras RANK={rank}`.")
    base = Path(found["base"]["path"])
    adapters = {mode: Path(chosen[mode]["path"]) for mode in MODES if mode in chosen}
    template = export / "chat_template.jinja"
    for needed in (base / "config.json", template, *(folder / "adapter_config.json" for folder in adapters.values())):
        if not needed.is_file():
            raise ThinkSwitchError(f"{needed} is missing; run `make export-loras` again.")
    checkpoint.require_weights(base)
    itself = [mode for mode in MODES if mode not in adapters]
    return str(base), [
        *("--served-model-name", itself[0] if itself else "base"),
        *lora_arguments(adapters),
        *("--chat-template", str(template)),
        # Said here too, since vLLM's reasoning parsers take a request without the switch for a thinking one.
        *("--default-chat-template-kwargs", f'{{"{SWITCH}": false}}'),
    ]
