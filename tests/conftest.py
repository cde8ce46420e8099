"""Shared fixtures: one real run of the embedded domain, made once for all slow tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import hypothesis
import orjson
import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv" / "bin"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The same examples every time, however slow the machine; `make fuzz` looks further.
hypothesis.settings.register_profile("thinkswitch", derandomize=True, deadline=None)
hypothesis.settings.load_profile("thinkswitch")

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def command() -> Command:
    """Run a command in the project's folder; output captured, exit code not checked."""

    def run(*words: str | Path, cwd: Path = ROOT, timeout: float = 900, **env: str) -> subprocess.CompletedProcess[str]:
        settings = {
            k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "THINKSWITCH_OWNER")
        }
        return subprocess.run(
            [str(w) for w in words],
            cwd=cwd,
            env={**settings, **env},
            text=True,
            capture_output=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture(scope="session")
def finished_run(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one iteration of the embedded domain, by `make iterate`.

    Each process of pytest-xdist makes its own, since stamps name their files by path: a copy would be stale.
    """
    runs = tmp_path_factory.mktemp("runs")
    done = command("make", "iterate", "ITERATIONS=1", f"RUNS={runs}", "ENGINE=embedded", timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return runs / "arithmetic"


@pytest.fixture(scope="session")
def exported(finished_run: Path, command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a finished run's pair, in a copy of the run, at a small and at the full rank."""
    runs = tmp_path_factory.mktemp("exported") / "runs"
    shutil.copytree(finished_run, runs / "arithmetic")
    done = command(BIN / "thinkswitch", "export-loras", "--domain", "arithmetic", "--runs", runs, "--rank", "8 128")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return runs / "arithmetic" / "iter-1" / "export"


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, Sequence[object]], Path]:
    """Write rows as JSONL into a temporary file."""

    def write(name: str, rows: Sequence[object]) -> Path:
        path = tmp_path / name
        path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
        return path

    return write
