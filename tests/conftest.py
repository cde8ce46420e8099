"""Shared fixtures: one real run of the demo domain, which all slow tests use."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import hypothesis
import orjson
import pytest

from tests import forked as forks

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv" / "bin"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Read when axolotl is imported, which in a fork is before it has its environment.
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
# vLLM's engine and its worker in one process, as on one GPU: on a CPU it would start two, each with imports of its own.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
for _name in [name for name in os.environ if name.startswith("THINKSWITCH_")]:
    del os.environ[_name]  # what a `make test` around the tests would tell the commands that they run
# The same examples every time, however slow the machine; `make fuzz` looks further.
hypothesis.settings.register_profile("thinkswitch", derandomize=True, deadline=None)
hypothesis.settings.load_profile("thinkswitch")

# What order keeps the processes of pytest-xdist busy, and from waiting for each other: the file that has the tiny pair and
# the finished run made begins, those that need neither follow, and then those that do, the longest first.
FIRST = "test_loop"
LAST = (
    "test_adaptive",  # it needs the pair alone, which is there before the finished run
    *("test_resume", "test_vllm", "test_live", "test_real_domains", "test_labels", "test_sweep"),
    *("test_export", "test_hybrid", "test_switch", "test_prompt_embeds", "test_merge_lora", "test_compare"),
    *("test_cluster", "test_distribution", "test_notebook", "test_cli", "test_init", "test_readme", "test_cards"),
)

Command = Callable[..., subprocess.CompletedProcess[str]]


def pytest_configure(config: pytest.Config) -> None:
    """Import skops first: it searches every loaded module for scipy's functions, and transformers' for a long time."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        import skops.io  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put FIRST first, and the files of LAST last, in that order."""
    rank = {FIRST: -2} | {name: place for place, name in enumerate(LAST)}
    items.sort(key=lambda item: rank.get(item.path.stem, -1))


def outside_make() -> dict[str, str]:
    """The environment without what a `make test` around the tests would tell the commands that they run."""
    hidden = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    told = (name for name in os.environ if name not in hidden and not name.startswith("THINKSWITCH_"))
    return {name: os.environ[name] for name in told}


@pytest.fixture(scope="session")
def command() -> Command:
    """Run a command in the project's folder; output captured, exit code not checked."""

    def run(*words: str | Path, cwd: Path = ROOT, timeout: float = 900, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(w) for w in words],
            cwd=cwd,
            env={**outside_make(), **env},
            text=True,
            capture_output=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    return run


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first process of pytest-xdist to ask for it makes, while the others wait for it.

    No test may change what is in it: those that have to, work on a copy.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    made = folder.with_name(f"{name}.made")
    with folder.with_name(f"{name}.lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def forking() -> Iterator[Path]:
    """A virtual environment whose engines run in forks of a process that has them loaded."""
    with forks.environment(BIN.parent) as venv:
        yield venv


@pytest.fixture(scope="session")
def forked(forking: Path) -> Command:
    """As `command`, for the scripts in BIN: in a fork of a process that has the engines loaded."""

    def run(*words: str | Path, cwd: Path = ROOT, timeout: float = 900, **env: str) -> subprocess.CompletedProcess[str]:
        return forks.run(words, cwd, {**outside_make(), **env}, timeout, f"{forking}/bin/python")

    return run


@pytest.fixture
def forked_engines(forking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines that a test starts by our functions run in forks."""
    monkeypatch.setattr(sys, "executable", f"{forking}/bin/python")


@pytest.fixture(scope="session")
def make(command: Command, forking: Path) -> Command:
    """Run `make`, its stages and their engines in forks as `forked` does."""
    return partial(command, "make", f"VENV={forking}")


@pytest.fixture(scope="session")
def finished_run(make: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one iteration of the demo domain, by `make iterate`.

    Its engines are forks; test_resume makes the same run in processes of their own, and compares the two.
    Stamps name their files by path, so a copy of it is stale; it can be swept, exported and switched all the same.
    """

    def iterate(runs: Path) -> None:
        done = make("iterate", "ITERATIONS=1", f"RUNS={runs}", "ENGINE=embedded", timeout=1800)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    return once(tmp_path_factory, "runs", iterate) / "arithmetic"


@pytest.fixture(scope="module")
def own_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run that the tests of a file may add to."""
    folder = tmp_path_factory.mktemp("own") / "arithmetic"
    shutil.copytree(finished_run, folder)
    return folder


@pytest.fixture(scope="session")
def exported(finished_run: Path, forked: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a finished run's pair, in a copy of the run, at a small and at the full rank."""

    def export(runs: Path) -> None:
        shutil.copytree(finished_run, runs / "arithmetic")
        done = forked(BIN / "thinkswitch", "export-loras", "--domain", "arithmetic", "--runs", runs, "--rank", "8 128")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    return once(tmp_path_factory, "exported", export) / "arithmetic" / "iter-1" / "export"


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, Sequence[object]], Path]:
    """Write rows as JSONL into a temporary file."""

    def write(name: str, rows: Sequence[object]) -> Path:
        path = tmp_path / name
        path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
        return path

    return write
