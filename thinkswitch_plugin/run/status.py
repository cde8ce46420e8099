"""`make status`: what of a run is done, what is at work, what is left. Reads only, takes no lock, imports no engine.

A stage counts as done if its stamp still fits what it reads, as far as remembered hashes tell; what would have to
be read anew (a checkpoint that was copied, say) is called not checked instead.
"""

from __future__ import annotations

import itertools
import shlex
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console
from thinkswitch_plugin.recipe import recipe_path
from thinkswitch_plugin.run.execution import Seconds, is_done, place, seconds_of, work_path
from thinkswitch_plugin.run.folder import NOTHING_MORE, Given, Run, open_run, settings_file
from thinkswitch_plugin.run.hashes import Hashes, read_stamp, within
from thinkswitch_plugin.run.progress import amount, duration
from thinkswitch_plugin.run.table import Stage, stages, stamp_path

READ_AT_MOST = 2**20  # bytes; a larger file is not read anew
DONE, CHANGED, UNCHECKED, LEFT, NOW, STOPPED = "done", "changed", "not checked", "left", "now", "stopped"
MEANING = {CHANGED: "what they read has changed: will run again", UNCHECKED: "done; whether still true is not checked"}


class NotRemembered(Exception):
    """A file's hash is not known without reading all of it."""


class Remembered(Hashes):
    """Hashes that are known already, and those of small files."""

    def _read(self, path: Path, mark: list[int]) -> str:
        if mark[0] > READ_AT_MOST:
            raise NotRemembered(path)
        return super()._read(path, mark)


def show_status(folder: Path, given: Given = NOTHING_MORE) -> None:
    """Print what of the run in `folder` is done, at work and left, and the next command.

    Raises `ThinkSwitchError` if the run's own files are damaged, or there is neither a run nor a recipe of that name.
    """
    adaptive, holder = list(adaptive_lines(folder)), lock_holder(folder / ".lock")
    if not settings_file(folder).is_file():
        recipe_path(folder.name)
        lines = adaptive or [f"There is no run in {folder} yet; begin one with: {next_command(folder)}"]
        if adaptive and holder is not None:
            lines.append(f"Now:    process {holder}{words_of(holder)}")
    else:
        lines = list(run_lines(open_run(folder, given), adaptive, holder))
    for line in lines:
        console.say(console.printable(line))


def run_lines(run: Run, adaptive: list[str], holder: int | None) -> Iterator[str]:
    """What is printed of a run.

    Args:
        adaptive: the lines of `make adaptive`.
        holder: the process that holds the run's lock.
    """
    every, hashes = list(stages(run)), Remembered(run.folder)
    seconds, record = seconds_of(run, every), read_record(work_path(run.folder))
    if record is not None and record.key in seconds:
        record = None  # it was killed after its last breath
    states = {stage.key: state_of(run, stage, hashes) for stage in every}
    if record is not None and record.key in states:
        states[record.key] = NOW if holder == record.pid else STOPPED
    done = sum(state in (DONE, UNCHECKED) for state in states.values())
    taken = f" in {duration(sum(seconds.values()))}" if done else ""
    yield f"{run.folder}: seed {run.seed}, engine {run.engine}; {done} of {len(every)} stages done{taken}"
    yield from table(every, states, seconds)
    yield from adaptive
    yield from at_work(run, every, seconds, record, holder)
    if done == len(every):
        yield f"All done: see {run.folder / 'report.html'}"
    elif holder is None:
        yield f"Next:   {next_command(run.folder, run)}"


def state_of(run: Run, stage: Stage, hashes: Hashes) -> str:
    """Whether a stage is done, without reading what is large."""
    stamp = read_stamp(stamp_path(run, stage))
    try:
        return LEFT if stamp is None else DONE if is_done(run, stage, hashes) else CHANGED
    except NotRemembered:
        return (
            UNCHECKED
            if stamp is not None and within(stamp.get("values"), run.folder) == within(stage.values, run.folder)
            else CHANGED
        )


def table(every: list[Stage], states: dict[tuple[str, int], str], seconds: Seconds) -> Iterator[str]:
    """A line for each iteration and state, in order."""
    for where, group in itertools.groupby(every, key=lambda s: "report" if s.name == "report" else s.iteration):
        here, title = list(group), where if where == "report" else f"iteration {where}"
        for state in (DONE, UNCHECKED, CHANGED, NOW, STOPPED, LEFT):
            names = [
                s.name + (f" {seconds[s.key]:.1f} s" if s.key in seconds else "")
                for s in here
                if states[s.key] == state
            ]
            if names:
                note = f" ({MEANING[state]})" if state in MEANING else ""
                yield f"  {title:12} {state:11} {', '.join(names)}{note}"
                title = ""


