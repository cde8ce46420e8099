"""What the terminal shows: one heading a stage, a bar on long work, engines' chatter in a log."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from thinkswitch_plugin.errors import ThinkSwitchError

TAIL_LINES = 15


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


def die_with_parent() -> None:
    """In a child of ours, on Linux: have the kernel end it if our process is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End a child's whole process group (it leads its own session), gently first."""
    for sign, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 15)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        try:
            process.wait(patience)
            break
        except subprocess.TimeoutExpired:
            continue
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # children that outlived their leader


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
        process = subprocess.Popen(
            words,
            stdout=handle,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            preexec_fn=die_with_parent,
            start_new_session=True,
            env={**os.environ, **(env or {})},
        )
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
        raise ThinkSwitchError(f"{title} failed (exit code {process.returncode}); the end of {log}:\n{tail(log)}")
    return time.monotonic() - started
