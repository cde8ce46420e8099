"""`make status` on runs that are new, idle, running, failed or killed. The stages here are instant."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.test_changes import RECIPE, iterate, place, replace  # noqa: F401
from thinkswitch_plugin import files, run
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run import status

pytestmark = pytest.mark.usefixtures("place")
RUN = Path("runs/arithmetic")
AT_WORK = """
import sys
from pathlib import Path
from thinkswitch_plugin import run
from thinkswitch_plugin.run import progress
progress.RECORD_SECONDS = 0
opened = run.open_run(Path("runs/arithmetic"))
def work():
    with progress.Bar(512, "generate", unit="answer") as bar:
        bar.note("2,812 tokens, 900 tokens/s")
        bar.update(148)
        print("at work", flush=True)
        sys.stdin.read()
run.execute(opened, "generate", 1, work)
"""


def shown(capsys: pytest.CaptureFixture[str], folder: Path = RUN) -> list[str]:
    capsys.readouterr()
    status.show_status(folder)
    return capsys.readouterr().out.splitlines()


def snapshot() -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in Path().rglob("*") if p.is_file()}


def test_where_there_is_no_run_the_command_to_begin_one_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys) == ["There is no run in runs/arithmetic yet; begin one with: make iterate"]
    (line,) = shown(capsys, Path("my runs/aime"))
    assert line.endswith("make iterate DOMAIN=aime RUNS='my runs'")
    assert not Path("runs").exists() and not Path("my runs").exists()


def test_adaptive_work_is_shown_beside_a_run_and_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    for name in (
        "labels/fold-1/post/generations.json",
        "conditions/pre_only/eval.json",
        "conditions/adaptive/axolotl.yaml",
    ):
        files.write_json(RUN / "adaptive" / "seed-0" / name, {})
    expected = "  adaptive     seed-0: labels begun, folds answered: 1; evaluated pre_only; begun adaptive"
    assert shown(capsys) == [expected]
    (RUN / "adaptive" / "seed-0" / "labels" / "labels.jsonl").touch()
    iterate(2, until="train-1")
    assert "  adaptive     seed-0: labels; evaluated pre_only; begun adaptive" in shown(capsys)


def test_a_run_half_way_says_what_is_done_and_left_and_is_not_touched(capsys: pytest.CaptureFixture[str]) -> None:
    iterate(2, until="train-1")
    before = snapshot()
    lines = shown(capsys)
    assert snapshot() == before
    assert lines[0].startswith("runs/arithmetic: seed 0, engine embedded; 6 of 20 stages done in ")
    assert lines[1].split()[:4] == ["iteration", "0", "done", "pair"] and "eval-thinking" in lines[1]
    assert [w for w in lines[2].replace(",", "").split() if w.isalpha()][2:] == [
        "requests",
        "s",
        "generate",
        "s",
        "pairs",
        "s",
    ]
    assert lines[3].split()[0] == "left" and "train, merge-lora, rebuild, eval-instruct, eval-thinking" in lines[3]
    assert lines[-1] == "Next:   make iterate"


def test_a_finished_run_names_its_report_and_a_changed_recipe_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    iterate()
    assert shown(capsys)[-1] == "All done: see runs/arithmetic/report.html"
    replace(RECIPE, "learning_rate: 0.001", "learning_rate: 0.002")()
    lines = shown(capsys)
    (changed,) = [line for line in lines if " changed " in line]
    assert "train" in changed and "generate" not in changed and "will run again" in changed
    assert lines[-1] == "Next:   make iterate ITERATIONS=1"


def test_a_large_file_is_not_read_anew(capsys: pytest.CaptureFixture[str]) -> None:
    iterate()
    weights = Path(".cache/arithmetic/seed-0/instruct/model.safetensors")
    weights.write_bytes(bytes(status.READ_AT_MOST + 1))
    (line,) = [line for line in shown(capsys) if "not checked" in line and "eval" in line]
    assert "eval-instruct" in line and "eval-thinking" not in line


@pytest.fixture
def working() -> Any:
    """A process that holds the lock of a run during generation."""
    iterate(2, until="generate-1")
    process = subprocess.Popen(
        [sys.executable, "-c", AT_WORK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    while process.stdout.readline() not in ("at work\n", ""):
        pass
    yield process
    process.kill()
    process.communicate()


def test_a_stage_at_work_is_shown_and_not_disturbed(working: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot()
    lines = shown(capsys)
    assert snapshot() == before and working.poll() is None
    (now,) = [line for line in lines if line.startswith("Now:")]
    assert f"generate of iteration 1, process {working.pid}, for " in now
    assert "148 of 512 answers (29 %), 2,812 tokens, 900 tokens/s" in now
    assert any(line.split()[:2] == ["now", "generate"] for line in lines)
    assert any("stage 5 of 20 · iteration 1 of 2 · generate" in line for line in lines)
    assert not any(line.startswith("Next:") for line in lines)
    with pytest.raises(ThinkSwitchError, match="Another command is at work"), run.locked(RUN, patience=0):
        pass


def test_a_killed_stage_is_called_so_and_the_next_command_is_named(
    working: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    working.send_signal(signal.SIGKILL)
    working.wait()
    lines = shown(capsys)
    (killed,) = [line for line in lines if line.startswith("Killed:")]
    assert f"generate of iteration 1; its process {working.pid} ended without a word" in killed
    assert "148 of 512 answers" in killed and lines[-1] == "Next:   make iterate"
    with run.locked(RUN, patience=0):
        assert any(line.startswith(f"Locked: process {os.getpid()} ") for line in shown(capsys))


def test_the_last_failure_is_said_until_the_stage_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    iterate(until="generate-1")
    opened = run.open_run(RUN)

    def work() -> None:
        log = opened.iteration(1) / "logs" / "generate.log"
        log.parent.mkdir()
        log.write_text("chatter")
        raise ThinkSwitchError("the teacher has left.")

    with pytest.raises(ThinkSwitchError):
        run.execute(opened, "generate", 1, work)
    lines = shown(capsys)
    (failed,) = [line for line in lines if line.startswith("Failed:")]
    assert failed.startswith("Failed: generate of iteration 1, ") and failed.endswith("ago: the teacher has left.")
    assert "Log:    runs/arithmetic/iter-1/logs/generate.log" in lines
    assert any(line.split()[:2] == ["stopped", "generate"] for line in lines)
    iterate()
    assert not any(line.startswith(("Failed:", "Killed:")) for line in shown(capsys))
    assert not status.work_path(RUN).exists()


def test_a_damaged_record_costs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    iterate(until="train-1")
    for text in (b"{", b'{"stage": 1}', b'{"stage": "train", "iteration": "x", "pid": 1, "began": 0}'):
        status.work_path(RUN).write_bytes(text)
        assert shown(capsys)[-1] == "Next:   make iterate ITERATIONS=1"
    files.write_json(
        status.work_path(RUN), {"stage": "train", "iteration": 1, "pid": 1, "began": 0, "progress": {"done": None}}
    )
    assert any(line.startswith("Killed: train of iteration 1") for line in shown(capsys))


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"failed": {"at": "noon", "why": "\x1b[2Jit \x07fell"}}, "ago: it fell"),
        ({"failed": "yes", "progress": []}, "ended without a word"),
        (
            {"failed": {"at": None}, "progress": {"at": [], "title": "\x1b[31mx", "done": 1, "total": 2}},
            "x: 1 of 2 (50 %)",
        ),
        ({"stage": "no such stage"}, "Killed: no such stage of iteration 1"),
    ],
)
def test_a_record_of_the_wrong_shape_is_shown_as_far_as_it_goes(
    capsys: pytest.CaptureFixture[str], record: dict[str, Any], says: str
) -> None:
    iterate(until="train-1")
    files.write_json(status.work_path(RUN), {"stage": "train", "iteration": 1, "pid": 1, "began": 0, **record})
    lines = shown(capsys)
    assert any(says in line for line in lines) and not any("\x1b" in line for line in lines)
    assert lines[-1] == "Next:   make iterate ITERATIONS=1"


def test_a_stage_at_work_that_the_run_does_not_know_is_named_without_a_place(
    working: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    record = files.read_json(status.work_path(RUN))
    files.write_json(status.work_path(RUN), {**record, "stage": "elsewhere"})
    lines = shown(capsys)
    assert any(line.startswith("Now:    elsewhere of iteration 1, process ") for line in lines)
    assert not any("stage 5 of" in line for line in lines)


@pytest.mark.parametrize("settings", [{"iterations": 0}, {"iterations": 21}, {"iterations": True}, {"seed": False}])
def test_settings_that_no_run_can_have_are_damage(settings: dict[str, Any]) -> None:
    iterate(until="train-1")
    files.write_json(RUN / "run.json", {**files.read_json(RUN / "run.json"), **settings})
    with pytest.raises(ThinkSwitchError, match=rf"run.json is damaged \(`{next(iter(settings))}`\)"):
        status.show_status(RUN)


@pytest.mark.parametrize("text", ['{"instruct": 3}', "{}", "[]", '{"instruct": {}, "thinking": {}}'])
def test_a_damaged_pair_is_one_sentence(text: str) -> None:
    iterate(until="train-1")
    (RUN / "iter-0" / "pair.json").write_text(text)
    with pytest.raises(ThinkSwitchError, match=r"pair.json is damaged .*; delete it and run `make iterate`"):
        status.show_status(RUN)


def test_nothing_heavy_is_imported(command: Any) -> None:
    iterate(until="train-1")
    code = (
        "import sys; from pathlib import Path; from thinkswitch_plugin.run.status import show_status;"
        "show_status(Path('runs/arithmetic'));"
        "print(sorted({'torch', 'numpy', 'transformers', 'axolotl', 'datasets', 'rich'} & set(sys.modules)))"
    )
    done = command(sys.executable, "-c", code, cwd=Path.cwd(), PYTHONPATH=str(ROOT))
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_make_status_says_how_to_begin_and_exits_0(command: Any, tmp_path: Path) -> None:
    done = command("make", "status", f"RUNS={tmp_path / 'none'}", "DOMAIN=aime")
    assert done.returncode == 0 and f"make iterate DOMAIN=aime RUNS={tmp_path / 'none'}" in done.stdout
    assert not (tmp_path / "none").exists()
    done = command("make", "status", "DOMAIN=aimee")
    assert done.returncode == 2 and "There is no recipe recipes/aimee.yaml" in done.stderr
    assert "Did you mean aime?" in done.stderr
    done = command("make", "status", "VENV=nowhere")
    assert done.returncode == 0 and done.stdout == "nothing is set up here yet; begin with: make iterate\n"
