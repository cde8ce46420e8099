"""A run folder: its settings, its stages, and the stamps that say which stages are done.

Make knows the order of the stages; a stamp knows whether a stage is still true. One
stamp a stage holds the hashes of what the stage read and the settings it depends on,
so touching a file reruns nothing and changing it reruns what depends on it:

    runs/arithmetic/iter-1/.stamps/pairs.json
    {"stage": "pairs", "values": {"selection": "first", …}, "inputs": {"…/generations.jsonl": "9f8e…"},
     "outputs": {"…/pairs.jsonl": "41c0…", …}, "seconds": 0.2, "seed": 0,
     "command": "thinkswitch pairs runs/arithmetic 1", "versions": {…}}

A stamp is written last, so a stage that was killed has none. `generate.begun` beside it says what
the attempt read: what that left may be gone on with only if the stage reads the same again.
"""

from __future__ import annotations

import fcntl
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, files, progress, timing
from thinkswitch_plugin.args import option_name, resolve_seed
from thinkswitch_plugin.distil import iteration_config
from thinkswitch_plugin.engines import has_cuda
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.hashes import Hashes, read_stamp
from thinkswitch_plugin.pictures import KINDS, OF_REPORT
from thinkswitch_plugin.recipe import Recipe, load_recipe
from thinkswitch_plugin.sources import DATA_VARIABLE
from thinkswitch_plugin.task_files import task_files

MODES = ("instruct", "thinking")
TEMPLATE_FILES = ("tokenizer_config.json", "chat_template.jinja")
REPORT_FILES = (
    *("report.json", "report.md", "report.html"),
    *(f"{name}.{kind}" for name in OF_REPORT for kind in KINDS),
)
MOST_ITERATIONS = 20  # as many rules the Makefile has
LOCK_PATIENCE = 5.0  # seconds; a command that was just killed takes a moment to let go
# Options of vLLM that say how fast it answers, not what.
MACHINE_OPTIONS = (
    "--gpu-memory-utilization",
    "--kv-cache-memory-bytes",
    "--tensor-parallel-size",
    "-tp",
    "--pipeline-parallel-size",
    "-pp",
    "--data-parallel-size",
    "-dp",
    "--max-num-seqs",
    "--max-num-batched-tokens",
    "--swap-space",
    "--cpu-offload-gb",
    "--enforce-eager",
)


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
            try:
                return str(files.read_json(pair_file)[mode]["path"])
            except (KeyError, TypeError):
                raise ThinkSwitchError(
                    f"{pair_file} is damaged (`{mode}`); delete it and run `make iterate`: what is done stays done."
                ) from None
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
    values = read_settings(path)
    recipe = load_recipe(Path(values["recipe"]), tuple(Path(p) for p in values["overlays"]))
    return Run(folder, recipe, values["seed"], values["engine"], values["iterations"])


def read_settings(path: Path) -> dict[str, Any]:
    """What a run was begun with. Raises `ThinkSwitchError` if its file is damaged."""
    shape = {"domain": str, "recipe": str, "overlays": list, "seed": int, "engine": str, "iterations": int}
    values = read_stamp(path) or {}
    for key, kind in shape.items():
        if type(values.get(key)) is not kind or (key == "iterations" and not 1 <= values[key] <= MOST_ITERATIONS):
            raise ThinkSwitchError(
                f"{path} is damaged (`{key}`); delete it and run `make iterate` with the DOMAIN, SEED, ENGINE and "
                "OVERLAY of this run: what is done stays done."
            )
    return values


@dataclass(frozen=True)
class Stage:
    """What one stage reads, depends on and writes.

    Args:
        resume_on: what a failed attempt left may be gone on with if the inputs and these values
            are the same; None: the stage starts anew.
        needs: must be there for the stage to count as done, but are not its outputs.
        scratch: what an attempt leaves beside its outputs to go on with.
        writes_like: a checkpoint about as large as what the stage writes.
    """

    name: str
    iteration: int
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    values: dict[str, Any] = field(default_factory=dict)
    resume_on: tuple[str, ...] | None = None
    needs: tuple[Path, ...] = ()
    scratch: tuple[Path, ...] = ()
    writes_like: Path | None = None


