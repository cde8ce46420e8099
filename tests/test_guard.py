"""Guard tasks: asked with the domain's own, graded, compared with iteration 0, and able to stop the loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.report_run import GUARD, make_run, set_guard, write_guard
from tests.test_lm_eval import fixed, in_memory
from thinkswitch_plugin import files
from thinkswitch_plugin.args import EvaluationKeys
from thinkswitch_plugin.data import contamination, task_files
from thinkswitch_plugin.demo import task as demo
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging import guard, samples
from thinkswitch_plugin.judging.evaluation import evaluate
from thinkswitch_plugin.loop import work
from thinkswitch_plugin.loop.check import budget
from thinkswitch_plugin.recipe import load_recipe
from thinkswitch_plugin.report import write_report
from thinkswitch_plugin.run import open_run
from thinkswitch_plugin.run.table import find_stage

THEIRS = """
task: {name}
custom_dataset: !function {name}.rows
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["so", "\\n"], max_gen_toks: 16}}
{graded}metric_list:
  - {{metric: {metric}, aggregation: mean, higher_is_better: true}}
"""
ROWS = """
def closeness(doc, results):
    return {"closeness": 0.5}


def rows(**arguments):
    from datasets import Dataset

    return {"test": Dataset.from_list([{"question": q, "answer": a} for q, a in (("1 2", "5"), ("3 4", "6"), ("7 8", "5"))])}
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A task of the user's own that lm-eval grades by one of its metrics."""

    def write(name: str, metric: str = "exact_match", kind: str = "generate_until") -> str:
        folder = tmp_path / "lm_eval_tasks"
        folder.mkdir(exist_ok=True)
        graded = "" if metric == "exact_match" else f"process_results: !function {name}.closeness\n"
        (folder / f"{name}.yaml").write_text(THEIRS.format(name=name, metric=metric, kind=kind, graded=graded))
        (folder / f"{name}.py").write_text(ROWS)
        for file in (Path(__file__).parent.parent / "lm_eval_tasks").glob("thinkswitch*"):
            if not (folder / file.name).exists():
                (folder / file.name).symlink_to(file)
        monkeypatch.setattr(task_files.places, "find", lambda path: folder.parent / path)
        return name

    return write


def test_guard_tasks_are_asked_in_the_same_files_and_graded_without_traces(
    theirs: Callable[..., str], tmp_path: Path
) -> None:
    checkpoint, mine = fixed(tmp_path / "model"), theirs("mine")
    lm = in_memory(checkpoint, tmp_path / "out")
    lm.guards = (GUARD, mine)
    keys = EvaluationKeys.model_validate(
        {"task": "thinkswitch_arithmetic", "limit": 2, "guard": [GUARD, mine], "guard_limit": 3}
    )
    evaluate(lm, keys, name="model")
    asked = [row["custom_id"] for _, row in files.read_jsonl(tmp_path / "out" / samples.REQUESTS)]
    own = [samples.question_id(n, 0) for n in range(2)]
    assert asked == own + [samples.question_id(n, 0, name) for name in (GUARD, mine) for n in range(3)]
    found = {s.doc_id: s for s in guard.by_lm_eval(tmp_path / "out", mine)}
    assert [found[n].correct for n in range(3)] == [[True], [False], [True]], "of `<think> so </think> 5` the 5 counts"
    assert found[0].tokens == [5], "the trace is paid for; the stop string of the task does not end it"
    kept = list(samples.graded(tmp_path / "out", GUARD, "model", "digit", guard=True)[1])
    assert [s.correct for s in kept] == [[demo.answer(q) == "5"] for q in demo.two_operands()[:3]]
    assert len(list(samples.graded(tmp_path / "out", keys.task, "model", "digit")[1])) == 2


