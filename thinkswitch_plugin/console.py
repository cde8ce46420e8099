"""What the terminal shows: one heading a stage, a bar on long work, engines' chatter in a log; and how engines end."""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from tqdm import tqdm

from thinkswitch_plugin.errors import ThinkSwitchError

TAIL_LINES = 15
OWNER_VARIABLE = "THINKSWITCH_OWNER"  # process id of the `make` that the user started
HELD_LOCKS: set[int] = set()  # descriptors that a supervisor keeps open until its engine has gone


class Interrupted(KeyboardInterrupt):
    """A signal asked us to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def end_on_signals() -> None:
    """Have SIGINT, SIGTERM and SIGHUP raise `Interrupted` in the main thread, once."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        for sign in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(sign, signal.SIG_IGN)  # `make` passes on what its whole group was sent
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + number))
        last_resort = threading.Timer(30, os._exit, (128 + number,))  # some library may swallow the exception
        last_resort.daemon = True
        last_resort.start()
        raise Interrupted(number)

    if threading.current_thread() is threading.main_thread():
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(sign) is not signal.SIG_IGN:  # as under nohup
                signal.signal(sign, interrupt)


def end_with_owner() -> None:
    """Die at once when the `make` that started us has been killed; it holds no lock, but we do."""
    owner = os.environ.get(OWNER_VARIABLE, "")
    if not owner.isdigit() or not hasattr(os, "pidfd_open"):
        return

    def wait() -> None:
        try:
            select.select([os.pidfd_open(int(owner))], [], [])
        except ProcessLookupError:
            pass  # it has gone already
        except OSError:
            return  # a kernel without this
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def hush_engines() -> None:
    """Keep the imports of torch and transformers from writing about other machines' kernels."""
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def fetch_no_code() -> None:
    """Keep transformers and bitsandbytes, also in the engines started here, from fetching kernels and running them.

    bitsandbytes asks the hub for a CPU kernel at import; a local place that is empty stops it. A setting
    of the user's own counts.
    """
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    os.environ.setdefault("LOCAL_KERNELS", "kernels-community/quantization-bitsandbytes=/nonexistent")


def say(text: str) -> None:
    """One line for the user, at once."""
    print(text, flush=True)


def bar(total: int, title: str, *, initial: int = 0, unit: str = "it") -> tqdm[Any]:
    """A progress bar; away from a terminal it prints a line every ten seconds only."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=f"  {title}",
        unit=unit,
        dynamic_ncols=terminal,
        mininterval=0.1 if terminal else 10.0,
        maxinterval=10.0 if terminal else 60.0,
    )


def spawn(
    command: Sequence[str | Path], log: IO[bytes], env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start an engine under a supervisor that ends all of it when we end, even by SIGKILL."""
    supervisor = Path(__file__).with_name("supervise.py")
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(supervisor), str(os.getpid()), *(str(word) for word in command)],
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=tuple(HELD_LOCKS),
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
    """The last lines of a log, indented."""
    if not log.exists():
        return "    (no output)"
    text = log.read_bytes()[-20_000:].decode("utf-8", "replace").replace("\r", "\n")
    kept = [line.rstrip() for line in text.split("\n") if line.strip()][-lines:]
    return "\n".join(f"    {line}" for line in kept) or "    (no output)"


def run_logged(command: Sequence[str | Path], log: Path, *, env: Mapping[str, str] | None = None, title: str) -> float:
    """Run an engine's command with its output in `log`; return its seconds.

    On a terminal a line shows the time that has passed and the log's last line.
    Raises `ThinkSwitchError` with the log's end if the command fails.
    """
    words = [str(word) for word in command]
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"  $ {' '.join(words)}")
    started = time.monotonic()
    with log.open("ab") as handle:
        process = spawn(words, handle, env)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if sys.stderr.isatty():
                    last = tail(log, 1).strip()[:60]
                    sys.stderr.write(f"\r\x1b[K  {title} {time.monotonic() - started:.0f} s  {last}")
                    sys.stderr.flush()
        except BaseException:
            stop_group(process)
            raise
        finally:
            if sys.stderr.isatty():
                sys.stderr.write("\r\x1b[K")
    if process.returncode != 0:
        stop_group(process)  # a supervisor that was killed could not tidy up
        if os.strerror(errno.ENOSPC) in tail(log):
            raise ThinkSwitchError(
                f"{title} found the disk full (see {log}); make room and run the same command again: it goes on from here."
            )
        raise ThinkSwitchError(f"{title} failed (exit code {process.returncode}); the end of {log}:\n{tail(log)}")
    return time.monotonic() - started
