"""What is shown during work: on a terminal, on a terminal that cannot redraw, and in a log."""

from __future__ import annotations

import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from click import unstyle

from tests.conftest import ROOT
from tests.terminal import run_on_terminal
from thinkswitch_plugin.engines import servers
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run import Stage, processes, progress
from thinkswitch_plugin.run.execution import place

# Work of two kinds: in process, and an engine that knows only its own progress bar.
WORK = """
import sys, time
from pathlib import Path
from thinkswitch_plugin import console
from thinkswitch_plugin.run import processes
from thinkswitch_plugin.run import progress
progress.QUIET_SECONDS = float(sys.argv[2])
folder = Path(sys.argv[1])
engine = '''
import sys, time
from tqdm import tqdm
print("engine chatter", flush=True)
time.sleep(0.8)  # as an engine that loads a model
for _ in tqdm(range(40), desc="Executing graph", mininterval=0):
    time.sleep(0.02)
sys.exit(int(sys.argv[1]))
'''
(folder / "engine.py").write_text(engine)
work = progress.Work(folder / "at-work.json", {"stage": "train", "iteration": 1}, lambda: "stage 7 of 20 · iteration 1 of 2")
with progress.working(work):
    console.say("[train of iteration 1]")
    with progress.Bar(40, "generate", unit="answer") as bar:
        for done in range(40):
            bar.note(f"{20 * done} tokens, 900 tokens/s")
            bar.update()
            time.sleep(0.02)
    console.say("said after it")
    processes.run_logged([sys.executable, folder / "engine.py", sys.argv[3]], folder / "train.log", title="axolotl train")
"""


def words(folder: Path, quiet: float = 0.0, code: int = 0) -> list[str | Path]:
    return [sys.executable, "-c", WORK, folder, str(quiet), str(code)]


def piped(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(a) for a in arguments], cwd=ROOT, capture_output=True, text=True)


def test_a_terminal_shows_bars_speed_time_left_and_where_the_run_is(tmp_path: Path) -> None:
    code, shown = run_on_terminal(words(tmp_path))
    assert code == 0
    for text in ("40/40", "tokens/s", "stage 7 of 20 · iteration 1 of 2", "Executing graph", "said after it"):
        assert text in shown, text
    assert "\x1b[" in shown
    # The last line of the engine is shown next to the bar until the engine draws its own bar, and nowhere else.
    chatter = [row.strip() for row in unstyle(shown).splitlines() if "engine chatter" in row]
    assert all(row.startswith("axolotl train ") for row in chatter), chatter
    assert "\x1b[?25l" not in shown  # the cursor is never hidden: who kills us would be left without
    assert "engine chatter" in (tmp_path / "train.log").read_text()


NESTED = """
import time
from thinkswitch_plugin.run import progress
with progress.Bar(3, "sweep", unit="candidate") as outer:
    for _ in range(3):
        with progress.Bar(4, "starting vllm") as inner:
            for _ in range(4):
                inner.update()
                time.sleep(0.1)
        outer.update()
print("after it")
"""


def test_a_bar_within_a_bar_is_a_row_of_the_same_view(tmp_path: Path) -> None:
    code, shown = run_on_terminal([sys.executable, "-c", NESTED])
    assert code == 0 and "Traceback" not in shown and shown.endswith("after it\r\n")
    assert any(" sweep " in frame and " starting vllm " in frame for frame in shown.split("\x1b[1A"))


FAILING = """
from thinkswitch_plugin import cli
from thinkswitch_plugin.run import progress
from thinkswitch_plugin.errors import ThinkSwitchError

@cli.main.command("work")
def work() -> None:
    bar = progress.Bar(4, "sweep", unit="candidate")
    bar.update()
    raise ThinkSwitchError("the third candidate fell; run the same command again.")

cli.main(["work"])
"""


def test_an_error_is_the_last_thing_on_the_terminal_not_a_bar(tmp_path: Path) -> None:
    code, shown = run_on_terminal([sys.executable, "-c", FAILING], NO_COLOR="1")
    assert code == 1 and " sweep " in shown
    assert shown.endswith("thinkswitch: the third candidate fell; run the same command again.\r\n")
    assert " sweep " not in shown.rpartition("\x1b[2K")[2]


def test_no_color_is_respected(tmp_path: Path) -> None:
    _, coloured = run_on_terminal(words(tmp_path))
    _, plain = run_on_terminal(words(tmp_path), NO_COLOR="1")
    assert "\x1b[3" in coloured and "\x1b[3" not in plain and "\x1b[9" not in plain


def test_a_terminal_that_cannot_redraw_gets_lines(tmp_path: Path) -> None:
    code, shown = run_on_terminal(words(tmp_path), TERM="dumb")
    assert code == 0 and "\x1b" not in shown
    assert "\r" not in shown.replace("\r\n", "\n") and "generate: 100% 40/40" in shown


