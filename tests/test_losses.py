"""`make losses`: equal cost, conditions that are kept or made again, the share of right labels, and the table."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from experiments import losses, losses_table
from tests.report_run import GUARD, make_run, store_answers, write_guard, write_samples
from thinkswitch_plugin import files
from thinkswitch_plugin.demo import task
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.figures import Sample
from thinkswitch_plugin.run import open_run
from thinkswitch_plugin.run.hashes import Hashes

QUESTIONS = 60


def finish(folder: Path, name: str, mode: str = "instruct", good: int = 1) -> None:
    """Leave the result of a condition whose answers are as often right as those of an iteration."""
    here = folder / "controls" / name
    write_samples(here / "eval" / mode / "x", task.distinct(random.Random(0), QUESTIONS), 1, good, mode, 0)
    store_answers(here / "eval" / mode, mode)
    write_samples(here / "eval" / mode / "guard", task.two_operands()[:200], 1, good, mode, 0, GUARD)
    store_answers(here / "eval" / mode, mode, GUARD)
    beside = Hashes(folder).of(folder / "iter-1" / mode)
    run = open_run(folder)
    tasks, cost = list(run.recipe.keys.evaluation.tasks), losses.equal_cost(run)
    about = {"control": name, "mode": mode, "title": name, "beside": beside, "tasks": tasks, "cost": cost}
    files.write_json(here / "result.json", {**about, "pairs": 500, "seconds": 20.4, "labels_right": 0.7})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs in which the pairs of `vote` teach more, and those of `first` as much as nothing."""
    made = []
    for seed in range(2):
        folder = make_run(tmp_path_factory.mktemp("losses"), questions=QUESTIONS, iterations=1)
        write_guard(folder, iterations=1)
        files.write_json(folder / "run.json", files.read_json(folder / "run.json") | {"seed": seed})
        for loss in losses.LOSSES:
            for selection in losses.SELECTIONS:
                finish(folder, f"{loss}-{selection}", good=0 if selection == "first" else 2)
        finish(folder, "undistilled", "thinking")
        made.append(folder)
    return made


def test_the_table_has_every_condition_over_all_seeds_and_the_controls_that_apply(
    folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    losses_table.print_losses(folders)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"### arithmetic: seeds 0, 1, {QUESTIONS} held-out questions, engine embedded"
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|")
    assert header[-2:] == [f"{GUARD}, change against iteration 0", "training s"]
    cells = {(row[0], row[1]): row for row in rows}
    assert len(rows) == 3 + 12 + 1 and ("shuffled", "instruct") not in cells
    default, better = cells["answers-first", "instruct"], cells["answers-vote", "instruct"]
    assert default[6] == "" and default[3] == "500" and default[-1] == "20" and default[2] == "70.0 %"
    first, second = map(float, better[5].split(" / "))
    assert better[4].startswith(f"{(first + second) / 2:.1f} % (")
    assert better[6].startswith("+") and float(better[7]) < 0.05
    assert cells["before (iteration 0)", "instruct"][-2].count("%") == 1  # no change against itself
    assert "to" in better[-2] and cells["undistilled", "thinking"][6]


def test_a_condition_that_one_run_lacks_is_named(folders: list[Path]) -> None:
    (folders[1] / "controls" / "answers-all" / "result.json").rename(folders[1] / "kept.json")
    with pytest.raises(ThinkSwitchError, match=r"answers-all/result\.json does not exist; `make losses` goes on"):
        losses_table.print_losses(folders)
    (folders[1] / "kept.json").rename(folders[1] / "controls" / "answers-all" / "result.json")


def test_runs_of_different_questions_are_not_pooled() -> None:
    with pytest.raises(ThinkSwitchError, match="did not answer the same questions"):
        losses_table.pooled([[Sample(0)], [Sample(1)]])


def test_a_condition_is_made_again_only_if_iteration_1_has_been(folders: list[Path]) -> None:
    run = open_run(folders[0])
    here = folders[0] / "controls" / "answers-first"
    assert losses.finished(run, here) and not losses.finished(run, folders[0] / "controls" / "shuffled")
    files.write_json(folders[0] / "iter-1" / "instruct" / "other.json", {})
    assert not losses.finished(run, here)
    (folders[0] / "iter-1" / "instruct" / "other.json").unlink()


def test_every_condition_has_the_steps_of_the_runs_own_training_and_its_labels_are_graded(
    folders: list[Path], tmp_path: Path
) -> None:
    run = open_run(folders[0])
    # 507 pairs, 8 epochs, 32 rows a step, as axolotl counts them; its warm-up is 3 % of the steps.
    assert losses.equal_cost(run) == {"max_steps": 127, "warmup_steps": 3}
    pairs = [("2+3", "5"), ("2*3", "7"), ("9-1", "8"), ("9-2", "7")]
    rows = [{"messages": [{"content": q}, {"content": a}], "prompt_id": q} for q, a in pairs]
    files.write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert losses.labels_right(run, tmp_path / "pairs.jsonl") == 0.75


def test_several_seeds_get_a_row_with_their_mean_and_spread() -> None:
    from experiments.controls import over_seeds

    def report(score: float, iterations: int) -> dict[str, object]:
        one = {"mean@k": score, "tokens": 10 * score}
        return {"iterations": [{"instruct": one, "thinking": one}] * iterations}

    rows = over_seeds([report(0.5, 2), report(0.6, 1), report(0.7, 2)])
    figures = ["60.0 % ± 10.0", "50.0–70.0", "6.0 ± 1.0"]
    assert rows == [["0", "instruct", *figures], ["0", "thinking", *figures]]
