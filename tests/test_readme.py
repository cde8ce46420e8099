"""The promises of the documents: a test runs every command of the first two pages that needs no GPU, and links resolve."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDS_A_GPU = "On a GPU"  # the section whose commands do
FIRST_PAGES = ("README.md", "docs/getting-started.md")
PAGES = sorted(
    str(p.relative_to(ROOT)) for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md"))
)
# What runs a command of the first pages: a test or fixture that starts it, at a small size if the real one takes long.
RUN_BY = {
    "make iterate": "conftest.py::finished_run",
    "make test": ".ci/run",
    "make iterate DOMAIN=words ITERATIONS=1": (
        "test_words.py::test_the_whole_loop_takes_bfloat16_a_bpe_tokenizer_and_tags_of_ordinary_tokens"
    ),
    "make status": "test_status.py::test_make_status_says_how_to_begin_and_exits_0",
    "make compare QUESTION='7*3+4*2'": "test_compare.py::test_the_embedded_pair_side_by_side",
    "make verify": "test_resume.py::test_a_finished_run_verifies_and_its_cards_say_where_it_comes_from",
    "thinkswitch init mine --prompts questions.csv --gold answer --gpu 24gb": (
        "test_init.py::test_what_is_written_passes_the_checks_that_need_no_model"
    ),
    "make sweep ITERATION=1": "test_sweep.py::swept",
    "make ablate ITERATION=1": "test_sweep.py::test_layers_modules_and_baselines_by_make",
    "make baselines ITERATION=1": "test_sweep.py::test_layers_modules_and_baselines_by_make",
    "make similarity FIRST=instruct SECOND=thinking": "test_readme.py::test_similarity_by_make",
    "make switch ITERATION=2": "test_switch.py::switched",
    "thinkswitch answer runs/arithmetic '7*3+4*2'": "test_switch.py::test_one_question_and_many_in_process",
    "make adaptive": "test_adaptive.py::small",
    "pip install .": "test_wheel.py::installed",
    "thinkswitch recipes": "test_wheel.py::test_the_wheel_names_every_file_recipe_merge_config_and_task_of_the_checkout",
    "thinkswitch iterate --domain arithmetic": "test_wheel.py::test_iterate_runs_from_an_empty_folder_and_names_what_was_typed",
    "axolotl train recipe.yaml": "test_loop.py::test_plain_axolotl_trains_an_iterations_config_to_the_same_adapter",
    "thinkswitch merge merge_configs/thinkswitch.yaml out": "test_readme.py::test_merge_as_readme_says_it",
    "lm_eval --tasks thinkswitch_aime --model hf --model_args pretrained=out --apply_chat_template": (
        "test_real_domains.py::test_k_samples_are_different_samples_with_hf"
    ),
    "thinkswitch score --task aime outputs.jsonl": "test_score.py::test_rows_of_every_format_are_judged_in_order",
}


def commands(text: str) -> list[tuple[str, str]]:
    """(section, command without its comment) of every line of a shell block."""
    found = []
    section, inside = "", False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = line == "```sh" and not inside
        elif line.startswith("## ") and not inside:
            section = line.lstrip("# ")
        elif inside and line.strip() and not line.startswith("#"):
            found.append((section, line.partition("  #")[0].strip()))
    return found


def on_the_first_pages() -> list[tuple[str, str]]:
    return [each for page in FIRST_PAGES for each in commands((ROOT / page).read_text(encoding="utf-8"))]


def test_every_command_of_the_first_pages_is_run_by_a_test_or_needs_a_gpu() -> None:
    assert {command for section, command in on_the_first_pages() if section != NEEDS_A_GPU} == set(RUN_BY)
    for runner in RUN_BY.values():
        file, _, name = runner.partition("::")
        text = (ROOT / file if file.startswith(".") else ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"def {name}(" in text if name else "make test" in text, runner


def test_what_needs_a_gpu_can_at_least_be_planned(command: Any) -> None:
    words = [shlex.split(line) for section, line in on_the_first_pages() if section == NEEDS_A_GPU]
    assert len(words) >= 4
    for line in words:
        done = command(line[0], "-n", *line[1:])
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", PAGES)
def test_links_and_pictures_lead_somewhere(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert ((ROOT / path).parent / target).exists(), target


def test_targets_named_in_the_documents_exist() -> None:
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:`|^)make ([a-z][a-z-]+)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= rules, (page, named - rules)


@pytest.mark.parametrize("path", PAGES)
def test_source_files_named_in_the_documents_exist(path: str) -> None:
    named = re.findall(r"`([a-z_]+(?:/[a-z_]+)*/[a-z_]+\.py)`", (ROOT / path).read_text(encoding="utf-8"))
    assert [n for n in named if not any((room / n).is_file() for room in (ROOT, ROOT / "thinkswitch_plugin"))] == []


@pytest.mark.slow
def test_similarity_by_make(finished_run: Path, make: Any, tmp_path: Path) -> None:
    pair = [f"{letter}={finished_run / 'iter-1' / mode}" for letter, mode in (("A", "instruct"), ("B", "thinking"))]
    done = make("similarity", *pair, f"OUT={tmp_path}")
    assert done.returncode == 0 and "σ" in done.stdout, done.stderr
    assert (tmp_path / "similarity.png").stat().st_size > 10_000


@pytest.mark.slow
def test_merge_as_readme_says_it(finished_run: Path, forked: Any, tmp_path: Path) -> None:
    for mode in ("instruct", "thinking"):
        (tmp_path / mode).symlink_to(finished_run / "iter-1" / mode)
    config = ROOT / "merge_configs" / "thinkswitch.yaml"
    done = forked(ROOT / ".venv/bin/thinkswitch", "merge", config, "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_every_thinkswitch_command_of_the_examples_exists_with_its_options() -> None:
    from thinkswitch_plugin.cli import main

    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("examples/*.md")))
    typed = [line.split() for _, line in commands(text) if line.startswith("thinkswitch ")]
    assert len(typed) >= 6
    for _, name, *words in typed:
        known = {option for parameter in main.commands[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, name
