from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BIN

TS = BIN / "thinkswitch"


def test_help_lists_every_stage_and_imports_nothing_heavy(command: Any) -> None:
    done = command(TS, "--help")
    assert done.returncode == 0
    for name in ("begin", "pair", "requests", "generate", "pairs", "train", "merge-lora", "rebuild", "eval", "report"):
        assert f"\n  {name} " in done.stdout
    code = "import sys, thinkswitch_plugin.cli; print(sorted({'torch', 'transformers', 'axolotl', 'datasets'} & set(sys.modules)))"
    assert command(sys.executable, "-c", code).stdout.strip() == "[]"


def test_axolotl_finds_our_commands(command: Any) -> None:
    done = command(BIN / "axolotl", "thinkswitch", "--help")
    assert done.returncode == 0 and "rebuild" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["begin", "--domain", "arithmetik", "--runs", "{tmp}"], "There is no recipe recipes/arithmetik.yaml"),
        (["begin", "--domain", "../x", "--runs", "{tmp}"], "is not a domain name"),
        (["begin", "--domain", "arithmetic", "--runs", "{tmp}", "--engine", "gpt"], "ENGINE=gpt is unknown"),
        (["pairs", "{tmp}/none", "1"], "is not a run folder"),
        (["merge", "{tmp}/none.yaml", "{tmp}/out"], "none.yaml does not exist"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_exit_code_1(
    command: Any, tmp_path: Path, words: list[str], message: str
) -> None:
    done = command(TS, *(w.format(tmp=tmp_path) for w in words))
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_is_exit_code_2(command: Any) -> None:
    assert command(TS, "begin").returncode == 2
    assert command(TS, "control", "nonsense", "runs").returncode == 2


def test_make_names_a_wrong_domain_and_leaves_nothing(command: Any, tmp_path: Path) -> None:
    done = command("make", "iterate", "DOMAIN=arithmetics", f"RUNS={tmp_path}")
    assert done.returncode != 0 and "Did you mean arithmetic?" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_of_make_names_the_targets(command: Any) -> None:
    done = command("make", "help")
    assert done.returncode == 0
    for target in ("iterate", "setup", "eval", "report", "control", "test"):
        assert f"make {target} " in done.stdout
