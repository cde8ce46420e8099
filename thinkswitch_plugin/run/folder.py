"""A run folder: what it was begun with, where its files lie, and the lock that keeps a second command out."""

from __future__ import annotations

import fcntl
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field, ValidationError

from thinkswitch_plugin import files, places
from thinkswitch_plugin.engine_args import MODES as MODES
from thinkswitch_plugin.engine_args import identity
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run import processes
from thinkswitch_plugin.run.checkpoint import Subject, require_weights
from thinkswitch_plugin.run.hashes import read_stamp

if TYPE_CHECKING:
    from thinkswitch_plugin.recipe import Recipe

# What is evaluated of an iteration, by the name of its folder: a checkpoint, and the mode in which it is asked.
OWN_MODE = {mode: (mode, mode) for mode in MODES}
OTHER_MODE = {"instruct-as-thinking": MODES, "thinking-as-instruct": MODES[::-1]}  # of a hybrid
EVALUATED = OWN_MODE | OTHER_MODE
MOST_ITERATIONS = 20  # as many rules the Makefile has
LOCK_PATIENCE = 5.0  # seconds; a command that was just killed takes a moment to let go


@dataclass(frozen=True)
class Given:
    """What a command is told besides what the run was begun with, as text; `run.json` does not hold it.

    Args:
        keep: KEEP=, which iterations keep their weights; see `prune`.
        price: PRICE_PER_HOUR=, for the report.
        data: THINKSWITCH_DATA, a folder that the evaluation sets are read from.
    """

    keep: str = ""
    price: str = ""
    data: str = ""


NOTHING_MORE = Given()


@dataclass(frozen=True)
class Run:
    """One run folder with the settings it was begun with, and what this command was told besides."""

    folder: Path
    recipe: Recipe
    seed: int
    engine: str
    iterations: int
    given: Given = NOTHING_MORE

    @cached_property
    def task(self) -> tuple[Path, ...]:
        """The files that the evaluation tasks are made of."""
        from thinkswitch_plugin.data.task_files import task_files

        every = (task_files(name, data=self.given.data) for name in self.recipe.keys.evaluation.tasks)
        return tuple(dict.fromkeys(path for found in every for path in found))

    @property
    def answering(self) -> list[str]:
        """The engine (not its address), and the options that affect what it answers."""
        return [identity(self.engine), *self.recipe.keys.engine.answering_options()]

    def iteration(self, k: int) -> Path:
        """The folder of iteration k."""
        return self.folder / f"iter-{k}"

    def generations(self, k: int) -> Path:
        """The stored answers of iteration k: one file, or a folder of files if there are many; see `engines/stored.py`."""
        keys = self.recipe.keys
        many = keys.prompts.count * keys.sampling.samples > keys.engine.rows_per_file
        return self.iteration(k) / ("generations" if many else "generations.jsonl")

    def checkpoint(self, mode: str, k: int) -> str:
        """The checkpoint of a mode after iteration k; k = 0 is the starting pair."""
        if k > 0:
            return str(self.iteration(k) / mode)
        pair_file = self.iteration(0) / "pair.json"
        if pair_file.is_file():
            try:
                return str(files.read_json(pair_file)[mode]["path"])
            except (KeyError, TypeError):
                raise ThinkSwitchError(
                    f"{pair_file} is damaged (`{mode}`); delete it and run `make iterate`: what is done stays done."
                ) from None
        from thinkswitch_plugin.args import resolve_seed

        return resolve_seed(getattr(self.recipe.keys.pair, mode), self.seed)

    def made(self, mode: str, k: int) -> Path:
        """The folder of a checkpoint after iteration k. Raises `ThinkSwitchError` if it is not there, or without weights."""
        folder = Path(self.checkpoint(mode, k))
        if not (folder / "config.json").is_file():
            raise ThinkSwitchError(
                f"{self.folder} has no {mode} checkpoint of iteration {k}; `make status` shows what is done, and "
                "`make iterate` makes what is left."
            )
        require_weights(folder)
        return folder

    def evaluated(self, k: int) -> dict[str, tuple[str, str]]:
        """The part of `EVALUATED` that iteration k has; the starting checkpoint of a hybrid is one, in two modes."""
        return EVALUATED if self.recipe.keys.pair.hybrid and k else OWN_MODE

    def subjects(self, mode: str, k: int) -> dict[str, Subject]:
        """What is evaluated of a checkpoint after iteration k, by the names of `EVALUATED`."""
        keys, checkpoint = self.recipe.keys, self.checkpoint(mode, k)
        asked = {name: asked for name, (of, asked) in self.evaluated(k).items() if of == mode}
        guards = keys.evaluation.guard
        return {name: Subject(checkpoint, keys.pair.arguments(how), guards=guards) for name, how in asked.items()}

    def anchor(self, k: int) -> str:
        """The thinking checkpoint that iteration k interpolates with."""
        previous = self.recipe.keys.rebuild.anchor == "previous"
        return self.checkpoint("thinking", k - 1 if previous else 0)


