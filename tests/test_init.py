"""`thinkswitch init`: what it writes is a domain that the checks take, and what it cannot use is one sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pytest
from click.testing import CliRunner, Result
from pyarrow import csv, parquet

from tests.conftest import ROOT
from thinkswitch_plugin import cli, files, recipe
from thinkswitch_plugin.data import prompts, task_files
from thinkswitch_plugin.data.answers import Votes
from thinkswitch_plugin.demo import task as demo
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.loop import check
from thinkswitch_plugin.loop.reference import require_reference

Write = Callable[[str, Sequence[object]], Path]
ROWS = [{"question": f"What is {n} times {n + 7}?", "gold": str(n * (n + 7)), "note": 1} for n in range(50)]


@pytest.fixture
def init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(cli.main, ["init", *words])


def written(rows: list[dict[str, object]], path: str) -> str:
    table = pyarrow.Table.from_pylist(rows)
    if path.endswith(".jsonl"):
        Path(path).write_bytes(b"".join(map(files.dumps_line, rows)))
    elif path.endswith(".csv"):
        csv.write_csv(table, path)
    else:
        parquet.write_table(table, path)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
@pytest.mark.parametrize("gpu", ["8gb", "24gb", "several"])
def test_what_is_written_passes_the_checks_that_need_no_model(init: Callable[..., Result], name: str, gpu: str) -> None:
    done = init("sums", "--prompts", written(ROWS, name), "--gold", "gold", "--gpu", gpu)
    assert done.exit_code == 0, done.output
    assert "thinkswitch check --domain sums\n" in done.output and "thinkswitch iterate --domain sums\n" in done.output
    made = recipe.recipe_of("sums")
    assert (made.keys.evaluation.task, made.keys.answers.kind, made.keys.prompts.count) == ("sums", "integer", 40)
    assert made.axolotl["gradient_checkpointing"] and made.keys.needs.gpu_gb == (8 if gpu == "8gb" else 24)
    assert "Please reason step by step" in check.rendered_prompts(made.keys)
    rows, requests = (8, 16) if gpu == "several" else (5, 8)
    assert made.axolotl["micro_batch_size"] * made.axolotl["gradient_accumulation_steps"] == rows
    assert made.keys.engine.concurrency == requests
    longest = 8192 if gpu == "8gb" else 32768
    assert (made.keys.sampling.max_tokens, made.keys.evaluation.max_tokens) == (longest, longest)
    assert task_files.budget("sums") == longest  # one file sets each budget: no overlay wins over it
    text = Path("recipes/sums.yaml").read_text()
    assert "    template: |-\n      {{prompt}}\n\n      Please reason" in text and "aime" not in text.partition("\n")[2]
    assert "chunked_cross_entropy: true       # the logits over" in text  # an unchanged line keeps its comment
    assert "# for 15 pairs" in text and "longer traces are cut" not in text  # a line that occurs twice keeps none
    if (name, gpu) == ("rows.jsonl", "8gb"):  # lm-eval's import
        assert check.questions(made, {}) == "sums loads, 10 questions; no training prompt is in it"


def test_letters_are_choices_and_columns_with_options_are_named_as_left_out(init: Callable[..., Result]) -> None:
    rows = [{"question": f"Which is {n}?", "A": "1", "B": "2", "gold": "AB"[n % 2]} for n in range(20)]
    done = init("letters", "--prompts", written(rows, "letters.csv"), "--gold", "gold")
    assert "letters.csv: A, B look like the options of a question and are left out" in done.output
    assert recipe.recipe_of("letters").keys.answers.kind == "choice"


def test_without_gold_answers_the_task_reports_agreement_with_a_reference(init: Callable[..., Result]) -> None:
    done = init("sums", "--prompts", written(ROWS, "rows.jsonl"), "--kind", "integer")
    assert "thinkswitch reference --domain sums\n" in done.output
    made = recipe.recipe_of("sums")
    assert task_files.measures_agreement("sums") and task_files.kind_of_task("sums") == "integer"
    questions, reference = task_files.reference_files("sums")
    assert [set(row) for _, row in files.read_jsonl(questions)] == [{"id", "prompt"}] * 10
    next_steps = [line.split()[1] for line in done.output.partition("Next:")[2].splitlines() if line]
    assert next_steps == ["check", "reference", "iterate"]
    counted: dict[str, int] = {}
    assert check.questions(made, counted).endswith("no training prompt is in it; reference answers are still missing")
    assert counted == {"sums": 10}
    asked = "655,360 for the reference answers, once (10 questions × 8 samples × 8192)"
    assert asked in check.budget(made.keys, 1, None, counted, "")
    with pytest.raises(
        ThinkSwitchError, match=r"reference.jsonl is not there yet: .* `thinkswitch reference --domain sums`"
    ):
        require_reference(made, 0)
    files.write_json(reference.with_suffix("") / "reference.json", {"thinking": "another"})
    reference.write_bytes(questions.read_bytes())
    with pytest.raises(
        ThinkSwitchError, match="holds answers of another, which is not the recipe's thinking checkpoint"
    ):
        check.questions(made, {})


def test_a_file_of_its_own_is_held_out_and_only_its_rows_need_gold_answers(init: Callable[..., Result]) -> None:
    prompts_without_gold = written([{"question": row["question"]} for row in ROWS], "rows.csv")
    own = [{"question": f"Add {n} and {n + 3}, then name the sum!", "gold": str(2 * n + 3)} for n in range(20)] + ROWS[
        :1
    ]
    words = ["--prompts", prompts_without_gold, "--held-out-file", written(own, "own.jsonl"), "--gold", "gold"]
    assert "--held-out or --held-out-file, not both" in init("sums", *words, "--held-out", "10").output
    done = init("sums", *words)
    assert done.exit_code == 0, done.output
    test = [row for _, row in files.read_jsonl(Path("recipes/sums/test.jsonl"))]
    assert [row["answer"] for row in test] == [row["gold"] for row in own]
    kept = {row["prompt"] for _, row in files.read_jsonl(Path("recipes/sums/prompts.jsonl"))}
    assert kept == {row["question"] for row in ROWS[1:]} and "(1 rows left out" in done.output
    lacking = init("less", *words[:3], written([{**own[0], "gold": ""}, *own[1:5]], "less.jsonl"), *words[4:])
    assert "less.jsonl, line 1: the field `gold` is empty; fill it." in lacking.output
    assert "few.jsonl has 3 questions" in init("few", *words[:3], written(own[:3], "few.jsonl"), *words[4:]).output


@pytest.mark.parametrize(
    ("name", "where"), [("rows.jsonl", "line 4"), ("rows.csv", "row 4"), ("rows.parquet", "row 4")]
)
@pytest.mark.parametrize("gold", ["7", 7])
def test_an_empty_gold_answer_is_named_with_what_to_do(
    init: Callable[..., Result], name: str, where: str, gold: object
) -> None:
    rows = [{"question": f"What is {n} times 7?", "gold": gold if n < 3 else None} for n in range(12)]
    done = init("sums", "--prompts", written(rows, name), "--gold", "gold")
    advice = "fill it, or put the rows that have it into a file of their own and name that file with --held-out-file."
    assert f"{name}, {where}: the field `gold` is empty; {advice}" in done.output


def test_rows_that_repeat_a_held_out_row_are_left_out_and_counted(init: Callable[..., Result]) -> None:
    done = init("twice", "--prompts", written([*ROWS, *ROWS], "rows.jsonl"))
    held = {row["prompt"] for _, row in files.read_jsonl(Path("recipes/twice/test.jsonl"))}
    kept = [row["prompt"] for _, row in files.read_jsonl(Path("recipes/twice/prompts.jsonl"))]
    left_out = 100 - 20 - len(kept)
    assert left_out > 0 and not held & set(kept) and f"({left_out} rows left out" in done.output


@pytest.mark.parametrize(
    ("rows", "words", "sentence"),
    [
        (ROWS, ["a/b"], "'a/b' is not a domain name"),
        (ROWS[:5], [], "rows.jsonl has 5 prompts; give at least 10"),
        (ROWS, ["x", "--gold", "anser"], "no column 'anser'; name one by --gold: question, gold, note."),
        (ROWS, ["x", "--column", "q"], "no column 'q'; name one by --column"),
        ([{"a": "b", "c": "d"}] * 10, [], "several columns that may hold the prompt; name one by --column: a, c."),
        (ROWS, ["x", "--gold", "gold", "--kind", "decision"], "prompt p00000: the gold answer '0' cannot be read"),
        (ROWS, ["x", "--held-out", "50"], "--held-out 50 leaves none of the 50 prompts to train on"),
        ([{"prompt": ""}] * 10, [], "rows.jsonl, line 1: the prompt is empty"),
        ([{"prompt": "the same"}] * 10, [], "every prompt repeats one that is held out"),
        ([], [], "rows.jsonl has no rows"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_and_nothing_is_written(
    init: Callable[..., Result], rows: list[dict[str, object]], words: list[str], sentence: str
) -> None:
    Path("rows.jsonl").write_bytes(b"".join(map(files.dumps_line, rows)))
    done = init(*words, "--prompts", "rows.jsonl")
    assert done.exit_code == 1 and sentence in done.output and len(done.output.splitlines()) == 1
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]


def test_a_file_that_is_not_there_and_a_domain_that_is_are_refused(init: Callable[..., Result]) -> None:
    assert "none.jsonl does not exist" in init("x", "--prompts", "none.jsonl").output
    assert init("sums", "--prompts", written(ROWS, "rows.jsonl")).exit_code == 0
    assert "recipes/sums.yaml exists already" in init("sums", "--prompts", "rows.jsonl").output
    Path("recipes/sums/prompts.jsonl").unlink()
    with pytest.raises(ThinkSwitchError, match=r"recipes/sums/prompts.jsonl does not exist"):
        check.rendered_prompts(recipe.recipe_of("sums").keys)
    own, made = (recipe.recipe_of(name).keys for name in ("template", "arithmetic"))
    assert prompts.made_with_pair(made) and not prompts.made_with_pair(
        own
    )  # `check` reads the user's own prompts of a demo pair too


def test_a_vote_over_free_text_is_refused_and_over_answers_is_not() -> None:
    free, short = Votes(), Votes()
    for place in range(4):
        free.count([f"Because of {place}.", f"Since {place}.", None])
        short.count([str(place), str(place), "7"])
    with pytest.raises(ThinkSwitchError, match=r"In 4 votes .* no two were alike, so these answers are free text"):
        free.require_agreement("exact", "set `thinkswitch.answers.selection: first`")
    assert free.free_text("exact") and not free.free_text("integer") and not short.free_text("exact")
    free.require_agreement("integer", "")
    short.require_agreement("exact", "")


@pytest.mark.slow
def test_the_reference_is_the_majority_of_a_real_thinking_checkpoint(
    init: Callable[..., Result], finished_run: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n % 10}+{n * 7 % 10}-{n // 10}"} for n in range(20)]
    assert init("sums", "--prompts", written(rows, "rows.jsonl"), "--kind", "digit").exit_code == 0
    pair = files.read_json(finished_run / "iter-0" / "pair.json")
    overlay = {
        "needs": {"gpu_gb": 0},
        "pair": {mode: str(ROOT / pair[mode]["path"]) for mode in ("instruct", "thinking")},
        "sampling": {"temperature": 0, "max_tokens": 64},
    }
    files.write_yaml(tmp_path / "tiny.yaml", {"thinkswitch": overlay})
    words = ["reference", "--domain", "sums", "--overlay", "tiny.yaml", "--engine", "embedded"]
    done = CliRunner().invoke(cli.main, words)
    assert done.exit_code == 0 and "to 4 questions\n" in done.output, done.output
    for _, row in files.read_jsonl(Path("recipes/sums/reference.jsonl")):
        assert row["answer"] == demo.answer(row["prompt"]) and (row["votes"], row["samples"]) == (1, 1)
    assert check.questions(recipe.recipe_of("sums", ["tiny.yaml"]), {}).startswith("sums loads, 4 questions")
    loaded = task_files.load("sums")["sums"]
    graded = loaded.process_results(loaded.eval_docs[0], [f"<think>\nx\n</think>\n\n{loaded.eval_docs[0]['answer']}"])
    assert graded == {"agreement": 1.0, "think_ratio": [1, 1], "answered": 1.0}
