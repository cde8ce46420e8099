"""The table of stages, and that the Makefile, the commands and the pictures of the report match it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from tests.conftest import BIN, ROOT
from thinkswitch_plugin import cli
from thinkswitch_plugin.cli import stages as stage_commands
from thinkswitch_plugin.loop import work
from thinkswitch_plugin.recipe import load_recipe
from thinkswitch_plugin.report import pictures
from thinkswitch_plugin.run import TABLE, Given, Run, locked, processes, stages, stamp_path
from thinkswitch_plugin.run.folder import MOST_ITERATIONS
from thinkswitch_plugin.run.table import REPORT_PICTURES

MAKE = ("make", "-o", "setup", "DOMAIN=arithmetic", "ITERATIONS=2")


@pytest.fixture
def opened(tmp_path: Path) -> Run:
    return Run(tmp_path / "arithmetic", load_recipe(Path("recipes/arithmetic.yaml")), 0, "embedded", 2)


def test_make_runs_the_commands_of_the_table_in_its_order(opened: Run, command: Any) -> None:
    rows = {row.name: row for row in TABLE}
    expected = []
    for stage in stages(opened):
        row = rows[stage.name]
        words = [row.command, *([] if row.single else [str(stage.iteration)])]
        if words not in expected:  # one command does both modes
            expected.append(words)
    done = command(*MAKE, "-n", "loop", f"RUNS={opened.folder.parent}")
    found = [
        line.split("bin/thinkswitch ")[1].partition("  #")[0].replace('"$RUN" ', "").replace(' "$RUN"', "").split()
        for line in done.stdout.splitlines()
    ]
    assert found == expected


def test_makes_targets_are_the_stamps_of_the_table(opened: Run, command: Any) -> None:
    for stage in stages(opened):
        stamp_path(opened, stage).parent.mkdir(parents=True, exist_ok=True)
        stamp_path(opened, stage).touch()
    words = (*MAKE, "-q", "loop", f"RUNS={opened.folder.parent}")
    assert command(*words).returncode == 0
    for stage in stages(opened):
        stamp_path(opened, stage).rename(opened.folder / "away")
        assert command(*words).returncode == 1, stage.title
        (opened.folder / "away").rename(stamp_path(opened, stage))


def test_a_pair_made_before_its_key_was_renamed_is_not_made_again(opened: Run) -> None:
    values = next(stage for stage in stages(opened) if stage.name == "pair").values["pair"]
    assert values["embedded"] is True and "demo" not in values


def test_a_plan_of_make_is_carried_out_line_by_line_until_one_fails(forked: Any, tmp_path: Path) -> None:
    plan = 'recipes  # what there is\nverify "$RUN"\nrecipes\n'
    done = forked(BIN / "thinkswitch", "stages", THINKSWITCH_PLAN=plan, RUN=str(tmp_path / "none"))
    assert done.returncode == 1 and done.stdout.count("arithmetic-mixed") == 1
    assert f"{tmp_path / 'none'} is not a run folder" in done.stderr and len(done.stderr.splitlines()) == 1
    assert forked(BIN / "thinkswitch", "stages").returncode == 0  # nothing is left to do


def test_what_takes_long_to_import_is_imported_before_the_first_stage_that_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    monkeypatch.setattr(stage_commands, "has_cuda", lambda: False)
    monkeypatch.setattr(stage_commands, "import_module", done.append)
    monkeypatch.setattr(stage_commands, "in_a_fork", lambda words: done.append(" ".join(words)))
    CliRunner().invoke(cli.main, ["stages", "--plan", "pairs run 1\nrebuild run 1\n"], catch_exceptions=False)
    assert done == ["pairs run 1", *stage_commands.IMPORTED["rebuild"], "rebuild run 1"]
    assert stage_commands.IMPORTED.keys() <= {row.command for row in TABLE}


def test_make_has_rules_for_as_many_iterations_as_a_run_may_have() -> None:
    found = re.search(r"^COUNT := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None and found[1].split() == [str(k) for k in range(1, MOST_ITERATIONS + 1)]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_each_stage_has_its_work_and_its_command(row: Any) -> None:
    assert callable(getattr(work, row.work))
    words = [one.name for one in cli.main.commands[row.command].params if isinstance(one, click.Argument)]
    assert words == ["run", *(["iteration"] * (not row.single)), *(["mode"] * bool(row.mode))]


def test_the_report_has_a_file_for_each_picture_that_is_drawn() -> None:
    assert tuple(pictures.OF_REPORT) == REPORT_PICTURES and set(pictures.KINDS) == {"png", "svg"}


def test_what_the_environment_says_reaches_the_run(opened: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"KEEP": "last", "PRICE_PER_HOUR": "0.35", "THINKSWITCH_DATA": "mine"}.items():
        monkeypatch.setenv(name, value)
    told: list[Given] = []
    monkeypatch.setattr(cli.run, "open_run", lambda folder, given: told.append(given) or opened)
    monkeypatch.setattr(cli.run, "execute", lambda *_, **__: None)
    assert CliRunner().invoke(cli.main, ["report", "runs/arithmetic"]).exit_code == 0
    assert told == [Given(keep="last", price="0.35", data="mine")]
    assert CliRunner().invoke(cli.main, ["report", "runs/arithmetic", "--data", "other"]).exit_code == 0
    assert told[1].data == os.environ["THINKSWITCH_DATA"] == "other"  # where lm-eval's tasks look


def test_both_modes_of_an_evaluation_are_one_command_with_one_engine_and_one_lock(
    opened: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, str]] = []
    engines = set()

    def evaluate(run: Run, k: int, mode: str, served: object) -> None:
        asked.append((k, mode))
        engines.add(served)
        with locked(run.folder, patience=0):  # as the stage itself takes it
            pass

    monkeypatch.setattr(work, "evaluate", evaluate)
    monkeypatch.setattr(cli.run, "open_run", lambda *_: opened)
    monkeypatch.setattr(cli.run, "execute", lambda run, name, k, do: do())
    assert CliRunner().invoke(cli.main, ["eval", "runs/arithmetic", "1"]).exit_code == 0
    assert asked == [(1, "instruct"), (1, "thinking")] and len(engines) == 1
    assert CliRunner().invoke(cli.main, ["eval", "runs/arithmetic", "2", "thinking"]).exit_code == 0
    assert asked[2:] == [(2, "thinking")] and not processes.HELD_LOCKS


def test_a_command_without_its_iteration_is_wrong_usage() -> None:
    with pytest.raises(click.MissingParameter):
        cli.main.commands["train"].make_context("train", ["runs/arithmetic"])


def test_an_import_that_points_up_fails_the_lint(tmp_path: Path) -> None:
    package = tmp_path / "thinkswitch_plugin"
    shutil.copytree(ROOT / "thinkswitch_plugin", package)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    words = [BIN / "lint-imports", "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    with (package / "data" / "traces.py").open("a") as handle:
        handle.write("\n\nfrom thinkswitch_plugin.run import folder\n")
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "data is not allowed to import" in " ".join(done.stdout.split()), done.stdout
