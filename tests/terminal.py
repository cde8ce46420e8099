"""Run a command with a real terminal (a pseudo-terminal of the kernel) as its output."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import ROOT


def run_on_terminal(words: Sequence[str | Path], cwd: Path = ROOT, **env: str) -> tuple[int, str]:
    """Exit code and everything that was written to the terminal, escape codes and all."""
    ours, theirs = pty.openpty()
    settings = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "MAKEFLAGS", "MAKELEVEL")}
    process = subprocess.Popen(
        [str(word) for word in words],
        cwd=cwd,
        env={**settings, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120", **env},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            piece = os.read(ours, 65_536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    return process.wait(), written.decode(errors="replace")
