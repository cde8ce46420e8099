from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BIN, ROOT
from thinkswitch_plugin.environment import has_cuda
from thinkswitch_plugin.errors import with_next_command

TS = BIN / "thinkswitch"


def test_help_lists_every_stage_and_imports_nothing_heavy(command: Any) -> None:
    done = command(TS, "--help")
    assert done.returncode == 0
    for name in ("begin", "pair", "requests", "generate", "pairs", "train", "merge-lora", "rebuild", "eval", "report"):
        assert f"\n  {name} " in done.stdout
    code = "import sys, thinkswitch_plugin.cli; print(sorted({'torch', 'transformers', 'axolotl', 'datasets'} & set(sys.modules)))"
    assert command(sys.executable, "-c", code).stdout.strip() == "[]"


@pytest.mark.slow
def test_axolotl_finds_our_commands(command: Any) -> None:
    done = command(BIN / "axolotl", "thinkswitch", "--help")
    assert done.returncode == 0 and "rebuild" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["begin", "--domain", "arithmetik", "--runs", "{tmp}"], "There is no recipe recipes/arithmetik.yaml"),
        (["begin", "--domain", "../x", "--runs", "{tmp}"], "is not a domain name"),
        (["begin", "--domain", "arithmetic", "--runs", "{tmp}", "--engine", "gpt"], "--engine gpt is unknown"),
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
    assert command(BIN / "python", "-m", "experiments", "control", "nonsense", "runs").returncode == 2


def test_make_names_a_wrong_domain_and_leaves_nothing(command: Any, tmp_path: Path) -> None:
    done = command("make", "iterate", "DOMAIN=arithmetics", f"RUNS={tmp_path}")
    assert done.returncode != 0 and "Did you mean arithmetic?" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_of_make_groups_all_targets_by_what_one_wants_to_do(command: Any) -> None:
    done = command("make", "help")
    assert done.returncode == 0
    groups = {block.splitlines()[0]: block for block in done.stdout.strip().split("\n\n")}
    for group, targets in {
        "Run": ("iterate", "check", "pair", "clean-run"),
        "Look": ("status", "report", "compare", "eval"),
        "Tune λ, the weight of the thinking checkpoint": ("sweep", "ablate", "baselines", "similarity"),
        "Prove": ("verify", "control", "chaos", "lint", "test-fast", "test"),
        "Set up": ("setup", "setup-vllm", "help"),
    }.items():
        for target in targets:
            assert f"\n  make {target} " in groups[group], (group, target)
    described = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
    assert [name for name in described if f"\n  make {name} " not in done.stdout] == []


@pytest.mark.parametrize(
    ("sentence", "printed"),
    [
        (
            "ENGINE=x is unknown; use auto.",
            "ENGINE=x is unknown; use auto. Fix this, then run the same command again.",
        ),
        ("There is no run; begin one with `make iterate`.", "There is no run; begin one with `make iterate`."),
        ("Make room and run the same command again.", "Make room and run the same command again."),
        (
            "axolotl train failed; the end of train.log:\n    run the same command again",
            "axolotl train failed; the end of train.log:\n    run the same command again\n"
            "Fix this, then run the same command again.",
        ),
    ],
)
def test_every_error_ends_with_the_next_command(sentence: str, printed: str) -> None:
    assert with_next_command(sentence) == printed


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            "ModuleNotFoundError(name='mergekit.merge')",
            "mergekit is not installed here; in a clone of the project `make setup`",
        ),
        ("torch.OutOfMemoryError('CUDA out of memory')", "the model and its working memory do not fit on the GPU"),
    ],
)
def test_what_an_engine_lacks_is_one_sentence(error: str, sentence: str) -> None:
    code = (
        "import torch; from thinkswitch_plugin import cli\n@cli.main.command('work')\ndef work() -> None:\n"
        f"    raise {error}\ncli.main(['work'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"thinkswitch: {sentence}")
    assert len(done.stderr.splitlines()) == 1 and "run the same command again" in done.stderr


@pytest.mark.skipif(has_cuda(), reason="this machine has a GPU")
def test_a_gpu_recipe_without_a_gpu_says_what_is_missing_and_what_would_run(command: Any, tmp_path: Path) -> None:
    done = command("make", "iterate", "DOMAIN=aime", f"RUNS={tmp_path}")
    assert done.returncode != 0 and list(tmp_path.iterdir()) == []
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("thinkswitch: ")]
    assert "needs a CUDA GPU with 8 GB" in sentence and "make iterate DOMAIN=arithmetic" in sentence


@pytest.mark.slow
@pytest.mark.skipif(has_cuda(), reason="this machine has a GPU")
def test_check_goes_through_everything_and_counts_what_would_stop_the_run(forked: Any) -> None:
    done = forked(TS, "check", "--domain", "aime", "--tokens-per-second", "1000", PRICE_PER_HOUR="0.36")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith(("  ok", "  STOP"))] == [
        "GPU:",
        "memory:",
        "disk:",
        "engine:",
        "recipe:",
        "processes:",
        "pair:",
        "training:",
        "prompts:",
        "questions:",
        "budget:",
        "stages:",
    ]
    assert "  ok    recipe: recipes/aime.yaml passes axolotl's schema" in lines
    assert "983,040 for the pairs (15 prompts × 4 samples × 8192, each iteration)" in done.stdout
    assert "327,680 for trying λ once an iteration" in done.stdout
    total = next(int(line.split()[4].replace(",", "")) for line in lines if line.startswith("  ok    budget: at most"))
    assert total in (1_310_720, 1_310_720 + 6 * 30 * 8192)  # with the questions, where the hub answers
    hours = total / 1000 / 3600
    assert f"{hours:.1f} h at 1000 tokens/s (as you gave it), {0.36 * hours:.2f} at 0.36 an hour" in done.stdout
    assert "checks would stop `thinkswitch iterate --domain aime`" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("domain", ["arithmetic", "arithmetic-mixed"])
def test_check_finds_the_embedded_domains_ready(forked: Any, domain: str) -> None:
    done = forked(TS, "check", "--domain", domain, ENGINE="embedded")
    assert done.returncode == 0 and f"Ready: make iterate DOMAIN={domain}\n" in done.stdout
