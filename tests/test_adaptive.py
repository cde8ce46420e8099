"""The adaptive experiment: the training data of each condition, the table, and one small complete run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from experiments import __main__ as commands
from experiments import adaptive as experiment
from experiments import adaptive_results
from experiments import adaptive_scoring as scoring
from tests.conftest import BIN, Command
from thinkswitch_plugin import files
from thinkswitch_plugin.args import PerceptionKeys
from thinkswitch_plugin.data.formats import POST, PRE, Format
from thinkswitch_plugin.demo.tokenizer import build_tokenizer
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.figures import bootstrapped

LABELS: dict[str, Format] = {f"p{i}": POST if i % 4 else PRE for i in range(40)}


def condition(correct: Any, tokens: Any, think: Any) -> adaptive_results.Condition:
    return adaptive_results.Condition(
        *(np.atleast_2d(np.asarray(part, dtype=float)) for part in (correct, tokens, think))
    )


def test_every_condition_differs_from_the_adaptive_one_in_one_thing() -> None:
    keys = PerceptionKeys()
    found = experiment.plans(keys)
    main = found["adaptive"]
    assert (main.data, main.perception) == ("labels", keys)
    assert found["no_prompt"] == experiment.Plan("labels", None)
    assert found["random_mixture"] == experiment.Plan("random", keys)
    for name, change in (("static_prompt", "static"), ("no_words", "features"), ("no_attention", "cross_attention")):
        perception = found[name].perception
        assert found[name].data == "labels" and perception is not None
        differing = {k for k, v in perception.model_dump().items() if v != keys.model_dump()[k]}
        assert differing == {change}


def test_a_module_without_features_or_attention_has_fewer_controls() -> None:
    assert "no_words" not in experiment.plans(PerceptionKeys(features=[]))
    assert (
        experiment.plans(PerceptionKeys(static=True)).keys().isdisjoint({"static_prompt", "no_words", "no_attention"})
    )


def test_the_random_mixture_keeps_the_share_and_hands_the_labels_to_other_questions() -> None:
    plan = experiment.Plan("random", None)
    forms = experiment.forms_of(plan, LABELS, seed=1)
    assert sorted(forms.values()) == sorted(LABELS.values()) and forms.keys() == LABELS.keys()
    assert forms != LABELS and forms == experiment.forms_of(plan, LABELS, seed=1)
    assert forms != experiment.forms_of(plan, LABELS, seed=2)
    assert set(experiment.forms_of(experiment.Plan("pre", None), LABELS, seed=1).values()) == {PRE}


def test_each_row_goes_into_the_file_of_its_format(tmp_path: Path) -> None:
    rows = [{"prompt_id": name, "trace": "t"} for name in [*LABELS, "unlabelled"]]
    (tmp_path / "post.jsonl").write_text("of an earlier try")
    parts = experiment.write_parts(rows, LABELS, tmp_path)
    assert [(path.name, kind) for path, kind in parts] == [
        ("pre.jsonl", "thinkswitch_plugin.pre_thinking"),
        ("post.jsonl", "thinkswitch_plugin.post_thinking"),
    ]
    held = {path.stem: [row["prompt_id"] for _, row in files.read_jsonl(path)] for path, _ in parts}
    assert held == {form: [name for name, label in LABELS.items() if label == form] for form in (PRE, POST)}
    only = experiment.write_parts(rows, dict.fromkeys(LABELS, PRE), tmp_path)
    assert [path.name for path, _ in only] == ["pre.jsonl"] and not (tmp_path / "post.jsonl").exists()


def test_unknown_conditions_are_refused_and_the_table_keeps_what_it_needs() -> None:
    chosen = experiment.choose_plans(PerceptionKeys(), "static_prompt")
    assert list(chosen) == ["pre_only", "post_only", "adaptive", "static_prompt"]
    assert len(experiment.choose_plans(PerceptionKeys(), "")) == 8
    with pytest.raises(ThinkSwitchError, match=r"CONDITIONS=.*'statik' is not a condition; there are pre_only"):
        experiment.choose_plans(PerceptionKeys(), "statik")


@pytest.mark.parametrize("seeds", ["", "0 0", "0 00", "1 x", "1 ²", "-1"])
def test_seeds_that_are_none_are_wrong_usage(seeds: str) -> None:
    done = CliRunner().invoke(commands.main, ["adaptive", "--domain", "arithmetic-mixed", "--seeds", seeds])
    assert done.exit_code == 2 and "give different whole numbers" in done.output


def test_derived_conditions_are_worked_out_question_by_question() -> None:
    found = {
        "pre_only": condition([1, 1, 0, 1], [20, 20, 30, 30], [1, 1, 1, 1]),
        "post_only": condition([1, 0, 1, 0], [3, 3, 3, 3], [0, 0, 0, 0]),
        "adaptive": condition([1, 1, 1, 0], [3, 20, 3, 3], [0, 1, 0, 0]),
        "forced_pre": condition([0, 1, 0, 1], [21, 21, 31, 31], [1, 1, 1, 1]),
        "forced_post": condition([1, 0, 1, 0], [3, 3, 3, 3], [0, 0, 0, 0]),
    }
    more = adaptive_results.derived(found, {"mlp": np.array([[0.0, 1, 1, 1]])})
    chance = more["random_choice"]  # thinks on a quarter of the questions
    assert chance.correct.tolist() == [[1.0, 0.25, 0.75, 0.25]] and chance.think.tolist() == [[0.25] * 4]
    assert chance.tokens.mean() == pytest.approx(0.25 * 25 + 0.75 * 3)
    assert more["oracle"].correct.tolist() == [[1, 1, 1, 1]] and more["oracle"].tokens.tolist() == [[3, 20, 3, 30]]
    assert more["mlp_baselines"].correct.tolist() == [[1, 1, 0, 1]]
    assert more["mlp_adaptive"].correct.tolist() == [[1, 1, 0, 1]]
    assert more["mlp_adaptive"].tokens.tolist() == [[3, 21, 31, 31]]


def test_intervals_are_over_questions_with_the_seeds_averaged_first() -> None:
    rng = np.random.default_rng(0)
    correct = (rng.random((3, 200)) < 0.8).astype(float)
    one = adaptive_results.Condition(correct, correct * 4, correct)
    strata = ["easy", "hard"] * 100
    found = adaptive_results.figures(one, strata)
    assert found["accuracy"] == pytest.approx(correct.mean())
    assert found["ci95"] == bootstrapped(correct.mean(axis=0).tolist())
    assert found["by_seed"] == pytest.approx(correct.mean(axis=1).tolist())
    assert found["strata"]["hard"]["accuracy"] == pytest.approx(correct[:, 1::2].mean())
    other = adaptive_results.Condition(1 - correct, correct + 1, correct)
    gap = adaptive_results.difference(one, other)
    assert gap["accuracy"] == pytest.approx(2 * correct.mean() - 1)
    assert gap["ci95"] == bootstrapped((2 * correct - 1).mean(axis=0).tolist())


@pytest.mark.parametrize(("tokens", "better", "holds"), [(10, 0, True), (13, 0, False), (10, -30, False)])
def test_claims_hold_by_their_rule(tokens: int, better: int, holds: bool) -> None:
    n = 100
    right = np.zeros(n)
    right[:90] = 1
    adaptive = np.zeros(n)
    adaptive[: 90 + better] = 1
    base = condition(right, np.full(n, 25), np.ones(n))
    post = condition(np.arange(n) < 80, np.full(n, 3), np.zeros(n))
    found = {"pre_only": base, "post_only": post, "adaptive": condition(adaptive, np.full(n, tokens), np.zeros(n))}
    stated = adaptive_results.claims(found)
    assert all(claim["holds"] for claim in stated) is holds
    assert len(stated) == 3  # of conditions that were left out nothing is claimed


def test_conditions_of_other_questions_are_refused() -> None:
    one, two = condition([1, 0], [3, 3], [0, 0]), condition([1], [3], [0])
    with pytest.raises(ThinkSwitchError, match="evaluated on different questions"):
        adaptive_results.summary({"pre_only": one, "post_only": two}, ["easy", "hard"])


def sample(doc_id: int, text: str, gold: str, stratum: str, budget: int = 64) -> dict[str, Any]:
    return {
        "doc_id": doc_id,
        "doc": {"question": "1+1", "stratum": stratum},
        "target": gold,
        "resps": [[text]],
        "arguments": {"gen_args_0": {"arg_0": "", "arg_1": {"max_gen_toks": budget}}},
    }


def test_questions_are_read_back_from_the_samples_of_lm_eval(write_jsonl: Any) -> None:
    tokenizer = build_tokenizer("instruct")
    rows = [
        sample(2, "<answer>7", "7", "hard"),
        sample(0, "<think>\n1+1=2\n</think>\n\n2", "2", "short"),
        sample(1, "<think>\n1+1=2\n1+", "2", "easy", budget=9),
        sample(3, "nonsense", "2", "easy"),
    ]
    path = write_jsonl("samples.jsonl", rows)
    first, cut, direct, none = scoring.read_questions(path, tokenizer, "digit")
    assert (first.stratum, first.correct, first.think, first.answer) == ("short", True, True, "2")
    assert first.tokens == len(tokenizer.encode("<think>\n1+1=2\n</think>\n\n2", add_special_tokens=False)) + 1
    assert (cut.correct, cut.think, cut.answer) == (False, True, None)
    assert (direct.correct, direct.think, direct.answer) == (True, False, "7")
    assert (none.correct, none.think, none.answer) == (False, False, None)


def test_a_prefix_that_was_forced_counts_as_the_format(write_jsonl: Any) -> None:
    path = write_jsonl("samples.jsonl", [sample(0, "7", "7", "hard")])
    (forced,) = scoring.read_questions(path, build_tokenizer("instruct"), "digit", "<answer>")
    free = scoring.read_questions(
        write_jsonl("free.jsonl", [sample(0, "<answer>7", "7", "hard")]), build_tokenizer("instruct"), "digit"
    )
    assert forced.correct and not forced.think
    assert next(free).tokens == forced.tokens + len(build_tokenizer("instruct").encode("<answer>")) - 1


def test_a_swapped_prompt_is_never_the_questions_own_and_does_not_depend_on_the_batch() -> None:
    import torch

    from experiments.soft_prompts import prompts_of_others

    pool = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0))
    swapped = torch.cat([prompts_of_others(pool, seed)(pool[[i]]) for seed in range(20) for i in range(7)])
    assert not torch.isclose(swapped, pool.repeat(20, 1, 1)).all(dim=(1, 2)).any()
    assert torch.unique(swapped.flatten(1), dim=0).shape[0] == 7
    assert torch.equal(prompts_of_others(pool, 1)(pool), prompts_of_others(pool, 1)(pool))
    with pytest.raises(ThinkSwitchError, match="two questions or more"):
        prompts_of_others(pool[:1], 0)


def test_an_answer_that_comes_first_ends_at_its_tag_in_every_task() -> None:
    from thinkswitch_plugin.args import EvaluationKeys
    from thinkswitch_plugin.data.formats import STOP
    from thinkswitch_plugin.judging.evaluation import Sampling, load_task

    for name, before in (("thinkswitch_arithmetic", []), ("thinkswitch_arithmetic_mixed", list(STOP))):
        plain, ours = (
            load_task(EvaluationKeys(task=name), Sampling(), stop=stop)[name].config.generation_kwargs["until"]
            for stop in ((), STOP)
        )
        assert [text for text in plain if text in STOP] == before
        assert set(ours) == {*plain, *STOP} and len(ours) == len(set(ours))


def test_rows_of_another_shape_are_one_sentence(write_jsonl: Any) -> None:
    path = write_jsonl("samples.jsonl", [{"doc_id": 4, "resps": []}])
    with pytest.raises(ThinkSwitchError, match="question 4: not a row of lm-eval's samples"):
        list(scoring.read_questions(path, build_tokenizer("instruct"), "digit"))


# ---- labels, training and evaluation, small and real ----


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, forked: Command) -> tuple[Path, list[str | Path]]:
    """The folder of a small experiment, and the command that created it."""
    from thinkswitch_plugin.demo import cache, mixed

    cache.ensure_pair(0, *(Path(f".cache/arithmetic/seed-0/{mode}") for mode in ("instruct", "thinking")))
    folder = tmp_path_factory.mktemp("small")
    mixed.write_training_files(folder, 0, count=400)
    few = {"evaluation": {"limit": 60, "batch_size": "30"}, "adaptive": {"samples": 2}}
    overlay: dict[str, Any] = {"num_epochs": 4, "pad_to_sequence_len": False, "thinkswitch": few}
    files.write_yaml(folder / "small.overlay.yaml", overlay)
    words = [
        *(BIN / "python", "-m", "experiments", "adaptive", "--domain", "arithmetic-mixed"),
        *("--runs", folder / "runs", "--seeds", "0"),
        *("--generations", folder / "generations.jsonl", "--overlay", folder / "small.overlay.yaml", "--folds", "2"),
        *("--engine", "embedded", "--conditions", "adaptive"),
    ]
    done = forked(*words, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "runs" / "arithmetic-mixed" / "adaptive", words


@pytest.mark.slow
def test_labels_training_and_evaluation_at_reduced_size(small: Any) -> None:
    folder, _ = small
    result = files.read_json(folder / "adaptive.json")
    (labels,) = result["labels"]
    assert sum(labels.values()) == 400 and all(labels.values()) and result["reference_from"] == "majority"
    assert result["questions"] == 60 and result["swap"]["questions"] == 60
    found = result["conditions"]
    assert found["pre_only"]["think_share"] > 0.9 and found["forced_pre"]["think_share"] == 1.0
    assert found["post_only"]["think_share"] < 0.1 and found["forced_post"]["think_share"] == 0.0
    assert found["post_only"]["tokens"] < found["pre_only"]["tokens"]
    assert {"oracle", "random_choice", "mlp_baselines", "length_adaptive"} <= found.keys()
    assert result["swap"]["prompt_rms"] > 0
    if served := result["served"]:
        assert served["questions"] == 60 and served["equal"] >= 57  # exact equality: test_prompt_embeds
    assert "| **adaptive**" in (folder / "adaptive.md").read_text()
    assert (folder / "adaptive.png").stat().st_size > 10_000 and (folder / "adaptive.svg").is_file()


@pytest.mark.slow
def test_again_it_does_nothing_and_says_the_same(small: Any, forked: Command) -> None:
    folder, words = small
    before = (folder / "adaptive.json").read_bytes()
    adapters = {path: path.stat().st_mtime_ns for path in folder.rglob("adapter_model.safetensors")}
    again = forked(*words, timeout=300)
    assert again.returncode == 0 and "$ " not in again.stdout  # no engine was started
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("adapter_model.safetensors")} == adapters
    assert (folder / "adaptive.json").read_bytes() == before


@pytest.mark.slow
def test_the_checkpoint_with_its_module_is_refused_by_what_would_leave_it_out(small: Any, forked: Command) -> None:
    folder, _ = small
    checkpoint = folder / "seed-0" / "checkpoint"
    done = forked(BIN / "thinkswitch", "eval-model", "--domain", "arithmetic-mixed", "--model", checkpoint)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert "has a perception module, which this command would leave out" in done.stderr
