"""Do a stage unless its stamp shows that nothing it depends on has changed.

Make knows the order of the stages; a stamp knows whether a stage is still true. One stamp a stage holds the
hashes of what the stage read and the settings it depends on, so touching a file reruns nothing and changing it
reruns what depends on it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run import progress, stamp
from thinkswitch_plugin.run.folder import Run, locked
from thinkswitch_plugin.run.hashes import Hashes, read_stamp
from thinkswitch_plugin.run.table import Stage, find_stage, stages, stamp_path

Work = Callable[[], dict[str, Any] | None]
Seconds = Mapping[tuple[str, int], float]  # of the stages that are done, by name and iteration


def is_done(run: Run, stage: Stage, hashes: Hashes) -> bool:
    """Whether a stage's outputs are there and its stamp still matches what it read."""
    path, needed = stamp_path(run, stage), (*stage.outputs, *stage.needs)
    if not (path.is_file() and all(output.exists() for output in needed)):
        return False  # before anything is read
    return stamp.stored(path, stage.depends_on(hashes), folder=run.folder) is not None


def execute(run: Run, name: str, iteration: int, work: Work) -> None:
    """Do a stage unless its stamp shows that nothing it depends on has changed; then prune what `KEEP=` gives up.

    Args:
        work: writes the stage's outputs, each whole or not at all; what it returns
            is kept in the stamp under ``notes``.

    Raises:
        ThinkSwitchError: another command is at work, an input was pruned, the disk is too
            full, or what `work` raises. What is whole is kept, and the same call goes on from it.
    """
    from thinkswitch_plugin.run.prune import prune

    stage = find_stage(run, name, iteration)
    with locked(run.folder):
        hashes, path = Hashes(run.folder), stamp_path(run, stage)
        if is_done(run, stage, hashes):
            os.utime(path)  # newer than what it depends on, for Make
            console.say(f"[{stage.title}] unchanged")
            return
        every = list(stages(run))
        seconds, started = seconds_of(run, every), time.monotonic()
        console.say(f"[{stage.title}] {place(stage, every, seconds, 0)}")
        at_work = progress.Work(
            work_path(run.folder),
            {"stage": name, "iteration": iteration},
            where=lambda: place(stage, every, seconds, time.monotonic() - started),
        )
        with progress.working(at_work):
            require_inputs(run, stage, hashes)
            path.unlink(missing_ok=True)  # it may still match where only something of `needs` is gone
            part = stage.resumed_part if stage.resume_on is not None else None
            done = stamp.once(
                path,
                stage.depends_on(hashes),
                stage.outputs,
                lambda _: _carry_out(run, stage, hashes, work),
                scratch=stage.scratch,
                part=part,
            )
            hashes.save()
        console.say(f"[{stage.title}] done in {done['seconds']:.1f} s")
        prune(run, hashes)


def _carry_out(run: Run, stage: Stage, hashes: Hashes, work: Work) -> dict[str, Any]:
    """Do a stage's work; return what its stamp holds besides what it depends on. The lock is held."""
    if stage.writes_like is not None:
        files.require_space(run.folder, files.size(stage.writes_like), stage.title)
    started = time.monotonic()
    notes = work() or {}
    seconds = round(time.monotonic() - started, 2)
    for output in stage.outputs:
        if not output.exists():
            raise ThinkSwitchError(
                f"{stage.title} ended without {output}; see {run.iteration(stage.iteration) / 'logs'}, "
                "and run `make iterate` again."
            )
        files.sync(output)
        hashes.forget_pruned(output)
    return {
        "stage": stage.name,
        "iteration": stage.iteration,
        "outputs": {file: found for output in stage.outputs for file, found in hashes.files(output).items()},
        "notes": notes,
        "seconds": seconds,  # of the work alone
        "seed": run.seed,
        "command": " ".join(["thinkswitch", *sys.argv[1:]]),
        "versions": versions(),
    }


def place(stage: Stage, every: Sequence[Stage], seconds: Seconds, elapsed: float) -> str:
    """Where a run is: `stage 7 of 20 · iteration 1 of 2 · train · 3 min so far · about 6 min left`.

    What is left is estimated from the same stages of the last iteration before that has done them; nothing is said
    where there is none. The report does not count.

    Args:
        every: all stages of the run.
        seconds: of the stages that are done.
        elapsed: seconds since this stage began.
    """
    number = 1 + [other.key for other in every].index(stage.key)
    where = f"iteration {stage.iteration} of {every[-1].iteration}" if stage.iteration else "the starting pair"
    parts = [f"stage {number} of {len(every)}", "report" if stage.name == "report" else f"{where} · {stage.name}"]
    if (spent := sum(seconds.values()) + elapsed) >= 1:
        parts.append(f"{progress.duration(spent)} so far")
    coming = (other for other in every[number:] if other.key not in seconds)
    here, *later = (_expected(other, seconds) for other in (stage, *coming))
    if here is not None and None not in later and (left := max(0.0, here - elapsed) + sum(filter(None, later))):
        parts.append(f"about {progress.duration(left)} left")
    return " · ".join(parts)


def _expected(stage: Stage, seconds: Seconds) -> float | None:
    """What a stage took in the last iteration before that has done it; None if none has."""
    before = ((stage.name, k) for k in range(stage.iteration - 1, -1, -1))
    return 0.0 if stage.name == "report" else next((seconds[key] for key in before if key in seconds), None)


def work_path(folder: Path) -> Path:
    """Where the stage at work in a run is recorded for `make status`."""
    return folder / ".stamps" / "at-work.json"


def seconds_of(run: Run, every: Iterable[Stage]) -> dict[tuple[str, int], float]:
    """Seconds of the stages that have a stamp, by name and iteration."""
    found = {}
    for stage in every:
        seconds = (read_stamp(stamp_path(run, stage)) or {}).get("seconds")
        if isinstance(seconds, int | float):
            found[stage.key] = float(seconds)
    return found


def require_inputs(run: Run, stage: Stage, hashes: Hashes) -> None:
    """Refuse work on what is pruned, and a report of stages that do not fit together.

    Raises `ThinkSwitchError` saying what to do.
    """
    every = list(stages(run))
    made_by = {output: other for other in every for output in other.outputs}
    for path in stage.inputs:
        if hashes.missing(path):
            maker = made_by[path]
            raise ThinkSwitchError(
                f"{stage.title} needs {path}, whose weights KEEP= has pruned; delete "
                f"{stamp_path(run, maker)} and run `make iterate KEEP=all` to have them made again."
            )
    if stage.name == "report":
        for other in every:
            if other.name != "report" and not is_done(run, other, hashes):
                raise ThinkSwitchError(
                    f"{run.folder}: {other.title} is not done, or what it depends on "
                    "has changed; run `make iterate` first, so that the report is of one configuration."
                )


def clear_leftovers(run: Run, hashes: Hashes) -> None:
    """Remove what killed commands left half-built, but not what their stages can go on with. The lock is held."""
    useful: set[Path] = set()
    for stage in stages(run):
        path = stamp_path(run, stage)
        if stage.resume_on is None or not stamp.begun_path(path).is_file():
            continue  # before anything is read
        if stamp.resumes(path, stage.depends_on(hashes), stage.resumed_part):
            useful |= {files.temporary_sibling(output) for output in stage.outputs}
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
