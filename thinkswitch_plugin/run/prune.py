"""`KEEP=`: delete the weights of old iterations, so that a long run does not fill the disk.

KEEP=all    nothing is deleted (the default)
KEEP=n      the pairs of the newest n finished iterations keep their weights; KEEP=last is KEEP=1
KEEP=none   weights go as soon as no stage that is left reads them, the last pair's too: for a rehearsal

Never touched: a starting pair outside the run folder, what a stage that is not done reads, and, but for KEEP=none, the
starting pair and the newest finished pair.
Of a pruned checkpoint everything but the weights stays (config, tokenizer, card), and the hash of
what was deleted, so its stage counts as done and the report can be written again.
"""

from __future__ import annotations

from pathlib import Path

from thinkswitch_plugin import console
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run.execution import is_done
from thinkswitch_plugin.run.folder import MODES, Run
from thinkswitch_plugin.run.hashes import Hashes
from thinkswitch_plugin.run.table import stages


def iterations_kept(text: str) -> int | None:
    """How many finished iterations `KEEP=` keeps; None is all. Raises `ThinkSwitchError` for anything else."""
    if text in ("", "all"):
        return None
    if text == "last":
        return 1
    if text == "none":
        return 0
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ThinkSwitchError(
            f"KEEP={text} is unknown; use all, last, none, or how many iterations to keep (1 or more)."
        )
    return int(text)


def prune(run: Run, hashes: Hashes) -> list[Path]:
    """Delete the weights that `KEEP=` gives up; return the folders. The lock is held."""
    kept = iterations_kept(run.given.keep)
    if kept is None:
        return []
    every = list(stages(run))
    done = {stage.key for stage in every if is_done(run, stage, hashes)}
    unfinished = {stage.iteration for stage in every if stage.key not in done and stage.name != "report"}
    finished = [k for k in range(1, run.iterations + 1) if k not in unfinished]
    pruned = []
    for k in finished[:-kept] if kept else range(run.iterations + 1):
        for mode in MODES:
            folder = Path(run.checkpoint(mode, k))
            if not folder.is_relative_to(run.folder):
                continue
            weights = sorted(folder.glob("*.safetensors"))
            readers = [s for s in every if any(folder == p or folder in p.parents for p in s.inputs)]
            if weights and done >= {s.key for s in readers}:
                hashes.prune(weights)
                pruned.append(folder)
    if pruned:
        console.say(f"  KEEP={run.given.keep}: weights pruned of {', '.join(map(str, pruned))}")
    return pruned
