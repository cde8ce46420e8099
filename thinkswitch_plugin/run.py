"""A run folder: its settings, its stages, and the stamps that say which stages are done.

Make knows the order of the stages; a stamp knows whether a stage is still true. One
stamp a stage holds the hashes of what the stage read and the settings it depends on,
so touching a file reruns nothing and changing it reruns what depends on it:

    runs/arithmetic/iter-1/.stamps/pairs.json
    {"stage": "pairs", "values": {"selection": "first", …}, "inputs": {"…/generations.jsonl": "9f8e…"},
     "seconds": 0.2, "command": "thinkswitch pairs runs/arithmetic 1", "versions": {…}}
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import resolve_seed
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.recipe import Recipe, load_recipe
from thinkswitch_plugin.sources import DATA_VARIABLE

MODES = ("instruct", "thinking")
TASKS = Path("lm_eval_tasks")
TEMPLATE_FILES = ("tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Run:
    """One run folder with the settings it was begun with."""

    folder: Path
    recipe: Recipe
    seed: int
    engine: str
    iterations: int

    def iteration(self, k: int) -> Path:
        """The folder of iteration k."""
        return self.folder / f"iter-{k}"

    def checkpoint(self, mode: str, k: int) -> str:
        """The checkpoint of a mode after iteration k; k = 0 is the starting pair."""
        if k > 0:
            return str(self.iteration(k) / mode)
        pair_file = self.iteration(0) / "pair.json"
        if pair_file.is_file():
            return str(files.read_json(pair_file)[mode]["path"])
        return resolve_seed(getattr(self.recipe.keys.pair, mode), self.seed)

    def anchor(self, k: int) -> str:
        """The thinking checkpoint that iteration k interpolates with."""
        previous = self.recipe.keys.rebuild.anchor == "previous"
        return self.checkpoint("thinking", k - 1 if previous else 0)


def settings_file(folder: Path) -> Path:
    """Where a run keeps what it was begun with."""
    return folder / "run.json"


def open_run(folder: Path) -> Run:
    """The run that lies in a folder. Raises `ThinkSwitchError` if there is none."""
    path = settings_file(folder)
    if not path.is_file():
        raise ThinkSwitchError(f"{folder} is not a run folder (no run.json); begin one with `make iterate DOMAIN=…`.")
    values = files.read_json(path)
    recipe = load_recipe(Path(values["recipe"]), tuple(Path(p) for p in values["overlays"]))
    return Run(folder, recipe, values["seed"], values["engine"], values["iterations"])


@dataclass(frozen=True)
class Stage:
    """What one stage reads, depends on and writes.

    `resumable` outputs survive a failed attempt whose inputs were the same.
    """

    name: str
    iteration: int
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    values: dict[str, Any] = field(default_factory=dict)
    resumable: bool = False
    needs: tuple[Path, ...] = ()  # must be there for the stage to count as done, but are not its outputs


def stages(run: Run) -> Iterator[Stage]:
    """Every stage of a run in order. The Makefile holds the same order as rules."""
    keys = run.recipe.keys
    evaluation = keys.evaluation.model_dump()
    task_file = tuple(p for p in (TASKS / f"{keys.evaluation.task}.yaml",) if p.is_file())

    def evaluate(mode: str, k: int) -> Stage:
        return Stage(
            f"eval-{mode}",
            k,
            (Path(run.checkpoint(mode, k)), *task_file),
            (run.iteration(k) / "eval" / mode,),
            {
                "evaluation": evaluation,
                "backend": [run.engine, *keys.engine.vllm_args] if evaluation["backend"] != "hf" else "hf",
                "data": os.environ.get(DATA_VARIABLE, ""),
            },
        )

    zero = run.iteration(0)
    yield Stage(
        "pair",
        0,
        (),
        (zero / "pair.json",),
        {"pair": keys.pair.model_dump(exclude={"base"}), "seed": run.seed},
        needs=tuple(Path(run.checkpoint(mode, 0)) for mode in MODES),
    )
    yield from (evaluate(mode, 0) for mode in MODES)
    for k in range(1, run.iterations + 1):
        here = run.iteration(k)
        teacher = Path(run.checkpoint("thinking", k - 1))
        learner = Path(run.checkpoint("instruct", k - 1))
        prompts = (Path(resolve_seed(keys.prompts.path, run.seed)),) if keys.prompts.path else ()
        requests, generations, pairs = (here / f"{n}.jsonl" for n in ("requests", "generations", "pairs"))
        yield Stage(
            "requests",
            k,
            (*prompts, *(p for p in (teacher / n for n in TEMPLATE_FILES) if p.is_file()), *task_file),
            (requests,),
            {
                "prompts": keys.prompts.model_dump(),
                "sampling": keys.sampling.model_dump(),
                "seed": run.seed,
                "contamination": [evaluation[n] for n in ("task", "contamination_ngram", "contamination_share")],
                "data": os.environ.get(DATA_VARIABLE, ""),
            },
        )
        yield Stage(
            "generate",
            k,
            (requests, teacher),
            (generations,),
            {
                "engine": run.engine,
                "unfinished": keys.labels.unfinished,
                "retry_max_tokens": keys.labels.retry_max_tokens,
            },
            resumable=True,
        )
        yield Stage(
            "pairs",
            k,
            (requests, generations),
            (pairs, pairs.with_suffix(".json")),
            {"selection": keys.labels.selection, "answer": keys.labels.answer},
        )
        yield Stage(
            "train",
            k,
            (pairs, learner),
            (here / "adapter",),
            {"axolotl": run.recipe.axolotl, "seed": run.seed, "min_change": keys.min_adapter_change},
        )
        yield Stage("merge-lora", k, (here / "adapter", learner), (here / "instruct",))
        yield Stage(
            "rebuild",
            k,
            (
                here / "instruct",
                Path(run.anchor(k)),
                Path(keys.rebuild.config),
                requests,
                run.iteration(1) / "generations.jsonl",
            ),
            (here / "thinking", here / "rebuild.json"),
            {"rebuild": keys.rebuild.model_dump()},
        )
        yield from (evaluate(mode, k) for mode in MODES)
    yield Stage(
        "report",
        run.iterations,
        (
            *(run.iteration(k) / "eval" / mode for k in range(run.iterations + 1) for mode in MODES),
            *(run.iteration(k) / n for k in range(1, run.iterations + 1) for n in ("pairs.json", "rebuild.json")),
        ),
        (run.folder / "report.json", run.folder / "report.md"),
        {
            "iterations": run.iterations,
            "price": os.environ.get("PRICE_PER_HOUR", ""),
            "answer": keys.labels.answer,
        },
    )


def stamp_path(run: Run, stage: Stage) -> Path:
    """The stamp of a stage, which is also its target in the Makefile."""
    folder = run.folder if stage.name == "report" else run.iteration(stage.iteration)
    return folder / ".stamps" / f"{stage.name}.json"


class Hashes:
    """sha256 of files and folders, remembered by size and time so that nothing is read twice."""

    def __init__(self, memory: Path) -> None:
        self.memory = memory
        self.known: dict[str, list[Any]] = files.read_json(memory) if memory.is_file() else {}
        self.changed = False

    def of(self, path: Path) -> str | None:
        """The hash of a file, or of all files of a folder; None if it is not there."""
        if path.is_dir():
            digest = hashlib.sha256()
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                digest.update(f"{file.relative_to(path)}\0{self._file(file)}\0".encode())
            return digest.hexdigest()
        return self._file(path) if path.is_file() else None

    def _file(self, path: Path) -> str:
        status = path.stat()
        key, mark = str(path), [status.st_size, status.st_mtime_ns]
        found = self.known.get(key)
        if found is None or found[:2] != mark:
            with path.open("rb") as handle:
                found = [*mark, hashlib.file_digest(handle, "sha256").hexdigest()]
            self.known[key] = found
            self.changed = True
        return str(found[2])

    def save(self) -> None:
        """Write the memory back if anything was read."""
        if self.changed:
            files.write_json(self.memory, self.known)
            self.changed = False


def fingerprint(stage: Stage, hashes: Hashes) -> dict[str, Any]:
    """What a stage depends on, as its stamp records it."""
    return {"values": stage.values, "inputs": {str(p): hashes.of(p) for p in stage.inputs}}


def is_done(run: Run, stage: Stage, hashes: Hashes) -> bool:
    """Whether a stage's outputs are there and its stamp still matches what it read."""
    path = stamp_path(run, stage)
    if not path.is_file() or not all(needed.exists() for needed in (*stage.outputs, *stage.needs)):
        return False
    stamp = files.read_json(path)
    return {k: stamp.get(k) for k in ("values", "inputs")} == fingerprint(stage, hashes)


