"""The stages that `make iterate` runs, in forks of one process, so that their imports are paid for once.

Make decides which stages run, and in which order: its plan (`make -n loop`) is what is read here,

    eval "$RUN" 1  # lm-eval -> eval/instruct/, eval/thinking/

and each line is carried out by a fork, as if it were a command of its own: what a stage holds in memory ends with it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from types import FrameType

import click

from thinkswitch_plugin.cli.group import main
from thinkswitch_plugin.environment import has_cuda
from thinkswitch_plugin.run import processes
from thinkswitch_plugin.run.supervise import PR_SET_PDEATHSIG

# What a command imports that takes long, before the first of its forks.
ASKING = ("thinkswitch_plugin.engines.embedded", "thinkswitch_plugin.judging.model", "lm_eval.tasks")
IMPORTED = {
    **dict.fromkeys(("pair", "requests", "generate", "eval"), ASKING),
    **dict.fromkeys(("train", "merge-lora"), ("torch",)),
    "rebuild": ("thinkswitch_plugin.engines.embedded", "thinkswitch_plugin.merging.holding"),
}
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@main.command(hidden=True)
@click.option("--plan", default="", help="What `make -n loop TS=` prints.")
def stages(plan: str) -> None:
    """Carry out the lines of a plan, each in a fork of this process; stop at the first that fails."""
    lines = (shlex.split(line, comments=True) for line in plan.splitlines())
    waiting = [[os.path.expandvars(word) for word in words] for words in lines if words]
    shared = len(waiting) > 1 and not has_cuda()  # a process that has seen a GPU cannot use it in its forks
    for words in waiting:
        for name in IMPORTED.get(words[0], ()) if shared else ():
            with suppress(ModuleNotFoundError):  # the stage that needs it says so
                import_module(name)
        if code := in_a_fork(words):
            sys.exit(code)


def in_a_fork(words: Sequence[str]) -> int:
    """Carry out a command of ours in a fork of this process; its exit code, as a shell counts it."""
    fork = multiprocessing.get_context("fork").Process(target=become, args=(words, os.getpid()))

    def pass_on(number: int, _frame: FrameType | None) -> None:
        if fork.pid and number != signal.SIGINT:  # a terminal sends that one to the fork too
            os.kill(fork.pid, number)

    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # until there is someone to pass them on to
    fork.start()
    before = {sign: signal.signal(sign, pass_on) for sign in ENDING if signal.getsignal(sign) is not signal.SIG_IGN}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    try:
        fork.join()
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
    code = fork.exitcode or 0
    return code if code >= 0 else 128 - code


def become(words: Sequence[str], parent: int) -> None:
    """Be the command, for as long as the parent lives."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    sys.argv = ["thinkswitch", *words]
    try:
        main(list(words))
    except processes.Interrupted as signalled:  # before the command looks after that itself
        sys.exit(128 + signalled.number)