def adaptive_lines(folder: Path) -> Iterator[str]:
    """A line for each seed of `make labels` and `make adaptive`: what is there, and what was begun."""
    for seed in sorted((folder / "adaptive").glob("seed-*")):
        folds = {path.parent.parent for path in seed.glob("labels/fold-*/*/generations.json")}
        whole = (seed / "labels" / "labels.jsonl").is_file()
        parts = ["labels" if whole else f"labels begun, folds answered: {len(folds)}"]
        conditions = sorted(path for path in seed.glob("conditions/*") if path.is_dir())
        judged = [path.name for path in conditions if (path / "eval.json").is_file()]
        begun = [path.name for path in conditions if path.name not in judged]
        parts += [f"evaluated {', '.join(judged)}"] * bool(judged) + [f"begun {', '.join(begun)}"] * bool(begun)
        yield f"  {'adaptive':12} {seed.name}: {'; '.join(parts)}"
    if (written := folder / "adaptive" / "adaptive.md").is_file():
        yield f"  {'':12} last table: {written}"


def at_work(run: Run, every: list[Stage], seconds: Seconds, record: AtWork | None, holder: int | None) -> Iterator[str]:
    """What is at work or was last, where its logs are, and why it failed."""
    if record is None:
        if holder is not None:
            yield f"Locked: another command is at work here, process {holder}{words_of(holder)}"
        return
    title = Stage(*record.key).title
    progress = "".join(f", {text}" for text in progress_text(record.progress))
    passed = time.time() - record.began
    if holder == record.pid:
        yield f"Now:    {title}, process {record.pid}, for {duration(passed)}{progress}"
        yield from (f"        {place(s, every, seconds, passed)}" for s in every if s.key == record.key)
    else:
        if holder is not None:
            yield f"Locked: process {holder} holds the run{words_of(holder)}"
        times = (record.failed.get("at"), record.progress.get("at"), record.began)
        at = next(found for found in times if isinstance(found, int | float))
        when = f"{duration(max(0.0, time.time() - at))} ago"
        if record.failed:
            yield f"Failed: {title}, {when}{progress}: {record.failed.get('why')}"
        else:
            yield f"Killed: {title}; its process {record.pid} ended without a word, last seen {when}{progress}"
    logs = [(p.stat().st_mtime, p) for p in (run.iteration(record.key[1]) / "logs").glob("*.log")]
    modified, log = max(logs, default=(0.0, None))
    if modified >= record.began - 1:
        yield f"Log:    {log}"


def progress_text(found: dict[str, Any]) -> Iterator[str]:
    """What a recorded bar says: how far it is, what stands beside it, how long it may take."""
    done, total, left = found.get("done"), found.get("total"), found.get("left")
    if isinstance(done, int | float) and isinstance(total, int | float) and total > 0:
        unit = str(found.get("unit") or "it")
        counted = "bytes" if unit == "B" else f"{unit}s" if unit not in ("it", "s") else ""
        what = " ".join(word for word in (amount(done, unit), "of", amount(total, unit), counted) if word)
        yield f"{found.get('title')}: {what} ({100 * done / total:.0f} %)"
    elif found:
        yield str(found.get("title"))
    if found.get("note"):
        yield str(found["note"])
    if isinstance(left, int | float) and left >= 1:
        yield f"about {duration(left)} left of it"


@dataclass(frozen=True)
class AtWork:
    """The last stage that was begun and has not ended well, as it recorded itself; see `progress.Work`."""

    key: tuple[str, int]
    pid: int
    began: float
    progress: dict[str, Any]
    failed: dict[str, Any]


def read_record(path: Path) -> AtWork | None:
    """The stage that recorded itself; None if there is none or the record is damaged."""
    found = read_stamp(path) or {}
    progress, failed = (part if isinstance(part := found.get(name), dict) else {} for name in ("progress", "failed"))
    try:
        key = str(found["stage"]), int(found["iteration"])
        return AtWork(key, int(found["pid"]), float(found["began"]), progress, failed)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def lock_holder(path: Path) -> int | None:
    """The process that locked a file, by the kernel's own list; None if nobody has."""
    with suppress(OSError):
        inode = str(path.stat().st_ino)
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()  # 1: FLOCK ADVISORY WRITE 4711 fe:00:131090 0 EOF
            if len(words) > 5 and words[1] == "FLOCK" and words[5].rpartition(":")[2] == inode and words[4].isdigit():
                return int(words[4])
    return None


def words_of(pid: int) -> str:
    """The command of a process, in brackets; nothing if it has ended or is somebody else's."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        if any(words):
            return f" ({' '.join([Path(words[0]).name, *words[1:]]).strip()[:100]})"
    return " (it has ended; what it started is still ending)"


def next_command(folder: Path, run: Run | None = None) -> str:
    """`make iterate` with the settings that this run folder needs, those left out that are the defaults."""
    settings = {"DOMAIN": (folder.name, "arithmetic"), "RUNS": (str(folder.parent), "runs")}
    if run is not None:
        settings |= {"ITERATIONS": (str(run.iterations), "2"), "SEED": (str(run.seed), "0")}
    given = [f"{name}={shlex.quote(value)}" for name, (value, default) in settings.items() if value != default]
    return " ".join(["make iterate", *given])
