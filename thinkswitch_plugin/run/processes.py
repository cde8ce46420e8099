"""Engines as processes: started with their output in a log, followed, ended; and how signals end us."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO

from thinkswitch_plugin.console import printable, say
from thinkswitch_plugin.environment import variable
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run.progress import Bar, last_tqdm

TAIL_LINES = 15
CAUSE_WIDTH = 300
# `RuntimeError: no memory`, `torch.OutOfMemoryError: …`, `Killed`; what a process or a time in front of it says aside.
_NAMES_AN_ERROR = re.compile(
    r"\b[\w.]*(?:Error|Exception)\b: .*|\bValue error, .*|\bKilled\b.*|\bSegmentation fault\b.*"
)
# What vLLM and pydantic write beside the error itself.
_POINTS_AT_ANOTHER = re.compile(
    r"Engine core initialization failed|\d+ validation errors? for |EngineDeadError|Worker failed with error"
    r"|WorkerProc initialization failed|failed to be inspected|Error raised in subprocess"
)
ENGINE_BARS = {"TQDM_MININTERVAL": "0.5"}  # a log of hours must not be a log of bars
HANDLED: set[int] = set()  # signals that `end_on_signals` has taken over
HELD_LOCKS: dict[Path, int] = {}  # by folder: descriptors that a supervisor keeps open until its engine has gone


class Interrupted(KeyboardInterrupt):
    """A signal asked us to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def end_soon(number: int) -> None:
    """From the first signal on: a second Ctrl-C ends at once, other signals nothing, and 30 seconds anything."""
    for sign in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, signal.SIG_IGN)  # `make` passes on what its whole group was sent
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + number))
    last_resort = threading.Timer(30, os._exit, (128 + number,))  # some library may swallow the exception
    last_resort.daemon = True
    last_resort.start()


def end_on_signals() -> None:
    """Have SIGINT, SIGTERM and SIGHUP raise `Interrupted` in the main thread, once."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        end_soon(number)
        raise Interrupted(number)

    if threading.current_thread() is threading.main_thread():
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(sign) is not signal.SIG_IGN:  # as under nohup
                signal.signal(sign, interrupt)
                HANDLED.add(sign)


def end_with_owner(owner: str) -> None:
    """Die at once when the `make` that started us has been killed; it holds no lock, but we do.

    Args:
        owner: its process id; nothing is done without one.
    """

    def wait() -> None:
        import psutil

        with suppress(psutil.NoSuchProcess):  # it has gone already
            psutil.Process(int(owner)).wait()
        os.kill(os.getpid(), signal.SIGKILL)

    if owner.isdigit():
        threading.Thread(target=wait, daemon=True).start()


def spawn(
    command: Sequence[str | Path], log: IO[bytes], env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start an engine under a supervisor that ends all of it when we end, even by SIGKILL."""
    supervisor = Path(__file__).with_name("supervise.py")
    return subprocess.Popen(
        [sys.executable, "-I", str(supervisor), str(os.getpid()), *(str(word) for word in command)],
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=tuple(HELD_LOCKS.values()),
        env={**os.environ, **(env or {})},
    )


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End an engine and all that it started (its supervisor leads a session of its own), gently first."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)  # the supervisor kills what is left after 15 s
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, indented; of a bar that was drawn again and again, how it stood last."""
    return "\n".join(f"    {line}" for line in _last_lines(log)[-lines:]) or "    (no output)"


def fault(log: Path) -> str:
    """The error that ended a server, as its log names it, in one line; else its last line."""
    lines = _last_lines(log)
    named = [found.group() for line in lines if (found := _NAMES_AN_ERROR.search(line))]
    causes = [error for error in named if not _POINTS_AT_ANOTHER.search(error)]
    return (causes or named or lines or ["it wrote nothing"])[-1][:CAUSE_WIDTH].strip().rstrip(".")


def _last_lines(log: Path) -> list[str]:
    text = _end_of(log, 100_000) if log.exists() else ""
    drawn = (printable(line.rstrip().rsplit("\r", 1)[-1]) for line in text.split("\n"))
    return [line for line in drawn if line.strip()]


def _end_of(log: Path, size: int, start: int = 0) -> str:
    """The last `size` bytes of a log as text, none of them before the byte `start`."""
    with log.open("rb") as handle:
        handle.seek(max(start, handle.seek(0, os.SEEK_END) - size))
        return handle.read().decode("utf-8", "replace")


def follow(bar: Bar, log: Path, start: int) -> None:
    """Move a bar to where the engine's last progress line says it is; before the first one, show the last line.

    Args:
        start: what the log held before this engine began, in bytes.
    """
    text = printable(_end_of(log, 4096, start).replace("\r", "\n")).rstrip()
    if (found := last_tqdm(text)) is not None:
        title, done, total = found
        bar.place(done, total, title)
        return
    if not bar.total and text:
        bar.note(" ".join(text.rsplit("\n", 1)[-1].split())[:60])
    bar.update(0)


def run_logged(command: Sequence[str | Path], log: Path, *, env: Mapping[str, str] | None = None, title: str) -> float:
    """Run an engine's command with its output in `log`; return its seconds.

    A command without a folder is the one of the environment that runs us, and so are those that it starts (`torchrun`).
    What the engine's own progress bars write into the log moves ours.
    Raises `ThinkSwitchError` with the log's end if the command fails.
    """
    words, ours = [str(word) for word in command], Path(sys.executable).parent
    if "/" not in words[0]:
        words[0] = str(ours / words[0])
        env = {"PATH": os.pathsep.join(filter(None, (str(ours), variable("PATH")))), **(env or {})}
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"  $ {' '.join(words)}")
    started = time.monotonic()
    with log.open("ab") as handle:
        before = handle.tell()
        process = spawn(words, handle, {**ENGINE_BARS, **(env or {})})
        try:
            with Bar(0, title) as bar:
                while process.poll() is None:
                    time.sleep(0.2)
                    follow(bar, log, before)
                follow(bar, log, before)  # what it wrote at its very end
        except BaseException:
            stop_group(process)
            raise
    if process.returncode != 0:
        stop_group(process)  # a supervisor that was killed could not tidy up
        if os.strerror(errno.ENOSPC) in tail(log):
            raise ThinkSwitchError(
                f"{title} found the disk full (see {log}); make room and run the same command again: it goes on from here."
            )
        raise ThinkSwitchError(f"{title} failed (exit code {process.returncode}); the end of {log}:\n{tail(log)}")
    return time.monotonic() - started