def same_questions(begun: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether stored answers still count: the same requests to the same checkpoint by the same engine."""
    return begun["inputs"] == now["inputs"] and begun["values"].get("engine") == now["values"].get("engine")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second command out of a run folder; the kernel frees the lock when its owner dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ThinkSwitchError(
                f"Another command is at work in {folder}; wait for it, or give this one its own RUNS=."
            ) from None
        yield


def find_stage(run: Run, name: str, iteration: int) -> Stage:
    """The stage of that name. Raises `ThinkSwitchError` if the run has none."""
    for stage in stages(run):
        if stage.name == name and stage.iteration == iteration:
            return stage
    raise ThinkSwitchError(
        f"{run.folder} has no stage {name} in iteration {iteration} (it has {run.iterations} iterations)."
    )


def execute(run: Run, name: str, iteration: int, work: Callable[[], dict[str, Any] | None]) -> None:
    """Do a stage unless its stamp shows that nothing it depends on has changed.

    Args:
        work: writes the stage's outputs, each whole or not at all; what it returns
            is kept in the stamp under ``notes``.
    """
    stage = find_stage(run, name, iteration)
    with locked(run.folder):
        hashes = Hashes(run.folder / ".stamps" / "hashes.json")
        stamp = stamp_path(run, stage)
        where = "" if name == "report" else f" of iteration {iteration}"
        if is_done(run, stage, hashes):
            os.utime(stamp)  # newer than what it depends on, for Make
            console.say(f"[{name}{where}] unchanged")
            return
        console.say(f"[{name}{where}]")
        before = fingerprint(stage, hashes)
        begun = stamp.with_suffix(".begun")
        if not (stage.resumable and begun.is_file() and same_questions(files.read_json(begun), before)):
            for output in stage.outputs:
                files.remove(output)
        stamp.unlink(missing_ok=True)
        files.write_json(begun, before)
        started = time.monotonic()
        notes = work() or {}
        seconds = round(time.monotonic() - started, 2)
        files.write_json(
            stamp,
            {
                "stage": name,
                "iteration": iteration,
                **before,
                "notes": notes,
                "seconds": seconds,
                "seed": run.seed,
                "command": " ".join(["thinkswitch", *sys.argv[1:]]),
                "versions": versions(),
            },
        )
        begun.unlink()
        for output in stage.outputs:
            hashes.of(output)
        hashes.save()
        console.say(f"[{name}{where}] done in {seconds:.1f} s")


def forget_stale(run: Run) -> tuple[int, list[Stage]]:
    """Remove the stamps that no longer hold, so that Make redoes those stages.

    Returns how many stages there are, and those left to do.
    """
    hashes = Hashes(run.folder / ".stamps" / "hashes.json")
    every = list(stages(run))
    waiting = [stage for stage in every if not is_done(run, stage, hashes)]
    for stage in waiting:
        stamp_path(run, stage).unlink(missing_ok=True)
    if run.folder.is_dir():
        hashes.save()
    return len(every), waiting


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the engines that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("thinkswitch", "torch", "axolotl", "transformers", "peft", "bitsandbytes", "mergekit", "lm_eval"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