def stages(run: Run) -> Iterator[Stage]:
    """Every stage of a run in order. The Makefile holds the same order as rules."""
    keys = run.recipe.keys
    evaluation = keys.evaluation.model_dump()
    judged_by = {key: v for key, v in evaluation.items() if not key.startswith("contamination")}
    task = task_files(keys.evaluation.task)
    answering = [run.engine, *answering_options(keys.engine.vllm_args)]
    server = keys.engine.server.changing_answers() if run.engine.startswith("http") else {}

    def evaluate(mode: str, k: int) -> Stage:
        return Stage(
            f"eval-{mode}",
            k,
            (Path(run.checkpoint(mode, k)), *task),
            (run.iteration(k) / "eval" / mode,),
            {
                "evaluation": judged_by,
                "backend": answering if evaluation["backend"] != "hf" else "hf",
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
            (*prompts, *(p for p in (teacher / n for n in TEMPLATE_FILES) if p.is_file()), *task),
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
                "engine": [*answering, server] if server else answering,
                "unfinished": keys.labels.unfinished,
                "retry_max_tokens": keys.labels.retry_max_tokens,
            },
            resume_on=("engine",),
        )
        yield Stage(
            "pairs",
            k,
            (requests, generations),
            (pairs, pairs.with_suffix(".json")),
            {"selection": keys.labels.selection, "answer": keys.labels.answer, "trace": keys.trace},
        )
        yield Stage(
            "train",
            k,
            (pairs, learner),
            (here / "adapter", here / "axolotl.yaml"),
            {
                "axolotl": {key: v for key, v in training_config(run, k).items() if key != "thinkswitch"},
                "axolotl_args": keys.axolotl_args,
                "min_change": keys.min_adapter_change,
            },
            resume_on=("axolotl", "axolotl_args"),
        )
        yield Stage(
            "merge-lora",
            k,
            (here / "adapter", here / "axolotl.yaml", learner),
            (here / "instruct",),
            writes_like=learner,
        )
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
            (here / "thinking", here / "rebuild.json", here / "merge.yaml"),
            {"rebuild": keys.rebuild.model_dump(), "engine": answering, "trace": keys.trace},
            resume_on=("rebuild", "engine"),
            scratch=tuple((here / "logs").glob("check-lambda-*.jsonl")),
            writes_like=Path(run.anchor(k)),
        )
        yield from (evaluate(mode, k) for mode in MODES)
    yield Stage(
        "report",
        run.iterations,
        (
            *(run.iteration(k) / "eval" / mode for k in range(run.iterations + 1) for mode in MODES),
            *(run.iteration(k) / n for k in range(1, run.iterations + 1) for n in ("pairs.json", "rebuild.json")),
            *sweep_files(run),
        ),
        tuple(run.folder / name for name in REPORT_FILES),
        {
            "iterations": run.iterations,
            "price": os.environ.get("PRICE_PER_HOUR", ""),
            "answer": keys.labels.answer,
        },
    )


def sweep_files(run: Run) -> list[Path]:
    """The sweeps of a run's iterations, which the report shows where there are any."""
    every = (run.iteration(k) / "sweep" / "sweep.json" for k in range(run.iterations + 1))
    return [path for path in every if path.is_file()]


def training_config(run: Run, k: int) -> dict[str, Any]:
    """axolotl's config of iteration k."""
    here = run.iteration(k)
    return iteration_config(
        run.recipe,
        base_model=run.checkpoint("instruct", k - 1),
        pairs=here / "pairs.jsonl",
        adapter=here / "adapter",
        prepared=here / "prepared",
        seed=run.seed,
        on_cpu=not has_cuda(),
    )


def answering_options(vllm_args: list[str]) -> list[str]:
    """vLLM's options without those that say only how it uses the machine."""
    kept: list[str] = []
    passing = False
    for word in vllm_args:
        if re.match(r"-+[A-Za-z]", word):  # not a value such as -1
            passing = option_name(word) in MACHINE_OPTIONS
        if not passing:
            kept.append(word)
    return kept