def test_away_from_a_terminal_there_are_lines_and_no_codes(tmp_path: Path) -> None:
    done = piped(*words(tmp_path))
    assert done.returncode == 0 and not set("\r\x1b") & set(done.stdout + done.stderr)
    assert "  generate: 100% 40/40" in done.stderr and "780 tokens, 900 tokens/s" in done.stderr
    assert "axolotl train: " in done.stderr and "Executing graph" in done.stderr
    assert done.stdout.splitlines()[0] == "[train of iteration 1]" and "said after it" in done.stdout


def test_short_work_away_from_a_terminal_prints_no_progress(tmp_path: Path) -> None:
    done = piped(*words(tmp_path, quiet=60))
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == 3


def test_the_end_of_the_log_is_shown_when_an_engine_fails(tmp_path: Path) -> None:
    done = piped(*words(tmp_path, quiet=60, code=3))
    assert done.returncode == 1
    assert f"axolotl train failed (exit code 3); the end of {tmp_path / 'train.log'}" in done.stderr
    assert "    engine chatter" in done.stderr and "40/40" in done.stderr


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            "Running generate_until requests:  37%|███▋      | 148/400 [00:12<00:20, 12.3it/s]",
            ("Running generate_until requests", 148, 400),
        ),
        (" 31%|███▏      | 40/128 [00:22<00:47,  1.84it/s]", ("", 40, 128)),
        ("\rExecuting graph:   0%|          | 0/232 [00:00<?, ?it/s]", ("Executing graph", 0, 232)),
        (
            "Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:00<00:00,  3.10it/s]",
            ("Loading safetensors checkpoint shards", 1, 2),
        ),
        (
            "model.safetensors:  45%|####5     | 3.62G/8.04G [01:02<01:16, 57.8MB/s]",
            ("model.safetensors", 3.62e9, 8.04e9),
        ),
        (
            "Tokenizing Prompts (num_proc=1): 100%|██████████| 512/512 [00:00<00:00, 1272.10 examples/s]",
            ("Tokenizing Prompts (num_proc=1)", 512, 512),
        ),
        ("a:  10%|█ | 1/10 [x]\rb:  20%|██ | 2/10 [y]\n{'loss': 0.1}\n", ("b", 2, 10)),
        ("{'loss': '0.643', 'epoch': '1'}", None),
        ("we are 100% sure of 3/4 of it", None),
        ("Generating train split: 0 examples [00:00, ? examples/s]", None),
        ("", None),
    ],
)
def test_progress_is_read_from_what_tqdm_writes(line: str, found: tuple[str, int, int] | None) -> None:
    assert progress.last_tqdm(line) == found


def test_an_engine_that_begins_another_kind_of_work_starts_its_clock_anew(tmp_path: Path) -> None:
    bar = progress.Bar(0, "axolotl train")
    bar.place(512, 512, "Tokenizing")
    assert bar.left is None  # nothing was done since it was seen
    bar.place(0, 128, "")
    bar.place(64, 128, "")
    assert bar.left is not None and bar.initial == 0 and (bar.n, bar.total) == (64, 128)


def test_an_engine_whose_bar_is_full_is_said_to_be_at_work_and_no_speed_is_made_up() -> None:
    bar = progress.Bar(0, "lm_eval")
    bar.place(100, 400, "Running")
    assert bar.line().startswith("  lm_eval:  25% 100/400 [")
    bar.place(400, 400, "Running")
    bar.begun = time.monotonic()
    assert bar.line() == "  lm_eval: 0 s so far, Running done"


def test_work_whose_record_cannot_be_written_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    work = progress.Work(tmp_path / "file" / "at-work.json", {"stage": "train"}, lambda: "")
    with progress.working(work):
        bar = progress.Bar(2, "x")
        bar.update()
        work.record(progress=bar.facts())
    assert bar.work is work and (bar.n, bar.left is None) == (1, False)
    assert work.facts["stage"] == "train" and work.facts["progress"]["done"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == b""


def test_a_bar_belongs_to_the_stage_around_it_and_to_none_afterwards(tmp_path: Path) -> None:
    outer, inner = (progress.Work(tmp_path / name, {}, lambda: "") for name in ("outer", "inner"))
    with progress.working(outer):
        with pytest.raises(ZeroDivisionError), progress.working(inner):
            assert progress.Bar(1, "x").work is inner
            raise ZeroDivisionError
        assert progress.Bar(1, "x").work is outer
    assert progress.Bar(1, "x").work is None
    assert not outer.path.exists() and "ZeroDivisionError" in inner.path.read_text()


def test_escape_codes_of_an_engine_stay_in_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"  0%|  |\r\x1b[32mINFO\x1b[0m 07:12 ready\r\n\x1b]0;title\x07\x1b[2J\xff gone\n")
    shown = processes.tail(log)
    assert not {c for c in shown if unicodedata.category(c) == "Cc"} - {"\n"}
    assert shown.splitlines()[0] == "    INFO 07:12 ready" and shown.endswith("gone")


