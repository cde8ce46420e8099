"""The command `thinkswitch …`, also reached as `axolotl thinkswitch …`: it parses and calls, nothing else.

Each stage of the loop is one sub-command on a run folder, made from the table of stages; `make -n iterate`
shows their order. Heavy imports stay inside the commands, so help is instant. Any option can also be given as
THINKSWITCH_<OPTION> in the environment, as `make` does; an empty one counts as left out.
"""

from __future__ import annotations

from thinkswitch_plugin.cli import publish, run, serve, stages, tune
from thinkswitch_plugin.cli.group import Group, main
from thinkswitch_plugin.cli.tune import keys

__all__ = ["Group", "keys", "main", "publish", "run", "serve", "stages", "tune"]
