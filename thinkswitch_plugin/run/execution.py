"""Do a stage unless its stamp shows that nothing it depends on has changed.

Make knows the order of the stages; a stamp knows whether a stage is still true. One stamp a stage holds the
hashes of what the stage read and the settings it depends on, so touching a file reruns nothing and changing it
reruns what depends on it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run import progress, stamp, timing
from thinkswitch_plugin.run.folder import Run, locked
from thinkswitch_plugin.run.hashes import Hashes, read_stamp
from thinkswitch_plugin.run.stage import Stage, stamp_path
from thinkswitch_plugin.run.table import find_stage, stages

Work = Callable[[], dict[str, Any] | None]


def is_done(run: Run, stage: Stage, hashes: Hashes) -> bool:
    """Whether a stage's outputs are there and its stamp still matches what it read."""
    path, needed = stamp_path(run, stage), (*stage.outputs, *stage.needs)
    if not (path.is_file() and all(output.exists() for output in needed)):
        return False  # before anything is read
    return stamp.stored(path, stage.depends_on(hashes)) is not None


def execute(
    run: Run, name: str, iteration: int, work: Work, after: Callable[[Run, Hashes], object] | None = None
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
        if is_done(run, stage, hashes):
            os.utime(stamp_path(run, stage))  # newer than what it depends on, for Make
            console.say(f"[{stage.title}] unchanged")
            return
        every = list(stages(run))
        place = timing.place_of(stage, every, seconds_of(run, every), run.iterations)
        console.say(f"[{stage.title}] {place.text(0)}")
        started = time.monotonic()
        at_work = progress.Work(
            work_path(run.folder),
            {"stage": name, "iteration": iteration},
            where=lambda: place.text(time.monotonic() - started),
        )
        with progress.working(at_work):
            seconds = _carry_out(run, stage, hashes, work)
        console.say(f"[{stage.title}] done in {seconds:.1f} s")
        if after is not None:
            after(run, hashes)


def _carry_out(run: Run, stage: Stage, hashes: Hashes, work: Work) -> float:
    """Do a stage's work and write its stamp; return its seconds. The lock is held."""

    def noted(_resumes: bool) -> dict[str, Any]:
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
            "seconds": seconds,
            "seed": run.seed,
            "command": " ".join(["thinkswitch", *sys.argv[1:]]),
            "versions": versions(),
        }

    require_inputs(run, stage, hashes)
    path = stamp_path(run, stage)
    path.unlink(missing_ok=True)  # it may still match where only something of `needs` is gone
    done = stamp.once(
        path,
        stage.depends_on(hashes),
        stage.outputs,
        noted,
        scratch=stage.scratch,
        part=stage.resumed_part if stage.resume_on is not None else None,
    )
    hashes.save()
    return float(done["seconds"])


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
    every = list(stages(run))
    made_by = {output: other for other in every for output in other.outputs}
    for path in stage.inputs:
        if hashes.missing(path):
            maker = made_by[path]
            raise ThinkSwitchError(
                f"{stage.name} of iteration {stage.iteration} needs {path}, whose weights KEEP= has pruned; delete "
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
