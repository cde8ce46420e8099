"""Work that is done once: repeated only if what it depends on has changed, continued after a kill.

    iter-1/.stamps/pairs.json
    {"values": {"selection": "first", "answer": "exact", "trace": "auto"},
     "inputs": {"arithmetic/iter-1/generations.jsonl": "5991…", …}, "seconds": 0.05, …}

A stamp is written last. It holds the key, what the work depended on (`inputs` and `values` of a stage of the loop come
from its row in `table.py`), and what the work returned. `trained.begun` beside it holds the key of the last attempt; it stays, so
that a lost stamp costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from thinkswitch_plugin import files
from thinkswitch_plugin.run.hashes import read_stamp, within

Key = Mapping[str, Any]  # plain JSON values by name
Part = Callable[[Key], Any]


def whole(key: Key) -> Key:
    """The whole key: an attempt with any other key is discarded."""
    return key


def stored(stamp: Path, key: Key, outputs: Iterable[Path] = (), folder: Path | None = None) -> dict[str, Any] | None:
    """The stamp of work that is done and still true, None otherwise.

    Args:
        folder: of the run; earlier versions wrote its path in front of those inside it.
    """
    found = read_stamp(stamp)
    if folder is not None:
        found = within(found, folder)
    if found is None or any(name not in found or found[name] != value for name, value in key.items()):
        return None
    return found if all(output.exists() for output in outputs) else None


def record(stamp: Path, key: Key, notes: Key) -> dict[str, Any]:
    """Write the stamp of work that is done and return it."""
    result = {**key, **notes}
    files.write_json(stamp, result)
    return result


def _timed(work: Callable[[], Key | None]) -> dict[str, Any]:
    started = time.monotonic()
    notes = work() or {}
    return {"seconds": round(time.monotonic() - started, 2), **notes}


def begun_path(stamp: Path) -> Path:
    """Where an attempt records its key before it writes anything."""
    return stamp.with_suffix(".begun")


def resumes(stamp: Path, key: Key, part: Part = whole) -> bool:
    """Whether an unfinished attempt can be continued: this part of its key was the same."""
    begun = read_stamp(begun_path(stamp))
    return begun is not None and part(begun) == part(key)


def once(
    stamp: Path,
    key: Key,
    outputs: Sequence[Path],
    work: Callable[[bool], Key | None],
    *,
    scratch: Iterable[Path] = (),
    part: Part | None = whole,
) -> dict[str, Any]:
    """Do work unless its stamp shows that nothing it depends on has changed; return the stamp.

    Args:
        key: everything the outputs depend on.
        work: writes the outputs, each whole or so that it can be continued, and is told whether it may continue
            what it finds there. What it returns is kept in the stamp.
        scratch: what an attempt leaves beside its outputs to continue from.
        part: the part of a key that half-finished outputs depend on; None if the work always starts anew.
    """
    if (found := stored(stamp, key, outputs)) is not None:
        return found
    goes_on = part is not None and resumes(stamp, key, part)
    if not goes_on:
        for path in (*outputs, *map(files.temporary_sibling, outputs), *scratch):
            files.remove(path)
    stamp.unlink(missing_ok=True)
    if part is not None:
        files.write_json(begun_path(stamp), key)
    return record(stamp, key, _timed(lambda: work(goes_on)))


def folder_once(
    folder: Path, name: str, key: Key, build: Callable[[Path], Key | None], outputs: Iterable[Path] = ()
) -> dict[str, Any]:
    """Build a folder with its stamp `name` in it, whole or not at all, unless it is there; return the stamp.

    Args:
        build: fills the folder that it is given. What it returns is kept in the stamp.
        outputs: must exist too for the folder to count as built.
    """
    if (found := stored(folder / name, key, outputs)) is not None:
        return found
    with files.atomic_folder(folder) as building:
        return record(building / name, key, _timed(lambda: build(building)))
