"""The scores of a run in the trackers that axolotl's keys choose: real TensorBoard files, and what is missing is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from thinkswitch_plugin.report.tracking import figures, log_report

REPORT: dict[str, Any] = {
    "domain": "sums",
    "seed": 3,
    "engine": "embedded",
    "iterations": [
        {"iteration": 0, "instruct": {"mean@k": 0.5, "ci95": [0.4, 0.6], "tokens": 2.0}, "seconds": {"eval": 7.5}},
        {
            "iteration": 1,
            "instruct": {"mean@k": 0.75, "ci95": [0.6, 0.8], "tokens": 2.5},
            "merge": {"method": "slerp", "lambda": 0.9, "tried": [{"lambda": 0.8, "think_ratio": 0.25}]},
            "losses": [[1, 2.0]],
        },
    ],
}


def test_every_number_has_a_name_that_all_trackers_take() -> None:
    entry = REPORT["iterations"][1]
    assert dict(figures({part: entry[part] for part in ("instruct", "merge")})) == {
        "instruct/mean_at_k": 0.75,
        "instruct/tokens": 2.5,
        "merge/lambda": 0.9,
        "merge/tried/0/lambda": 0.8,
        "merge/tried/0/think_ratio": 0.25,
    }


def test_tensorboard_gets_a_step_for_each_iteration_and_nothing_is_logged_without_a_key(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_report(REPORT, {"learning_rate": 0.1, "use_wandb": False}, tmp_path)
    assert not list(tmp_path.iterdir())
    log_report(REPORT, {"use_tensorboard": True}, tmp_path)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "sums-seed-3")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("instruct/mean_at_k")] == [(0, 0.5), (1, 0.75)]
    assert [(one.step, one.value) for one in events.Scalars("merge/lambda")] == [(1, pytest.approx(0.9))]


def test_a_tracker_that_cannot_be_reached_is_named_and_the_others_still_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    log_report(REPORT, {"mlflow_experiment_name": "house", "use_tensorboard": True}, tmp_path)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("  mlflow did not take the scores (") and "`make report` sends them again" in first
    assert second == "  scores, λ and times logged to tensorboard as sums-seed-3"
