"""Make what the demo domains need once and keep it.

.cache/arithmetic/seed-0/{instruct,thinking,base,prompts.jsonl}
.cache/arithmetic-mixed/seed-0/{requests.jsonl,generations.jsonl,prompts.jsonl}
.cache/words/seed-0/{instruct,thinking,base,prompts.jsonl}
.cache/smollm2/
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import ThinkSwitchKeys, resolve_seed
from thinkswitch_plugin.demo import mixed, task
from thinkswitch_plugin.errors import ThinkSwitchError, reason
from thinkswitch_plugin.run import locked
from thinkswitch_plugin.run.stamp import folder_once, stored

SETTINGS = "settings.json"  # its stamp, in the folder
PROMPTS = 2048  # enough for four iterations of 512 fresh ones
WORDS_PROMPTS = 1536  # enough for four iterations of 384


def ensure_pair(seed: int, instruct: Path, thinking: Path) -> None:
    """Train the pair into the folder that holds both, unless it is there with these settings."""
    from thinkswitch_plugin.demo.pair import PairSettings, train_pair

    def make(building: Path) -> None:
        prompts = task.training_prompts(seed, PROMPTS)
        train_pair(building, seed, exclude={*task.held_out(), *prompts})
        _write_prompts(building, ({"prompt": question} for question in prompts))

    wanted = {"seed": seed, "prompts": PROMPTS, "held_out": task.HELD_OUT_SIZE, **asdict(PairSettings())}
    _ensure(instruct.parent, wanted, thinking, "tiny pair", make)


def ensure_words(keys: ThinkSwitchKeys, seed: int) -> None:
    """Make the pair of the domain `words` and its prompts, unless they are there with these settings.

    Raises `ThinkSwitchError` if the folder holds something else, or the weights cannot be had.
    """
    from thinkswitch_plugin.demo import smollm2, words
    from thinkswitch_plugin.demo.words_pair import WordsSettings, train_pair

    folder = Path(resolve_seed(keys.pair.instruct, seed)).parent

    def make(building: Path) -> None:
        held_out = {question.prompt for question in words.held_out() + words.one_step()}
        prompts = words.questions(f"prompts-{seed}", WORDS_PROMPTS, exclude=held_out)
        model, tokenizer = smollm2.load(smollm2.fetch(folder.parent.parent / "smollm2"))
        train_pair(building, seed, model, tokenizer, exclude=held_out | {prompt.prompt for prompt in prompts})
        _write_prompts(building, ({"prompt": prompt.prompt, "answer": prompt.answer} for prompt in prompts))

    held = {"held_out": words.HELD_OUT_SIZE, "one_step": words.ONE_STEP_SIZE}
    wanted = {"seed": seed, "prompts": WORDS_PROMPTS, **held, **asdict(WordsSettings())}
    _ensure(folder, wanted, folder / "thinking", "pair of SmolLM2-135M siblings", make)


def ensure_hybrid(keys: ThinkSwitchKeys, seed: int) -> None:
    """Train the hybrid from the base of the tiny pair, which is made too, unless it is there with these settings.

    Raises `ThinkSwitchError` if a folder holds something else.
    """
    from thinkswitch_plugin.demo.pair import HYBRID_STEPS, PairSettings, train_hybrid

    folder, base = (Path(resolve_seed(str(name), seed)) for name in (keys.pair.instruct, keys.pair.base))

    def make(building: Path) -> None:
        train_hybrid(building, seed, base, exclude={*task.held_out(), *task.training_prompts(seed, PROMPTS)})

    ensure_pair(seed, base.with_name("instruct"), base.with_name("thinking"))
    wanted = {"seed": seed, "steps": HYBRID_STEPS, **asdict(PairSettings())}
    _ensure(folder, wanted, folder / "config.json", "tiny hybrid", make)


def ensure(keys: ThinkSwitchKeys, seed: int) -> None:
    """Make what a demo recipe names: its pair, and training files where `adaptive.generations` names them.

    What is there with these settings is kept. If `demo` names a function, that is called with `keys` and `seed`
    instead. Raises `ThinkSwitchError` if a folder holds something else, or there is no such function.
    """
    if isinstance(keys.pair.demo, str):
        try:
            maker = pkgutil.resolve_name(keys.pair.demo)
        except (ValueError, ImportError, AttributeError) as error:
            raise ThinkSwitchError(
                f"`thinkswitch.pair.demo` names {keys.pair.demo}, which cannot be imported ({reason(error)}); "
                "write `package.module:function`."
            ) from None
        maker(keys, seed)
        return
    ensure_pair(seed, *(Path(resolve_seed(name, seed)) for name in (keys.pair.instruct, keys.pair.thinking)))
    if keys.adaptive.generations:
        generations = Path(resolve_seed(keys.adaptive.generations, seed))
        wanted = {"seed": seed, **mixed.settings()}

        def make(building: Path) -> None:
            mixed.write_training_files(building, seed)

        _ensure(generations.parent, wanted, generations, "training files", make)


def _write_prompts(folder: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write `prompts.jsonl`, each row with an id of its own."""
    files.write_jsonl(folder / "prompts.jsonl", ({"id": f"p{n:05d}", **row} for n, row in enumerate(rows)))


def _ensure(folder: Path, wanted: dict[str, Any], witness: Path, what: str, make: Callable[[Path], None]) -> None:
    """Have `make` fill the folder, unless it was filled with these settings and `witness` is there."""
    with locked(folder.with_name(f".{folder.name}"), patience=3600):  # runs in other folders share it
        if stored(folder / SETTINGS, wanted, (witness,)) is not None:
            console.say(f"  {folder} is used again")
            return
        if folder.exists() and any(folder.iterdir()) and not (folder / SETTINGS).is_file():
            raise ThinkSwitchError(
                f"{folder} contains files that the demo domain did not create; move them away, or set another "
                f"folder for the {what} in the recipe (without `demo: true`, the checkpoints in that folder are used)."
            )
        console.say(f"  making the {what} in {folder}, once; later runs use it again")
        folder_once(folder, SETTINGS, wanted, make, (witness,))