def of_run(folder: Path, name: str, mode: str, iteration: int | None) -> str:
    """A checkpoint that a user names in place of a run's own: `instruct`, `thinking`, or one of an iteration (`instruct-0`).

    Args:
        folder: of the run.
        mode: whose place it takes; the run's own checkpoint of it is given back as "".
        iteration: whose checkpoints are meant if the name has no number; None for the last one's.

    Raises `ThinkSwitchError` if the run has no such checkpoint. Any other name, a folder's among them, stays as it is.
    """
    match = re.fullmatch(r"(instruct|thinking)(?:-(\d+))?", name)
    if match is None or Path(name).is_dir():
        return name
    if not settings_file(folder).is_file():
        raise ThinkSwitchError(
            f"{name} means a checkpoint of the run {folder}, which is not there; run `make iterate DOMAIN={folder.name}` "
            "first, or name a checkpoint's folder or hub id."
        )
    if name == mode:
        return ""
    run = open_run(folder)
    k = int(match[2]) if match[2] else run.iterations if iteration is None else iteration
    return str(run.made(match[1], k))


def settings_file(folder: Path) -> Path:
    """Where a run keeps what it was begun with."""
    return folder / "run.json"


def open_run(folder: Path, given: Given = NOTHING_MORE) -> Run:
    """The run that lies in a folder. Raises `ThinkSwitchError` if there is none."""
    from thinkswitch_plugin.recipe import load_recipe

    path = settings_file(folder)
    if not path.is_file():
        raise ThinkSwitchError(f"{folder} is not a run folder (no run.json); begin one with `make iterate DOMAIN=…`.")
    begun = read_settings(path)
    recipe = load_recipe(places.opened(begun.recipe), tuple(map(places.opened, begun.overlays)))
    return Run(folder, recipe, begun.seed, begun.engine, begun.iterations, given)


def run_around(path: Path) -> Run | None:
    """The run that a folder lies in, None if it lies in none."""
    return next((open_run(folder) for folder in path.resolve().parents if settings_file(folder).is_file()), None)


class Settings(BaseModel, strict=True):
    """What a run was begun with: `run.json`."""

    domain: str
    recipe: str
    overlays: list[str]
    seed: int
    engine: str
    iterations: int = Field(ge=1, le=MOST_ITERATIONS)


def read_settings(path: Path) -> Settings:
    """What a run was begun with. Raises `ThinkSwitchError` if its file is damaged."""
    try:
        return Settings.model_validate(read_stamp(path) or {})
    except ValidationError as error:
        raise ThinkSwitchError(
            f"{path} is damaged (`{error.errors()[0]['loc'][0]}`); delete it and run `make iterate` with the DOMAIN, "
            "SEED, ENGINE and OVERLAY of this run: what is done stays done."
        ) from None


@contextmanager
def locked(folder: Path, patience: float = LOCK_PATIENCE) -> Iterator[None]:
    """Keep a second command out of a folder; the kernel frees the lock when its owner and its engines have gone.

    A command that holds the lock may take it again.

    Raises `ThinkSwitchError` if another command still holds it after `patience` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = folder.resolve()
    if held in processes.HELD_LOCKS:
        yield
        return
    with (folder / ".lock").open("a") as handle:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ThinkSwitchError(
                        f"Another command is at work in {folder}; wait for it, or give this one its own RUNS=."
                    ) from None
                time.sleep(0.1)
        processes.HELD_LOCKS[held] = handle.fileno()
        try:
            yield
        finally:
            del processes.HELD_LOCKS[held]
