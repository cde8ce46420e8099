"""The promises of the documents: a test runs every command of the first two pages that needs no GPU, and links resolve."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import dropwhile
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

# What runs a command of the other pages, whatever its options.
RUN_AT_ALL = {
    "make setup": ".ci/run",  # `make test` needs these four
    "make setup-vllm": ".ci/run",
    "make setup-gguf": ".ci/run",
    "make lint": ".ci/run",
    "make labels": "test_labels.py::labelled",
    "make export-loras": "conftest.py::exported",
    "make serve": "test_vllm.py::both",
    "make push": "test_push.py::test_a_killed_push_continues_and_sends_nothing_twice",
    "make export-gguf": "test_gguf.py::test_a_gguf_loads_and_answers_as_its_checkpoint",
    "make rehearse": "test_rehearse.py::test_a_rehearsal_runs_every_stage_and_check_learns_from_it",
    "make chaos": "test_resume.py::test_a_kill_of_every_kind_changes_nothing",
    "make gpu-check": "test_gpu_check.py::test_the_tiny_check_prints_a_table_and_the_same_as_json",
    "thinkswitch eval-merges": "test_sweep.py::test_layers_modules_and_baselines_by_make",
    "thinkswitch export-gguf": "test_gguf.py::options",
    "thinkswitch serve-lambda": "test_live.py::test_lambda_is_moved_from_another_process_by_what_its_user_alone_can_read",
    "thinkswitch judge": "test_pairwise.py::judge",
    "make check": "test_cli.py::test_check_finds_the_embedded_domains_ready",
    "thinkswitch reference": "test_init.py::test_the_reference_is_the_majority_of_a_real_thinking_checkpoint",
    "python": "test_conventions.py::test_the_document_holds_the_table",  # `-c` and `-m pytest` in CONTRIBUTING.md
    "python3": "test_gpu_check.py::test_the_tiny_check_prints_a_table_and_the_same_as_json",
    "ray": "test_cluster.py::nodes",
    "vllm": "test_vllm.py::test_a_vllm_of_the_users_own_gives_the_embedded_engines_pairs_whoever_opens_the_trace",
    "curl": "test_vllm.py::test_the_requests_of_the_documentation",
}
# Commands that no test runs, and why.
NOT_RUN = {
    "make test-fast": "a part of `make test`",
    "make pair": "the first stage of `make iterate`",
    "make models": "takes hours; test_models.py tests a few architectures",
    "make losses": "takes most of an hour; test_losses.py and test_on_policy.py test its parts",
    "make results": "needs the runs of several seeds",
    "hf": "needs the hub",
    "ollama": "needs Ollama",
    "ssh": "needs another machine",
    "pre-commit": "a git hook for contributors",
    "export": "a secret of the user",
    "srun": "needs Slurm",
    **dict.fromkeys((".", "cp", "less", "tmux"), "of the shell"),
}


def commands(text: str) -> list[tuple[str, str]]:
    """(section, command without its comment) of every command in a shell block; it may go over several lines."""
    found = []
    section, inside, begun = "", False, ""
    for line in text.splitlines():
        if line.startswith("```"):
            inside = line == "```sh" and not inside
        elif line.startswith("## ") and not inside:
            section = line.lstrip("# ")
        elif inside and line.strip() and not line.startswith("#"):
            begun += line.partition("  #")[0].strip()
            if begun.endswith("\\") or begun.count("'") % 2:
                begun = begun.removesuffix("\\") + " "
            else:
                found.append((section, begun))
                begun = ""
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


def of_every_page() -> Iterator[list[str]]:
    """The words of every command that a page shows; programs without their folder, and without what the shell reads."""
    for page in PAGES:
        for _, typed in commands((ROOT / page).read_text(encoding="utf-8")):
            lexer = shlex.shlex(typed, posix=True, punctuation_chars=";&<>")
            lexer.whitespace_split, lexer.commenters = True, ""
            words = re.split(r"\0(?:;|&&)\0", "\0".join(lexer))
            for command in words:
                typed_words = re.split(r"\0[<>]\0", command)[0].split("\0")
                program, *rest = dropwhile(lambda word: re.match(r"[A-Z_]+=", word), typed_words)
                yield [program.rpartition("/")[2] or program, *rest]


def named(words: list[str]) -> str:
    """Which command it is: its program, with the target of Make or the command of ours."""
    return " ".join(words[:2]) if words[0] in ("make", "thinkswitch") else words[0]


def test_every_command_of_every_page_is_run_by_a_test_or_needs_what_no_test_has() -> None:
    known = {named(shlex.split(line)) for line in RUN_BY} | set(RUN_AT_ALL)
    known |= {name.replace("make ", "thinkswitch ") for name in known}  # a target runs the command of its name
    assert {named(words) for words in of_every_page()} - known == set(NOT_RUN)
    for runner in RUN_AT_ALL.values():
        file, _, name = runner.partition("::")
        assert not name or f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), runner


def test_every_thinkswitch_command_of_every_page_is_read_by_its_command() -> None:
    from thinkswitch_plugin.cli import main

    typed = [words[1:] for words in of_every_page() if words[0] == "thinkswitch"]
    assert len(typed) >= 40
    for name, *words in typed:
        main.commands[name].make_context(name, words)  # raises if an option is unknown, or a value cannot be read
