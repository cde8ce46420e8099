"""Run real commands without waiting for their imports: each runs in a fork of a process that has loaded the engines.

For tests of what a command prints or writes. To test the start of a process, its imports or its
search path, use the `command` fixture.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import runpy
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

# Modules that take long to import; if one is missing, the command imports what it needs itself.
ENGINES = [
    "skops.io",  # first: it searches what is loaded already, and transformers for a long time
    *("torch", "transformers", "peft", "datasets", "lm_eval.tasks", "mergekit.merge"),
    *("axolotl.train", "axolotl.cli.train", "axolotl.core.builders", "axolotl.cli.merge_lora"),
]
SCRIPTS = ("thinkswitch", "axolotl", "lm_eval", "mergekit-yaml", "mergekit-extract-lora")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(ENGINES)


def run(
    words: Sequence[str | Path],
    cwd: Path,
    env: Mapping[str, str],
    timeout: float = 900,
    executable: str = sys.executable,
) -> subprocess.CompletedProcess[str]:
    """Run a Python script, such as `.venv/bin/axolotl`, or `python -m MODULE`, with arguments; output captured, exit code not checked.

    The commands that it starts are those beside `executable`. Raises `subprocess.TimeoutExpired` as `subprocess.run` does.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = CONTEXT.Process(target=_run, args=([*map(str, words)], cwd, dict(env), out, err, executable))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([str(word) for word in words], timeout)
        said = (path.read_text(errors="replace") if path.exists() else "" for path in (out, err))
        return subprocess.CompletedProcess(list(words), process.exitcode, *said)


@contextmanager
def environment(venv: Path) -> Iterator[Path]:
    """A virtual environment as `venv`, except that its engines run in forks: for a `make`, and for what a fork starts.

    What a command prints appears when it has ended; a kill of the command does not reach its fork.
    """
    with tempfile.TemporaryDirectory() as folder:  # the path of a socket has to be short
        mirror, address = Path(folder), f"{folder}/socket"
        (mirror / "bin").mkdir()
        for path in (*venv.iterdir(), *venv.glob("bin/*")):
            if path.name in SCRIPTS:
                script = mirror / "bin" / path.name
                script.write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {address} {path} "$@"\n')
                script.chmod(0o755)
            elif path.name != "bin":
                (mirror / path.relative_to(venv)).symlink_to(path)

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                done = run(*json.load(self.rfile), executable=f"{mirror}/bin/python")
                self.wfile.write(json.dumps([done.returncode, done.stdout, done.stderr]).encode())

        with socketserver.ThreadingUnixStreamServer(address, Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield mirror
            server.shutdown()


def ask(address: str, words: Sequence[str]) -> int:
    """Have the process that serves at an address run a command; its exit code."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        server.sendall(json.dumps([words, str(Path.cwd()), dict(os.environ)]).encode())
        server.shutdown(socket.SHUT_WR)
        with server.makefile() as reply:
            code, out, err = json.load(reply)
    sys.stdout.write(out)
    sys.stderr.write(err)
    return int(code)


def _run(words: list[str], cwd: Path, env: dict[str, str], out: Path, err: Path, executable: str) -> None:
    """The work of a fork: become the command."""
    gc.freeze()  # to collect garbage among what was loaded before would copy all of it
    multiprocessing.set_start_method("fork", force=True)  # as in a command; else a DataLoader loads all engines again
    with suppress(ImportError):
        from multiprocess import context  # `datasets` would spawn a process that loads the engines again

        context._concrete_contexts["spawn"] = context._concrete_contexts["fork"]
    sys.modules.pop("axolotl.core.training_args", None)  # made at its import of the plugins that are known by then
    sys.executable = executable
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        stream.flush()
        with path.open("wb") as handle:
            os.dup2(handle.fileno(), stream.fileno())
    if words[1:2] == ["-m"]:  # python -m MODULE …
        sys.argv = words[2:]
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