def test_a_task_without_a_metric_of_right_and_wrong_is_refused(theirs: Callable[..., str], tmp_path: Path) -> None:
    lm = in_memory(fixed(tmp_path / "model"), tmp_path / "out")
    lm.guards = (theirs("mine", "closeness"),)
    keys = EvaluationKeys.model_validate({"task": "thinkswitch_arithmetic", "limit": 1, "guard": ["mine"]})
    evaluate(lm, keys, name="model")
    with pytest.raises(
        ThinkSwitchError, match=r"mine has no metric that is right or wrong .* \(it has closeness\); remove"
    ):
        guard.by_lm_eval(tmp_path / "out", "mine")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"guard": ["thinkswitch_arithmetic"]}, "names thinkswitch_arithmetic, which is evaluated already"),
        ({"guard": [GUARD, GUARD]}, "which is evaluated already; name each task once"),
        ({"guard_margin": 0.1}, "need `guard`, a list of lm-eval tasks"),
        ({"guard": [GUARD], "guard_margin": 5}, "less than 1"),
    ],
)
def test_wrong_guard_keys_are_one_sentence(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    files.write_yaml(tmp_path / "o.yaml", {"thinkswitch": {"evaluation": keys}})
    with pytest.raises(ThinkSwitchError, match=message) as caught:
        load_recipe(Path("recipes/arithmetic.yaml"), (tmp_path / "o.yaml",))
    assert "\n" not in str(caught.value)


def test_guard_tasks_are_loaded_and_kept_apart_from_the_prompts_before_any_work(theirs: Callable[..., str]) -> None:
    def require(name: str, *prompts: str) -> dict[str, int]:
        keys = EvaluationKeys.model_validate({"task": "thinkswitch_arithmetic", "guard": [name]})
        return contamination.require_uncontaminated([("p0", text) for text in prompts], keys)

    assert require(GUARD, "1+1+1+1+1") == {"thinkswitch_arithmetic": 400, GUARD: 300}
    with pytest.raises(ThinkSwitchError, match=f"overlap with the evaluation set of {GUARD}"):
        require(GUARD, "7*3")
    with pytest.raises(ThinkSwitchError, match="mine compares likelihoods"):
        require(theirs("mine", kind="loglikelihood"))


@pytest.fixture
def guarded(tmp_path: Path) -> Path:
    """A made run with a guard task on which instruct falls from nearly all right to half in iteration 2."""
    folder = make_run(tmp_path, questions=60)
    write_guard(folder, guard_margin=0.1)
    return folder


def test_the_report_shows_what_else_changed(guarded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(open_run(guarded))
    zero, one, two = files.read_json(guarded / "report.json")["iterations"]
    assert "paired" not in zero["guard"][GUARD]["instruct"] and one["guard"][GUARD]["thinking"]["n"] == 200
    fallen = two["guard"][GUARD]["instruct"]["paired"]
    assert fallen["difference"] < -0.2 and fallen["verdict"] == "more than noise"
    sentence = "Outside the domain, iteration 2 against iteration 0: instruct on thinkswitch_arithmetic_two -"
    printed = capsys.readouterr().out
    assert "thinkswi…" not in printed, "the name of a task is folded, not cut"
    shown = " ".join(printed.split())
    for text in (shown, (guarded / "report.md").read_text(), (guarded / "report.html").read_text()):
        assert "What else changed" in text and sentence in text
    assert (guarded / "report.md").read_text().count(f"| {GUARD} | instruct | 2 | ") == 1
    assert '<a href="#guard">' in (guarded / "report.html").read_text()


def test_a_guard_that_falls_beyond_its_margin_stops_the_loop_in_one_sentence(guarded: Path) -> None:
    run = open_run(guarded)
    work.evaluate(run, 1, "instruct")  # all of it is stored: nothing is asked
    work.evaluate(run, 2, "thinking")
    with pytest.raises(
        ThinkSwitchError, match=rf"task {GUARD} fell by more than .*guard_margin: 0.1` allows: instruct"
    ):
        work.evaluate(run, 2, "instruct")
    work.evaluate(set_guard(guarded, guard_margin=0.9), 2, "instruct")
    work.evaluate(set_guard(guarded), 2, "instruct")


def test_another_margin_asks_nothing_again_and_another_guard_does(guarded: Path) -> None:
    before, *others = (
        find_stage(set_guard(guarded, **keys), "eval-instruct", 1)
        for keys in ({"guard_margin": 0.1}, {"guard_margin": 0.2}, {"guard_limit": 5})
    )
    stamp = {"values": before.values, "inputs": {}}
    assert all(stage.values != before.values for stage in others), "the stage runs again"
    parts = [stage.resumed_part({"values": stage.values, "inputs": {}}) for stage in (before, *others)]
    assert parts[0] == parts[1] != parts[2] and orjson.dumps(stamp)


def test_make_check_counts_what_the_guard_costs(tmp_path: Path) -> None:
    guards = {"guard": ["thinkswitch_ifeval"], "guard_limit": 100}
    files.write_yaml(tmp_path / "o.yaml", {"thinkswitch": {"evaluation": guards}})
    keys = load_recipe(Path("recipes/aime.yaml"), (tmp_path / "o.yaml",)).keys
    text = budget(keys, 2, 1000.0, {"thinkswitch_aime": 30, "thinkswitch_ifeval": 541}, "")
    assert f"{6 * 100 * 8192:,} for the guard thinkswitch_ifeval on 6 checkpoints (100 answers × 8192)" in text
    assert f"{6 * 30 * 8192:,} for evaluating 6 checkpoints (30 answers × 8192)" in text
