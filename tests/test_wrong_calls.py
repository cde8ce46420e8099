"""Calls as people mistype them: each is answered in one sentence that names what was typed and what to type."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.conftest import ROOT
from thinkswitch_plugin import cli
from thinkswitch_plugin.cli.group import as_typed
from thinkswitch_plugin.errors import not_fetched


@pytest.mark.parametrize(
    ("typed", "code", "sentence"),
    [
        ("iterat --domain aime", 2, "There is no command iterat. Did you mean iterate?"),
        ("iterate --domian aime", 2, "No such option '--domian'. Did you mean '--domain'?"),
        ("iterate --iterations two", 2, "Invalid value for '--iterations': 'two' is not a valid integer"),
        ("begin --domain arithmatic --runs runs", 1, "for --domain arithmatic; recipes here: aime, arithmetic,"),
        ("begin --domain arithmetic --runs runs --engine gpt", 1, "--engine gpt is unknown; use auto, vllm, embedded"),
        (
            "begin --domain aime --runs runs --overlay 42gb",
            1,
            "--overlay 42gb: recipes/42gb.overlay.yaml does not exist",
        ),
        ("sweep --domain arithmetic --instruct instruct", 1, "instruct means a checkpoint of the run runs/arithmetic"),
        ("similarity instruct-0 thinking", 1, "instruct-0 means a checkpoint of the run runs/arithmetic"),
        ("compare runs/arithmetic --question 1+2", 1, "run `thinkswitch iterate --domain arithmetic` first"),
        ("eval-model --domain arithmetic --model ./nowhere", 1, "checkpoint ./nowhere is not a checkpoint folder"),
        ("status runs/arithmatic", 1, "There is no recipe recipes/arithmatic.yaml"),
        ("verify runs/none", 1, "runs/none is not a run folder (no run.json); begin one with"),
        ("answer runs/arithmetic", 2, "give one question, or many by --file"),
        ("init mine --prompts none.csv", 1, "none.csv does not exist"),
        ("reference --domain arithmetic", 1, "the task thinkswitch_arithmetic has gold answers and needs no reference"),
    ],
)
def test_a_wrong_call_is_answered_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, code: int, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MAKELEVEL", raising=False)
    done = CliRunner().invoke(cli.main, typed.split())
    assert done.exit_code == code and sentence in " ".join(done.output.split()), done.output
    (line,) = [line for line in done.output.splitlines() if not line.startswith(("Usage:", "Try ", "\n")) and line]
    assert "Traceback" not in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("iterate DOMIAN=aime", "DOMIAN= is not a setting; did you mean DOMAIN=?"),
        ("eval", "MODEL= is missing; name a checkpoint: make eval MODEL=folder DOMAIN=arithmetic"),
        ("iterate ITERATIONS=two", "ITERATIONS=two is not a whole number"),
    ],
)
def test_a_wrong_make_call_is_answered_in_one_sentence(
    command: Callable[..., subprocess.CompletedProcess[str]], typed: str, sentence: str
) -> None:
    done = command("make", *typed.split(), cwd=ROOT)
    assert done.returncode == 2 and sentence in done.stderr and len(done.stderr.splitlines()) == 1


def test_sentences_use_the_words_of_the_command_that_was_typed() -> None:
    assert (
        as_typed("run `make sweep DOMAIN=aime ITERATION=1`.") == "run `thinkswitch sweep --domain aime --iteration 1`."
    )
    assert as_typed("`make status DOMAIN=aime`") == "`thinkswitch status runs/aime`"
    assert as_typed("use INSTRUCT=<instruct>, RUNS=, SEED=0") == "use --instruct <instruct>, --runs, --seed 0"
    assert (
        as_typed("`make switch DOMAIN=aime ITERATION=2`, `make pair`")
        == "`thinkswitch switch runs/aime 2`, `make pair`"
    )
    assert as_typed("run `make setup`.") == "run `make setup`."


def test_a_hub_that_cannot_be_reached_is_said_so() -> None:
    error = RuntimeError("Cannot send a request, as the client has been closed.")
    assert str(not_fetched("The checkpoint x", error)).startswith(
        "The checkpoint x cannot be downloaded from the hub: the hub cannot be reached;"
    )


@pytest.mark.parametrize(
    ("typed", "code", "now"),
    [
        ("judge-merges --domain arithmetic", 2, "Did you mean eval-merges?"),
        ("sweep --domain arithmetic --template thinking", 2, "No such option --template; use --mode."),
        ("labels --domain arithmetic --baselines post", 2, "--baselines; use --formats."),
        ("sweep --price 2", 2, "No such option '--price'"),
        ("status runs/arithmetic --price 2", 2, "--price; use --price-per-hour."),
        ("answer --pair runs/arithmetic 1+2", 2, "--pair; use the argument RUN."),
        ("score --answer integer rows.jsonl", 2, "--answer; use --kind."),
    ],
)
def test_a_name_that_was_changed_is_refused_with_the_one_it_has_now(typed: str, code: int, now: str) -> None:
    done = CliRunner().invoke(cli.main, typed.split())
    assert done.exit_code == code and now in done.output, done.output


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("labels BASELINES=post", "BASELINES= is not a setting; it is called FORMATS= now"),
        ("iterate ITER=3", "ITERATION= selects one iteration of a run; the number of iterations is ITERATIONS="),
        ("iterate ITERATION=3", "ITERATION= selects one iteration of a run; the number of iterations is ITERATIONS="),
    ],
)
def test_a_setting_that_was_renamed_or_taken_for_another_is_refused(
    command: Callable[..., subprocess.CompletedProcess[str]], typed: str, sentence: str
) -> None:
    done = command("make", "-n", *typed.split(), cwd=ROOT)
    assert done.returncode == 2 and sentence in done.stderr and len(done.stderr.splitlines()) == 1