def stamp_path(run: Run, stage: Stage) -> Path:
    """The stamp of a stage, which is also its target in the Makefile."""
    folder = run.folder if stage.name == "report" else run.iteration(stage.iteration)
    return folder / ".stamps" / f"{stage.name}.json"


def fingerprint(stage: Stage, hashes: Hashes) -> dict[str, Any]:
    """What a stage depends on, as its stamp records it."""
    return {"values": stage.values, "inputs": {str(p): hashes.of(p) for p in stage.inputs}}


def is_done(run: Run, stage: Stage, hashes: Hashes) -> bool:
    """Whether a stage's outputs are there and its stamp still matches what it read."""
    stamp = read_stamp(stamp_path(run, stage))
    if stamp is None or not all(needed.exists() for needed in (*stage.outputs, *stage.needs)):
        return False
    return {k: stamp.get(k) for k in ("values", "inputs")} == fingerprint(stage, hashes)


def goes_on(run: Run, stage: Stage, hashes: Hashes) -> bool:
    """Whether what an unfinished attempt left still counts: it read the same and had the same settings."""
    begun = read_stamp(begun_path(run, stage))
    if stage.resume_on is None or begun is None:
        return False
    now = fingerprint(stage, hashes)
    before = begun.get("values")
    return (
        begun.get("inputs") == now["inputs"]
        and isinstance(before, dict)
        and all(before.get(key) == now["values"][key] for key in stage.resume_on)
    )


def begun_path(run: Run, stage: Stage) -> Path:
    """Where a stage says what it read before it writes anything."""
    return stamp_path(run, stage).with_suffix(".begun")


@contextmanager
def locked(folder: Path, patience: float = LOCK_PATIENCE) -> Iterator[None]:
    """Keep a second command out of a folder; the kernel frees the lock when its owner and its engines have gone.

    Raises `ThinkSwitchError` if another command still holds it after `patience` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
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
        console.HELD_LOCKS.add(handle.fileno())
        try:
            yield
        finally:
            console.HELD_LOCKS.discard(handle.fileno())


def find_stage(run: Run, name: str, iteration: int) -> Stage:
    """The stage of that name. Raises `ThinkSwitchError` if the run has none."""
    for stage in stages(run):
        if stage.name == name and stage.iteration == iteration:
            return stage
    raise ThinkSwitchError(
        f"{run.folder} has no stage {name} in iteration {iteration} (it has {run.iterations} iterations); "
        "`make status` lists them."
    )


def execute(
    run: Run,
    name: str,
    iteration: int,
    work: Callable[[], dict[str, Any] | None],
    after: Callable[[Run, Hashes], object] | None = None,
) -> None:
    """Do a stage unless its stamp shows that nothing it depends on has changed.

    Args:
        work: writes the stage's outputs, each whole or not at all; what it returns
            is kept in the stamp under ``notes``.
        after: called when the stage is done, with the run folder still locked.

    Raises:
        ThinkSwitchError: another command is at work, an input was pruned, the disk is too
            full, or what `work` raises. What is whole is kept, and the same call goes on from it.
    """
    stage = find_stage(run, name, iteration)
    with locked(run.folder):
        hashes = Hashes(run.folder)
        title = name if name == "report" else f"{name} of iteration {iteration}"
        if is_done(run, stage, hashes):
            os.utime(stamp_path(run, stage))  # newer than what it depends on, for Make
            console.say(f"[{title}] unchanged")
            return
        every = list(stages(run))
        place = timing.place_of(stage, every, seconds_of(run, every), run.iterations)
        console.say(f"[{title}] {place.text(0)}")
        started = time.monotonic()
        at_work = progress.Work(
            work_path(run.folder),
            {"stage": name, "iteration": iteration},
            where=lambda: place.text(time.monotonic() - started),
        )
        with progress.working(at_work):
            seconds = _carry_out(run, stage, hashes, work, title)
        console.say(f"[{title}] done in {seconds:.1f} s")
        if after is not None:
            after(run, hashes)


def _carry_out(run: Run, stage: Stage, hashes: Hashes, work: Callable[[], dict[str, Any] | None], title: str) -> float:
    """Do a stage's work and write its stamp; return its seconds. The lock is held."""
    stamp, begun = stamp_path(run, stage), begun_path(run, stage)
    require_inputs(run, stage, hashes)
    before = fingerprint(stage, hashes)
    if not goes_on(run, stage, hashes):
        for output in stage.outputs:
            files.remove(output)
            files.remove(files.temporary_sibling(output))
        for path in stage.scratch:
            files.remove(path)
    stamp.unlink(missing_ok=True)
    if stage.writes_like is not None:
        files.require_space(run.folder, files.size(stage.writes_like), title)
    files.write_json(begun, before)
    started = time.monotonic()
    notes = work() or {}
    seconds = round(time.monotonic() - started, 2)
    for output in stage.outputs:
        if not output.exists():
            raise ThinkSwitchError(
                f"{title} ended without {output}; see {run.iteration(stage.iteration) / 'logs'}, "
                "and run `make iterate` again."
            )
        files.sync(output)
        hashes.forget_pruned(output)
    files.write_json(
        stamp,
        {
            "stage": stage.name,
            "iteration": stage.iteration,
            **before,
            "outputs": {file: found for output in stage.outputs for file, found in hashes.files(output).items()},
            "notes": notes,
            "seconds": seconds,
            "seed": run.seed,
            "command": " ".join(["thinkswitch", *sys.argv[1:]]),
            "versions": versions(),
        },
    )
    if stage.resume_on is None:  # else a lost stamp costs neither answers nor training
        begun.unlink()
    hashes.save()
    return seconds