def test_what_is_shown_of_an_engine_cannot_steer_the_terminal(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"  9%|x| 1/11 [00:01]\n")
    earlier = log.stat().st_size  # what another start of the engine had written
    with log.open("ab") as handle:
        handle.write(b"\x1b[2J\x07\x1b7 loading\tnow \n")
    bar = progress.Bar(0, "axolotl train")
    processes.follow(bar, log, earlier)
    assert (bar.text, bar.total) == ("7 loading now", 0)
    with log.open("ab") as handle:
        handle.write(b"\x1b[32mExecuting\x1b[0m graph:  25%|x| 10/40 [00:01]\r")
    processes.follow(bar, log, earlier)
    assert (bar.text, bar.n, bar.total) == ("Executing graph", 10, 40)
    log.write_bytes(b"")
    processes.follow(bar, log, 0)
    assert (bar.text, bar.n) == ("Executing graph", 10)


EVERY = [Stage("pair", 0)]
EVERY += [Stage(name, k) for k in (1, 2) for name in ("generate", "train")] + [Stage("report", 2)]


def test_the_overall_line_estimates_from_earlier_iterations_and_says_nothing_it_does_not_know() -> None:
    seconds = {("pair", 0): 60.0, ("generate", 1): 120.0}
    first = place(EVERY[2], EVERY, seconds, 60.4)
    assert first == "stage 3 of 6 · iteration 1 of 2 · train · 4 min so far"
    seconds |= {("train", 1): 600.0}
    second = [place(EVERY[3], EVERY, seconds, elapsed) for elapsed in (0, 90, 900)]
    assert second[0] == "stage 4 of 6 · iteration 2 of 2 · generate · 13 min so far · about 12 min left"
    assert second[1] == "stage 4 of 6 · iteration 2 of 2 · generate · 14 min so far · about 10 min left"
    assert second[2].endswith("about 10 min left")  # what is over its time is not counted below zero
    assert place(EVERY[0], EVERY, {}, 0) == "stage 1 of 6 · the starting pair · pair"
    done = seconds | {("generate", 2): 100.0, ("train", 2): 600.0}
    assert place(EVERY[5], EVERY, done, 0) == "stage 6 of 6 · report · 25 min so far"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (61, "1 min"), (3599, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert progress.duration(seconds) == words


DEATH = (
    """\
INFO 11-26 07:00:00 [api_server.py:1] Started
(EngineCore pid=7) ERROR 11-26 07:00:01 [core.py:9] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-26 07:00:01 [core.py:9]   File "core.py", line 9, in step
(EngineCore pid=7) ERROR 11-26 07:00:01 [core.py:9] torch.OutOfMemoryError: tried to allocate 2 GiB
(APIServer pid=6) ERROR 11-26 07:00:02 [async_llm.py:3] vllm.v1.engine.exceptions.EngineDeadError: EngineCore died
"""
    + '(APIServer pid=6) ERROR   File "loop.py", line 1, in run\n' * 200
    + """\
(APIServer pid=6) ERROR 11-26 07:00:02 [async_llm.py:3] vllm.v1.engine.exceptions.EngineDeadError: EngineCore died
"""
)


def test_a_server_that_dies_while_it_is_asked_is_one_sentence_that_says_why(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(DEATH)
    with pytest.raises(ThinkSwitchError) as caught:
        servers.Server("", dying(4), log).require_alive(wait=10)
    assert str(caught.value).startswith(
        "The engine stopped during its work (exit code 4): torch.OutOfMemoryError: tried to allocate 2 GiB; "
        f"its log is {log}."
    )


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (
            "(Worker pid=1) ERROR [x.py:1] AssertionError: CPU GDN attention requires BF16.\n"
            "(EngineCore pid=2) ERROR [y.py:1] RuntimeError: Worker failed with error 'CPU GDN', please check\n",
            "AssertionError: CPU GDN attention requires BF16",
        ),
        (
            "ModuleNotFoundError: No module named 'torchvision'\n"
            "1 validation error for ModelConfig\n  Value error, Model architectures ['X'] failed to be inspected.\n",
            "ModuleNotFoundError: No module named 'torchvision'",
        ),
        (
            "Value error, Model architectures ['X'] failed to be inspected.\n",
            "Value error, Model architectures ['X'] failed",
        ),
    ],
)
def test_the_error_that_a_server_died_of_is_named_and_not_those_that_follow_from_it(
    lines: str, named: str, tmp_path: Path
) -> None:
    (tmp_path / "log").write_text(lines)
    assert processes.fault(tmp_path / "log").startswith(named)


def dying(code: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", f"import time, sys; time.sleep(0.3); sys.exit({code})"])
