"""What the processes of a run use, stage by stage: memory, GPU memory, bytes written, and the disk that the folder takes."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from thinkswitch_plugin import files
from thinkswitch_plugin.environment import has_cuda

PAUSE = 0.2, 2.0  # seconds between two looks: nine times as long as a look takes, but at least and at most these


def anonymous(pid: int, *, shared: bool) -> int:
    """Bytes of anonymous memory of a process. With `shared`, what forks share is split between them, which takes long to read."""
    name, field = ("smaps_rollup", "Pss_Anon:") if shared else ("status", "RssAnon:")
    text = Path(f"/proc/{pid}/{name}").read_text()
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field))


def written(pid: int) -> int:
    """Bytes that a process has written to disks so far, with its children that have ended."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["write_bytes"])


def gpu_memory(what: str = "used") -> int:
    """Bytes of GPU memory in use, by anyone, or `total`; of the largest GPU, 0 without one."""
    if not has_cuda():
        return 0
    query = ["nvidia-smi", f"--query-gpu=memory.{what}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
        return max(map(int, answer.split())) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0


class Watch(threading.Thread):
    """Looks at a process and all below it until `end`; figures are kept in a file, so that a resumed run adds to them.

    Args:
        process: whose memory counts, with all that it starts.
        stage: which stage is at work; None between two.
        path: {"generate-1": {"memory": bytes at most, "gpu": …, "written": …}, "disk": bytes at most}.
    """

    def __init__(self, process: int, stage: Callable[[], str | None], folder: Path, path: Path) -> None:
        super().__init__(daemon=True)
        self.process, self.stage, self.folder, self.path = psutil.Process(process), stage, folder, path
        self.figures: dict[str, Any] = files.read_json(path) if path.is_file() else {"disk": 0}
        self.written = 0  # bytes so far
        self.most: dict[str, int] = {}  # bytes of memory by stage, what forks share counted for each
        self.ended = threading.Event()

    def run(self) -> None:
        """Look again and again."""
        while not self.ended.is_set():
            began = time.monotonic()
            self.look()
            self.ended.wait(min(max(PAUSE[0], 9 * (time.monotonic() - began)), PAUSE[1]))

    def look(self) -> None:
        """Take all figures once."""
        most = total = 0
        pids = [self.process.pid]
        with suppress(psutil.NoSuchProcess):
            pids += [child.pid for child in self.process.children(recursive=True)]
            for pid in pids:
                with suppress(OSError, ValueError, KeyError):  # it has ended
                    most += anonymous(pid, shared=False)
                    total += written(pid)
        wrote, self.written = max(0, total - self.written), max(total, self.written)
        with suppress(OSError):  # a file has gone meanwhile
            self.figures["disk"] = max(self.figures["disk"], files.size(self.folder))
        if (name := self.stage()) is None:
            return
        before = self.figures.get(name)
        found = before or {"memory": 0, "gpu": 0, "written": 0}
        memory = 0
        if most > self.most.get(name, 0):  # else it is not a new peak
            self.most[name] = most
            for pid in pids:
                with suppress(OSError, ValueError):
                    memory += anonymous(pid, shared=True)
        self.figures[name] = {
            "memory": max(found["memory"], memory),
            "gpu": max(found["gpu"], gpu_memory()),
            "written": found["written"] + wrote,
        }
        if before is None:
            files.write_json(self.path, self.figures)

    def end(self) -> dict[str, Any]:
        """Stop looking; the figures."""
        self.ended.set()
        self.join()
        files.write_json(self.path, self.figures)
        return self.figures