def work_path(folder: Path) -> Path:
    """Where the stage at work in a run is recorded for `make status`."""
    return folder / ".stamps" / "at-work.json"


def seconds_of(run: Run, every: Iterable[Stage]) -> dict[tuple[str, int], float]:
    """Seconds of the stages that have a stamp, by name and iteration."""
    found = {}
    for stage in every:
        seconds = (read_stamp(stamp_path(run, stage)) or {}).get("seconds")
        if isinstance(seconds, int | float):
            found[stage.name, stage.iteration] = float(seconds)
    return found


def require_inputs(run: Run, stage: Stage, hashes: Hashes) -> None:
    """Refuse work on what is pruned, and a report of stages that do not fit together.

    Raises `ThinkSwitchError` saying what to do.
    """
    made_by = {output: other for other in stages(run) for output in other.outputs}
    for path in stage.inputs:
        if hashes.missing(path):
            maker = made_by[path]
            raise ThinkSwitchError(
                f"{stage.name} of iteration {stage.iteration} needs {path}, whose weights KEEP= has pruned; delete "
                f"{stamp_path(run, maker)} and run `make iterate KEEP=all` to have them made again."
            )
    if stage.name == "report":
        for other in stages(run):
            if other.name != "report" and not is_done(run, other, hashes):
                raise ThinkSwitchError(
                    f"{run.folder}: {other.name} of iteration {other.iteration} is not done, or what it depends on "
                    "has changed; run `make iterate` first, so that the report is of one configuration."
                )


def clear_leftovers(run: Run, hashes: Hashes) -> None:
    """Remove what killed commands left half-built, but not what their stages can go on with. The lock is held."""
    useful = {
        files.temporary_sibling(output)
        for stage in stages(run)
        if stage.resume_on is not None and goes_on(run, stage, hashes)
        for output in stage.outputs
    }
    for left in run.folder.rglob(files.temporary_sibling(Path("*")).name):
        if left not in useful and not any(kept in left.parents for kept in useful):
            files.remove(left)


def forget_stale(run: Run) -> tuple[int, list[Stage]]:
    """Remove the stamps that no longer hold, so that Make redoes those stages.

    Returns how many stages there are, and those left to do.
    """
    hashes = Hashes(run.folder)
    every = list(stages(run))
    waiting = [stage for stage in every if not is_done(run, stage, hashes)]
    for stage in waiting:
        stamp_path(run, stage).unlink(missing_ok=True)
    if run.folder.is_dir():
        clear_leftovers(run, hashes)
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
