"""Hostile settings, names and files: they run nothing, write nothing outside the run folder, and no secret is repeated."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from thinkswitch_plugin import recipe
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.engines.connection import LOOPBACK
from thinkswitch_plugin.engines.servers import vllm_command
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run import checkpoint


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("RUNS=$(shell touch {mark})", "RUNS= holds a dollar sign"),
        ("LAMBDAS=$(shell touch {mark})", "LAMBDAS= holds a dollar sign"),
        ("RUN_FOLDERS=`touch {mark}` $(shell touch {mark})", "RUN_FOLDERS= holds a dollar sign"),
        ("DOMAIN=x;touch {mark}", "holds ;"),
        ("RUNS=a:b", "holds :"),
        ("RUNS=a`touch {mark}`", "holds `"),
        ("RUNS=a b", "holds a space"),
        ("ITERATIONS=two", "ITERATIONS=two is not a whole number"),
        ("RUNS=a#b", "holds #"),
        ("DOMAIN=../../elsewhere", "DOMAIN= is a name, not a path"),
        ("DOMAIN=..", "DOMAIN= is a name, not a path"),
        ("RUNS=", "RUNS= is empty"),
    ],
)
def test_a_setting_that_make_or_a_shell_would_act_on_is_refused(
    command: Any, tmp_path: Path, setting: str, says: str
) -> None:
    mark = tmp_path / "mark"
    done = command("make", "--dry-run", "clean-run", setting.format(mark=mark))
    assert done.returncode != 0 and says in done.stderr
    name, _, value = setting.format(mark=mark).partition("=")
    if value:
        assert command("make", "--dry-run", "clean-run", **{name: value}).returncode != 0  # by the environment too
    assert not mark.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["iterate", "DOMIAN=aime"], "DOMIAN= is not a setting; did you mean DOMAIN=?"),
        (["sweep", "LAMDAS=0 0.5 1"], "LAMDAS= is not a setting; did you mean LAMBDAS=?"),
        (["eval"], "MODEL= is missing; name a checkpoint: make eval MODEL=folder"),
    ],
)
def test_a_misspelt_or_missing_setting_is_refused_before_anything_runs(
    command: Any, words: list[str], says: str
) -> None:
    done = command("make", "--dry-run", *words)
    assert done.returncode == 2 and says in done.stderr and not done.stdout


def test_every_setting_that_the_documents_and_the_makefile_name_is_known(command: Any) -> None:
    text = "\n".join(path.read_text() for path in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), ROOT / "Makefile"))
    lines = re.findall(r"make (?:-n )?[a-z][a-z-]*((?: [A-Z_]+=\S*)+)", text)
    names = {name for line in lines for name in re.findall(r" ([A-Z_]+)=", line)}
    assert {"DOMAIN", "COLUMNS", "TASK", "LAMBDA"} <= names
    done = command("make", "--dry-run", "help", *(f"{name}=1" for name in sorted(names)))
    assert done.returncode == 0, done.stderr


def test_a_setting_of_make_has_the_name_of_the_option_that_it_becomes() -> None:
    from experiments.__main__ import main as experiments
    from thinkswitch_plugin.cli import main

    (listed,) = re.findall(
        r"foreach name,([A-Z_ \\\n\t]+),\$\(eval export THINKSWITCH_", (ROOT / "Makefile").read_text()
    )
    commands = (main, *main.commands.values(), *experiments.commands.values())
    options = {str(option.name).upper() for command in commands for option in command.params}
    assert set(listed.replace("\\", " ").split()) <= options


def test_short_forms_stand_for_their_settings(command: Any) -> None:
    show = ("make", "-pn", "sweep", "ITER=2", "K=8", "A=one#(1)", "B=two", "SECOND=three")
    found = command(*show).stdout
    names = {
        "ITERATION": "2",
        "SAMPLES": "8",
        "INSTRUCT": "one#(1)",
        "THINKING": "two",
        "FIRST": "one#(1)",
        "SECOND": "three",
    }
    for name, value in names.items():
        assert f"\n{name} := {value.replace('#', chr(92) + '#')}\n" in found or f"\n{name} := {value}\n" in found, name


def test_settings_of_the_engines_and_questions_with_an_equals_sign_pass(command: Any) -> None:
    done = command("make", "--dry-run", "compare", "QUESTION=is a=b and c=d?", "OMP_NUM_THREADS=1", "HF_TOKEN=x")
    assert done.returncode == 0, done.stderr


def test_what_the_makefile_lets_through_is_never_run(command: Any, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    hostile = f'"; touch {mark}; echo "`touch {mark}`'
    shown = command("make", "help", f"ENGINE={hostile}", f"OVERLAY={hostile}")
    assert shown.returncode == 0 and hostile in shown.stdout
    assert f"touch {mark}" not in command("make", "--dry-run", "results", f"RUN_FOLDERS={hostile}").stdout
    assert not mark.exists()


def test_no_recipe_of_a_setting_is_put_into_a_command_line() -> None:
    rules = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("\t")]
    settings = re.findall(r"\w+", re.search(r"^SETTINGS := ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.M)[1])  # type: ignore[index]
    assert {"DOMAIN", "RUNS", "MODEL", "RUN_FOLDERS"} <= set(settings)
    for line in rules:
        assert not re.search(rf"(?<!\$)\$\((?:{'|'.join([*settings, 'RUN'])})\)", line), line


@pytest.mark.parametrize(
    "text",
    [
        "trust_remote_code: true",
        'trust_remote_code: "yes"',
        "trust_remote_code_for_this: 1",
        "datasets: [{path: x, trust_remote_code: true}]",
        "thinkswitch: {engine: {vllm_args: [--trust-remote-code]}}",
        "thinkswitch: {axolotl_args: [--trust_remote_code=true]}",
        "thinkswitch: {engine: {vllm_args: [--trust-rem]}}",
        "thinkswitch: {engine: {vllm_args: [--trust_remote=true]}}",
    ],
)
def test_no_file_switches_on_code_of_a_model(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ThinkSwitchError, match=r"trust_remote_code|\[0\]") as refused:
        recipe.load_recipe(path)
    assert "would run code that comes with a model" in str(refused.value)


def test_trust_that_is_switched_off_is_no_offence(tmp_path: Path) -> None:
    assert recipe.trusted_code({"trust_remote_code": False, "note": "none", "a": ["--trace", "--t"]}, "x") is None


def test_pickled_weights_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ThinkSwitchError, match="pickled weights can run code"):
        checkpoint.resolve(str(tmp_path), None, "instruct")


def test_servers_of_ours_listen_on_the_loopback_interface_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinkswitch_plugin.engines.servers.vllm_python", lambda: Path(sys.executable))
    command = vllm_command("m", 1234, EngineKeys(), None)  # type: ignore[call-arg]
    assert LOOPBACK == "127.0.0.1" and command[command.index("--host") + 1] == LOOPBACK


def test_no_source_of_ours_loads_yaml_unsafely_unpickles_or_calls_a_shell() -> None:
    forbidden = re.compile(
        r"yaml\.(?:load|full_load|unsafe_load)\(|torch\.load\(|pickle|shell=True|os\.system|trust_remote_code=True"
        r"|trust_remote_code\W+true"
    )
    for folder in ("thinkswitch_plugin", "lm_eval_tasks", "recipes", "merge_configs"):
        for path in (p for suffix in ("py", "yaml") for p in (ROOT / folder).rglob(f"*.{suffix}")):
            found = [line for line in path.read_text().splitlines() if forbidden.search(line)]
            found = [line for line in found if "--lazy-unpickle" not in line and "would be further options" not in line]
            found = [line for line in found if "Loader=_AnyTag" not in line]  # a SafeLoader that calls nothing
            assert not [line for line in found if "pickled weights can run code" not in line], (path, found)


def test_commands_fetch_no_kernels_unless_asked(command: Any) -> None:
    code = (
        "import os; from thinkswitch_plugin.console import fetch_no_code; fetch_no_code();"
        "print(os.environ['USE_HUB_KERNELS'], os.environ['LOCAL_KERNELS'])"
    )
    clean = dict.fromkeys((), "")
    assert command(sys.executable, "-c", code, **clean).stdout.startswith("NO kernels-community/")
    assert command(sys.executable, "-c", code, USE_HUB_KERNELS="YES").stdout.startswith("YES ")
    assert "fetch_no_code()" in (ROOT / "thinkswitch_plugin" / "cli" / "group.py").read_text()


def test_a_secret_in_the_environment_is_in_no_output(command: Any, tmp_path: Path) -> None:
    secrets = {"OPENAI_API_KEY": "sk-pa55word", "HF_TOKEN": "hf_pa55word"}
    for engine in ("http://127.0.0.1:9/v1", "http://me:pa55word@127.0.0.1/v1"):
        words = ("begin", "--domain", "aime", "--runs", tmp_path, "--engine", engine)
        done = command(sys.executable, "-m", "thinkswitch_plugin.cli", *words, **secrets)
        assert done.returncode == 1 and "pa55word" not in done.stdout + done.stderr
    written = [p for p in tmp_path.rglob("*") if p.is_file() and b"pa55word" in p.read_bytes()]
    assert written == [] and os.environ.get("HF_TOKEN") != "hf_pa55word"
