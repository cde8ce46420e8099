"""Run one engine's command, and leave nothing of it behind, however we or our caller end.

    python -I supervise.py CALLER_PID COMMAND…

Engines start processes of their own (vLLM's workers, accelerate's ranks). If the caller is killed,
nobody tells those to end. This process adopts every orphan below it, so it can always find them:

- the command ended: what it left running is killed, and its exit code passed on;
- SIGTERM: everything below is asked to end, and killed after `PATIENCE` seconds;
- the caller died (the kernel tells us): everything below is killed at once.

The caller's lock on the run folder may be handed down to here (not to the engine), so that it is free only
when the last process has gone. It imports little, since it must start at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil

PATIENCE = 15.0
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
AWAITED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}


def signal_all(sign: signal.Signals) -> bool:
    """Send a signal to everything below us that still runs; whether there was anything."""
    found = False
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                process.send_signal(sign)
                found = True
    return found


def kill_all() -> None:
    """Kill everything below us, also what is started meanwhile."""
    while signal_all(signal.SIGKILL):
        time.sleep(0.01)


def reap() -> dict[int, int]:
    """Exit codes of the children that have ended, by process id, as a shell counts them."""
    ended: dict[int, int] = {}
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(found[1])
            ended[found[0]] = 128 - code if code < 0 else code
    return ended


def supervise(caller: int, command: list[str]) -> int:
    """Run the command to its end or ours; return the exit code."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != caller:  # it died before the kernel was asked to tell us
        return 128 + signal.SIGTERM
    us = os.getpid()

    def in_the_engine() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, AWAITED)
        if os.getppid() != us:
            os._exit(1)

    try:
        engine = subprocess.Popen(command, preexec_fn=in_the_engine)
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}", file=sys.stderr)
        return 127
    deadline = None
    while True:
        left = 3600.0 if deadline is None else deadline - time.monotonic()
        found = signal.sigtimedwait(AWAITED, max(0.0, left))
        code = reap().get(engine.pid)
        if code is not None:
            kill_all()
            return code
        if found is None and deadline is not None:
            kill_all()
            return 128 + signal.SIGKILL
        if found is not None and found.si_signo != signal.SIGCHLD:
            if os.getppid() != caller:
                kill_all()
                return 128 + signal.SIGTERM
            if deadline is None:
                deadline = time.monotonic() + PATIENCE
                signal_all(signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(supervise(int(sys.argv[1]), sys.argv[2:]))
