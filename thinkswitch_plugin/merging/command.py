"""Write a merge as a checkpoint, in a process of its own."""

from __future__ import annotations

from pathlib import Path

from thinkswitch_plugin.environment import has_cuda
from thinkswitch_plugin.run import processes

# Shards that are written while the next one is computed; mergekit's default waits for each 5 GB.
MERGE_OPTIONS = ("--copy-tokenizer", "--lazy-unpickle", "--async-write", "--out-shard-size", "1B")


def write_merge(config: Path, out: Path, log: Path) -> None:
    """Run mergekit on a config, through `thinkswitch merge`, which knows our method too."""
    command: list[str | Path] = ["thinkswitch", "merge", config, out, *MERGE_OPTIONS]
    processes.run_logged(command + (["--cuda"] if has_cuda() else []), log, title="mergekit")
