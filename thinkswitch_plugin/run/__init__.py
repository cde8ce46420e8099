"""A run: its folder, the table of its stages, and the stamps that say what is done.

Nothing here imports another room of the package when it is imported itself, so every room may use these parts.
"""

from __future__ import annotations

from thinkswitch_plugin.run.execution import (
    clear_leftovers,
    execute,
    forget_stale,
    is_done,
    seconds_of,
    versions,
    work_path,
)
from thinkswitch_plugin.run.folder import (
    MODES,
    MOST_ITERATIONS,
    NOTHING_MORE,
    Given,
    Run,
    locked,
    open_run,
    read_settings,
    settings_file,
)
from thinkswitch_plugin.run.stage import Stage, stamp_path
from thinkswitch_plugin.run.table import (
    REPORT_FILES,
    TABLE,
    answering_options,
    find_stage,
    stages,
    sweep_files,
    training_config,
)

__all__ = [
    "MODES",
    "MOST_ITERATIONS",
    "NOTHING_MORE",
    "REPORT_FILES",
    "TABLE",
    "Given",
    "Run",
    "Stage",
    "answering_options",
    "clear_leftovers",
    "execute",
    "find_stage",
    "forget_stale",
    "is_done",
    "locked",
    "open_run",
    "read_settings",
    "seconds_of",
    "settings_file",
    "stages",
    "stamp_path",
    "sweep_files",
    "training_config",
    "versions",
    "work_path",
]
