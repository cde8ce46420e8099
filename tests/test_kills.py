"""Killed processes, signals and full disks: what is left behind, what is printed, and what keeps running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from tests.conftest import ROOT
from thinkswitch_plugin import files, run
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run import checkpoint, supervise
from thinkswitch_plugin.training import distil

# An engine whose worker has a session of its own and ignores SIGTERM, as the worst of them do.
ENGINE = """
import os, signal, subprocess, sys, time
worker = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(300)"
child = subprocess.Popen([sys.executable, "-c", worker], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print(os.getpid(), child.pid, flush=True)
"""
CALLER = """
import sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from thinkswitch_plugin import run
from thinkswitch_plugin.run import processes
with run.locked(Path(sys.argv[1])), open(sys.argv[2], "ab") as log:
    process = processes.spawn([sys.executable, "-c", sys.argv[3]], log)
    print(process.pid, flush=True)
    process.wait()
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(found: Any, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not found() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(found())


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_of_an_engine_outlives_its_caller_and_the_lock_is_held_until_then(
    tmp_path: Path, sign: signal.Signals
) -> None:
    log = tmp_path / "log"
    words = [sys.executable, "-c", CALLER, str(tmp_path / "run"), str(log), ENGINE + "time.sleep(300)"]
    caller = subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT)
    assert wait_for(lambda: log.is_file() and len(log.read_text().split()) == 2)
    engine, worker = map(int, log.read_text().split())
    assert alive(engine) and alive(worker)
    with pytest.raises(ThinkSwitchError, match="Another command is at work"), run.locked(tmp_path / "run", patience=0):
        pass
    caller.send_signal(sign)
    caller.wait()
    with run.locked(tmp_path / "run"):
        assert not alive(engine) and not alive(worker)


def test_what_a_finished_engine_left_running_is_ended_and_its_exit_code_passed_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = [sys.executable, "-c", CALLER.replace("process.wait()", "sys.exit(process.wait())"), str(tmp_path / "run")]
    done = subprocess.run([*words, str(log), ENGINE + "sys.exit(7)"], cwd=ROOT, capture_output=True)
    engine, worker = map(int, log.read_text().split())
    assert done.returncode == 7 and not alive(engine) and not alive(worker)


def supervised(*words: str, caller: int | None = None) -> subprocess.CompletedProcess[str]:
    script = str(Path(supervise.__file__))
    return subprocess.run(
        [sys.executable, "-I", script, str(caller or os.getpid()), *words], capture_output=True, text=True
    )


def test_an_engine_whose_caller_died_first_is_never_started(tmp_path: Path) -> None:
    assert supervised("touch", str(tmp_path / "started"), caller=1).returncode == 143
    assert not (tmp_path / "started").exists()


def test_exit_codes_are_those_of_a_shell() -> None:
    assert supervised("sh", "-c", "exit 3").returncode == 3
    assert supervised("sh", "-c", "kill -9 $$").returncode == 137
    missing = supervised("/nowhere/engine")
    assert missing.returncode == 127 and "cannot be started: No such file" in missing.stderr


COMMAND = """
import os
import signal
import time
for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(sign, signal.SIG_DFL)  # who runs the tests may have had some of them ignored
from thinkswitch_plugin import cli
from thinkswitch_plugin import files
from pathlib import Path

@cli.main.command("work")
def work() -> None:
    with files.atomic_file(Path("out.bin")) as handle:
        print("at work", flush=True)
        {body}

cli.main()
"""


def a_command(tmp_path: Path, body: str, limit: str = "", command: str = "work", **env: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", COMMAND.format(body=body), command]
    if limit:
        words = ["sh", "-c", f'ulimit -f {limit}; exec "$@"', "sh", *words]
    return subprocess.Popen(
        words,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("command", ["work", "stages"])
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_is_one_sentence_and_leaves_no_half_file(
    tmp_path: Path, sign: signal.Signals, code: int, command: str
) -> None:
    body = "handle.write(b'x'); handle.flush(); time.sleep(60)"
    process = a_command(tmp_path, body, command=command, THINKSWITCH_PLAN="work")
    assert process.stdout is not None and process.stdout.readline() == "at work\n"
    if sign == signal.SIGINT:
        os.killpg(process.pid, sign)  # as a terminal does
    else:
        process.send_signal(sign)  # as `make` does
    _, errors = process.communicate()
    assert process.returncode == code
    assert errors.strip() == "thinkswitch: stopped; run the same command again to continue."
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(tmp_path: Path) -> None:
    process = a_command(tmp_path, "handle.write(bytes(1 << 20))", limit="64")
    _, errors = process.communicate()
    assert process.returncode == 1 and len(errors.strip().splitlines()) == 1
    assert "the disk has no room left" in errors and "run the same command again" in errors
    assert list(tmp_path.iterdir()) == []


def test_a_stage_ends_when_the_process_that_it_is_a_fork_of_is_killed(tmp_path: Path) -> None:
    process = a_command(
        tmp_path, "print(os.getpid(), flush=True); time.sleep(60)", command="stages", THINKSWITCH_PLAN="work"
    )
    assert process.stdout is not None and process.stdout.readline() == "at work\n"
    fork = int(process.stdout.readline())
    assert fork != process.pid and alive(fork)
    process.kill()
    process.communicate(timeout=10)
    assert wait_for(lambda: not alive(fork), 10)


def test_a_stage_ends_when_the_make_that_started_it_is_killed(tmp_path: Path) -> None:
    owner = subprocess.Popen(["sleep", "300"])
    process = a_command(tmp_path, "time.sleep(60)", THINKSWITCH_OWNER=str(owner.pid))
    assert process.stdout is not None and process.stdout.readline() == "at work\n"
    owner.kill()
    owner.wait()
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGKILL


def test_a_new_folder_takes_its_name_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "checkpoint", tmp_path / ".checkpoint.partial"
    for folder, name in ((old, "old"), (new, "new")):
        folder.mkdir()
        (folder / name).touch()
    removed: list[list[str]] = []
    remove = files.remove

    def look(path: Path) -> None:
        removed.append(sorted(p.name for p in old.iterdir()))
        remove(path)

    monkeypatch.setattr(files, "remove", look)
    files.put_in_place(new, old)
    assert removed == [["new"]]  # before anything was deleted the new one was there
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_new_folder_takes_its_name_where_names_cannot_be_swapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new/file").touch()
    files.put_in_place(tmp_path / "new", tmp_path / "old")
    assert [p.name for p in (tmp_path / "old").iterdir()] == ["file"] and not (tmp_path / "new").exists()


def test_weights_can_be_read_by_whoever_may_read_their_folder(tmp_path: Path) -> None:
    for folder, mode, expected in (("open", 0o755, 0o644), ("private", 0o700, 0o600)):
        with files.atomic_folder(tmp_path / folder) as building:
            building.chmod(mode)
            (building / "inside").mkdir()
            for name in ("a.safetensors", "inside/b.safetensors"):
                (building / name).touch()
                (building / name).chmod(0o600)
        assert {p.stat().st_mode & 0o777 for p in (tmp_path / folder).rglob("*.safetensors")} == {expected}


def test_a_training_checkpoint_cut_short_is_not_gone_on_with(tmp_path: Path) -> None:
    for step in (9, 16, 120):
        files.write_json(tmp_path / f"checkpoint-{step}" / "trainer_state.json", {})
    (tmp_path / "checkpoint-120" / "trainer_state.json").write_text('{"epo')
    (tmp_path / "checkpoint-128").mkdir()
    assert [p.name for p in distil.whole_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-16"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-16", "checkpoint-9"]


class Stalling(BaseHTTPRequestHandler):
    """Serves the model `m`, and never answers a question."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        body = b'{"data": [{"id": "m"}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.asked.append(self.path)
        time.sleep(30)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("sign", "code", "seconds"),
    # once all are asked, and while connections are made, within the tasks of the client
    [(signal.SIGINT, 130, None), (signal.SIGTERM, 143, None), (signal.SIGINT, 130, 0.04), (signal.SIGTERM, 143, 0.06)],
)
def test_a_signal_while_answers_are_awaited_is_one_sentence(
    tmp_path: Path, write_jsonl: Any, sign: signal.Signals, code: int, seconds: float | None
) -> None:
    Stalling.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stalling)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    body = {"model": "m", "messages": [{"role": "user", "content": "?"}], "max_tokens": 8}
    rows = [{"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body} for n in range(8)]
    requests = write_jsonl("requests.jsonl", rows)
    ask = (
        "from thinkswitch_plugin.engines.generate import generate; from thinkswitch_plugin.args import EngineKeys; "
        f"import openai; print('asking', flush=True); generate(Path({str(requests)!r}), Path('answers.jsonl'), 'm', "
        f"'http://127.0.0.1:{server.server_port}/v1', EngineKeys(), log=Path('log'))"
    )
    process = a_command(tmp_path, ask)
    assert process.stdout is not None and [process.stdout.readline() for _ in range(2)][1] == "asking\n"
    if seconds is None:
        assert wait_for(lambda: len(Stalling.asked) == len(rows))
    else:
        time.sleep(seconds)
    process.send_signal(sign)
    _, errors = process.communicate(timeout=25)
    server.shutdown()
    assert process.returncode == code and "Traceback" not in errors
    assert "thinkswitch: stopped; run the same command again to continue." in errors


def test_a_hub_that_cannot_be_reached_is_one_sentence_and_its_cache_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("[Errno -2] Name or service not known")

    files.write_json(tmp_path / "abc123" / "config.json", {})
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "abc123"))
    assert checkpoint.resolve("org/model", None, "instruct") == (tmp_path / "abc123", "abc123")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        ThinkSwitchError,
        match=r"org/model is not a folder, and cannot be downloaded from the hub: .*Name or service not known; check",
    ):
        checkpoint.resolve("org/model", None, "instruct")


def test_a_checkpoint_that_does_not_fit_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    listed = [("model.safetensors", 8_000_000_000), ("pytorch_model.bin", 9_000_000_000), ("config.json", 100)]
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in listed]
    info = SimpleNamespace(siblings=siblings, sha="0" * 40)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("fetched"))
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=4_000_000_000))
    with pytest.raises(ThinkSwitchError, match=r"org/model writes about 8\.0 GB into .*, and 4\.0 GB are free"):
        checkpoint.resolve("org/model", None, "instruct")


def test_the_losses_of_a_training_are_those_that_the_trainer_logged(tmp_path: Path) -> None:
    state = tmp_path / "trainer_state.json"
    assert distil.training_losses(state) == []
    history = [{"step": n, "loss": 1 / n, "epoch": n / 9} for n in range(1, 500)] + [
        {"step": 500, "train_runtime": 9.0}
    ]
    files.write_json(state, {"log_history": history})
    found = distil.training_losses(state)
    assert found[:2] == [[1, 1.0], [4, 0.25]] and len(found) == 167 and found[-1][0] == 499
