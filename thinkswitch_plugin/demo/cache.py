"""Make the tiny pair once and keep it: `.cache/arithmetic/seed-0/{instruct,thinking,base,prompts.jsonl}`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, files
from thinkswitch_plugin.demo import task
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.hashes import read_stamp
from thinkswitch_plugin.run import locked

PROMPTS = 2048  # enough for four iterations of 512 fresh ones


def ensure_pair(seed: int, instruct: Path, thinking: Path) -> None:
    """Train the pair into the folder that holds both, unless it is there with these settings."""
    from thinkswitch_plugin.demo.pair import PairSettings

    folder = instruct.parent
    wanted = {"seed": seed, "prompts": PROMPTS, "held_out": task.HELD_OUT_SIZE, **asdict(PairSettings())}
    with locked(folder.with_name(f".{folder.name}"), patience=3600):  # runs in other folders share the pair
        _make_pair(folder, wanted, thinking)


def _make_pair(folder: Path, wanted: dict[str, Any], thinking: Path) -> None:
    from thinkswitch_plugin.demo.pair import train_pair

    seed = wanted["seed"]
    made = folder / "settings.json"
    if read_stamp(made) == wanted and thinking.is_dir():
        console.say(f"  the pair in {folder} is used again")
        return
    if folder.exists() and any(folder.iterdir()) and not made.is_file():
        raise ThinkSwitchError(
            f"{folder} holds something that the embedded domain did not make; give the pair a folder of its own, "
            "or remove `embedded: true` from the recipe to use the checkpoints that lie there."
        )
    console.say(f"  training the tiny pair into {folder}, a few minutes on two cores; it is kept for later runs")
    prompts = task.training_prompts(seed, PROMPTS)
    with files.atomic_folder(folder) as building:
        train_pair(building, seed, exclude={*task.held_out(), *prompts})
        with files.atomic_file(building / "prompts.jsonl") as handle:
            for number, question in enumerate(prompts):
                handle.write(files.dumps_line({"id": f"p{number:05d}", "prompt": question}))
        files.write_json(building / "settings.json", wanted)
