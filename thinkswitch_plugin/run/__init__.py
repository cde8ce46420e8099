"""A run: its folder, the table of its stages, and the stamps that say what is done.

Nothing here imports another room of the package when it is imported itself, so every room may use these parts.
"""

from __future__ import annotations

from thinkswitch_plugin.run.execution import execute, forget_stale, versions
from thinkswitch_plugin.run.folder import MODES, NOTHING_MORE, Given, Run, locked, open_run, run_around, settings_file
from thinkswitch_plugin.run.table import (
    REPORT_FILES,
    TABLE,
    Stage,
    find_stage,
    stages,
    stamp_path,
    sweep_files,
)

__all__ = ["MODES", "NOTHING_MORE", "REPORT_FILES", "TABLE", "Given", "Run", "Stage", "execute"]
__all__ += ["find_stage", "forget_stale", "locked", "open_run", "run_around", "settings_file", "stages", "stamp_path"]
__all__ += ["sweep_files", "versions"]
