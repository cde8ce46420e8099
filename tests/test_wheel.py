"""The package as a wheel: used from an empty folder, with no checkout near."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PARTS = (
    "thinkswitch_plugin",
    "recipes",
    "merge_configs",
    "lm_eval_tasks",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "Makefile",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was installed into."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source / part)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", str(target), str(source)], check=True)
    return target


def thinkswitch(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command of the wheel, run in a folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("THINKSWITCH_")}
    environment |= {"PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "thinkswitch_plugin.cli", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_names_every_file_recipe_merge_config_and_task_of_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    shown = thinkswitch(installed, tmp_path, "recipes").stdout
    assert {line.split()[0] for line in shown.splitlines()} == {p.stem for p in (ROOT / "recipes").glob("*.yaml")}
    for folder, home in (("merge_configs", "thinkswitch_plugin/shipped"), ("recipes", "thinkswitch_plugin/shipped")):
        wanted = {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.suffix in (".yaml", ".jsonl", ".sbatch")}
        assert {
            p.relative_to(installed / home) for p in (installed / home / folder).rglob("*.*") if p.suffix != ".py"
        } == wanted
    for path in (ROOT / "thinkswitch_plugin").rglob("*"):
        assert path.is_dir() or "__pycache__" in path.parts or (installed / path.relative_to(ROOT)).is_file(), path
    tasks = installed / "lm_eval" / "tasks" / "thinkswitch"
    assert {p.name for p in tasks.glob("*.yaml")} == {p.name for p in (ROOT / "lm_eval_tasks").glob("*.yaml")}


def test_iterate_runs_from_an_empty_folder_and_names_what_was_typed(installed: Path, tmp_path: Path) -> None:
    done = thinkswitch(installed, tmp_path, "iterate", "--domain", "arithmatic")
    assert done.returncode != 0 and "Did you mean arithmetic?" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_wheel_finds_its_recipe_merge_config_and_task_without_a_checkout(installed: Path, tmp_path: Path) -> None:
    words = ("--domain", "arithmetic", "--runs", "runs", "--engine", "embedded", "--iterations", "1")
    done = thinkswitch(installed, tmp_path, "begin", *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "arithmetic" / "run.json").is_file()
