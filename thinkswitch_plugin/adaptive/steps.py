"""Parts of a job that are done once: redone where what they depend on has changed, gone on with after a kill.

    fold-1/post/trained.json
    {"key": {"student": "9f8e…", "data": [{"path": "41c0…", "type": "thinkswitch_plugin.post_thinking"}], …},
     "seconds": 21.4, …}

Such a stamp is written last. `trained.begun` beside it says what the attempt depended on; it stays, so that
a lost stamp costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from thinkswitch_plugin import files
from thinkswitch_plugin.hashes import read_stamp


def stored(stamp: Path, key: dict[str, Any], outputs: Sequence[Path]) -> dict[str, Any] | None:
    """The stamp of a step that is done and still true, None otherwise."""
    found = read_stamp(stamp)
    return found if found and found.get("key") == key and all(output.exists() for output in outputs) else None


def once(
    stamp: Path, key: dict[str, Any], outputs: Sequence[Path], work: Callable[[bool], dict[str, Any]]
) -> dict[str, Any]:
    """Do a step unless its stamp shows that nothing it depends on has changed; return its stamp.

    Args:
        key: everything the outputs depend on, as plain JSON values; no paths, so that a run can be moved.
        work: writes the outputs, each whole or so that it can be gone on with; it is told whether what it
            finds there came of the same key. What it returns is kept in the stamp, beside `seconds`.
    """
    if (found := stored(stamp, key, outputs)) is not None:
        return found
    begun = stamp.with_suffix(".begun")
    goes_on = (read_stamp(begun) or {}).get("key") == key
    if not goes_on:
        for output in outputs:
            files.remove(output)
            files.remove(files.temporary_sibling(output))
    stamp.unlink(missing_ok=True)
    files.write_json(begun, {"key": key})
    started = time.monotonic()
    notes = work(goes_on)
    result = {"key": key, **notes, "seconds": round(time.monotonic() - started, 2)}
    files.write_json(stamp, result)
    return result
