"""`thinkswitch verify RUN`: do the files of a run still fit together?

Every file is read again (nothing is taken from memory) and compared with the stamps: what a stage
wrote, what it read, and the settings it had.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from thinkswitch_plugin import console
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run.folder import NOTHING_MORE, Given, Run, open_run
from thinkswitch_plugin.run.hashes import CARD, Hashes, read_stamp, within
from thinkswitch_plugin.run.table import Stage, stages, stamp_path


def verify(folder: Path, given: Given = NOTHING_MORE) -> None:
    """Compare a run with its stamps and name every file that does not fit.

    Raises `ThinkSwitchError` if there is one, or if the folder is no run.
    """
    run, hashes = open_run(folder, given), Hashes(folder, trust=False)
    every = list(stages(run))
    done = [stage for stage in every if stamp_path(run, stage).exists()]
    problems = dict.fromkeys(problem for stage in done for problem in misfits(run, stage, hashes))
    for problem in problems:
        console.say(f"  {problem}")
    if problems:
        raise ThinkSwitchError(
            f"{folder}: {len(problems)} things do not match; `make iterate` runs again what has another "
            "recipe or input. To repair a damaged file, delete it first."
        )
    pruned = sum(not (folder / file).is_file() for file in hashes.pruned)
    console.say(
        f"{folder}: {len(done)} stages fit their stamps ({len(hashes.known)} files read"
        + (f", {pruned} pruned" if pruned else "")
        + (f"); {len(every) - len(done)} stages are not done yet" if len(done) < len(every) else ")")
    )


def misfits(run: Run, stage: Stage, hashes: Hashes) -> Iterator[str]:
    """What of one finished stage does not fit its stamp, a line each."""
    path, name = stamp_path(run, stage), f"{stage.name} of iteration {stage.iteration}"
    stamp = within(read_stamp(path), run.folder)
    if stamp is None:
        yield f"{path}: damaged"
        return
    wrote = {file: found for file, found in (stamp.get("outputs") or {}).items() if Path(file).name != CARD}
    there = {file: found for output in stage.outputs if output.exists() for file, found in hashes.files(output).items()}
    for file in sorted(wrote.keys() | there.keys()):
        if file not in there:
            yield f"{file}: missing, {name} wrote it"
        elif file not in wrote:
            yield f"{file}: not written by {name}"
        elif wrote[file] != there[file]:
            yield f"{file}: changed since {name} wrote it"
    now = stage.depends_on(hashes)
    read = stamp.get("inputs") or {}
    for source, found in now["inputs"].items():
        if source not in read or read[source] != found:
            yield f"{source}: not what {name} read"
    before = stamp.get("values") or {}
    for key, value in now["values"].items():
        if before.get(key) != value:
            yield f"{run.recipe.path}: `{key}` is not what {name} was done with"
    if stamp.get("seed") != run.seed:
        yield f"{path}: seed {stamp.get('seed')}, the run has {run.seed}"
