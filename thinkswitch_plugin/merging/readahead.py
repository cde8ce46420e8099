"""mergekit's executor, with the tensors of the next tasks asked from the disk while it works."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit.graph import Executor, Task
from mergekit.io.tasks import LoaderCache, LoadTensor, SaveTensor

from thinkswitch_plugin.merging.tensors import TensorInfo, list_file

PIECE = 2**24  # bytes
WINDOW = 2**30  # bytes asked for ahead of the task at work


class ReadAheadExecutor(Executor):  # type: ignore[misc]
    """Runs the same schedule; a thread tells the kernel (posix_fadvise) what will be needed next."""

    def run(self, quiet: bool = False, desc: str | None = None) -> Iterator[tuple[Task[Any], Any]]:
        """Execute the schedule and yield the target values, as mergekit's own does."""
        reads, needed = self._reads()
        ahead = ReadAhead(reads)
        try:
            for task, value in super().run(quiet=quiet, desc=desc):
                if isinstance(task, SaveTensor):
                    ahead.advance(needed[task])
                yield task, value
        finally:
            ahead.stop()

    def _reads(self) -> tuple[list[TensorInfo], dict[Task[Any], int]]:
        """The tensors in the order in which they are read, and how many bytes each save comes after."""
        reads: list[TensorInfo] = []
        together: list[TensorInfo] = []
        needed: dict[Task[Any], int] = {}
        files: dict[Path, dict[str, TensorInfo]] = {}
        total = 0
        for handle in self.schedule.tasks:
            task = handle.task()
            if isinstance(task, SaveTensor):
                needed[task] = total
                reads += _interleave(together)
                together = []
            name = task.group_label() if isinstance(task, LoadTensor) else None
            if name is None:
                continue
            index = LoaderCache().get(task.model).index
            if index.is_safetensors:
                path = Path(index.base_path) / index.tensor_paths[name]
                if path not in files:
                    files[path] = list_file(path)
                if info := files[path].get(name):  # else it is converted from several
                    together.append(info)
                    total += info.length
        return reads + _interleave(together), needed


def _interleave(together: list[TensorInfo]) -> list[TensorInfo]:
    """Tensors that are worked on at once, in pieces, by turns."""
    pieces = [
        (start, replace(info, start=info.start + start, length=min(PIECE, info.length - start)))
        for info in together
        for start in range(0, info.length, PIECE)
    ]
    return [piece for _, piece in sorted(pieces, key=lambda pair: pair[0])]


class ReadAhead:
    """A thread that asks for parts of files, at most `WINDOW` bytes ahead of what is done."""

    def __init__(self, reads: list[TensorInfo]) -> None:
        self._reads = reads
        self._done = 0
        self._stopped = False
        self._turn = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def advance(self, done: int) -> None:
        """Tell how many bytes of the reads are used up."""
        with self._turn:
            self._done = max(self._done, done)
            self._turn.notify()

    def stop(self) -> None:
        """End the thread."""
        with self._turn:
            self._stopped = True
            self._turn.notify()
        self._thread.join()

    def _run(self) -> None:
        asked = 0
        with ExitStack() as stack, suppress(OSError):  # it is advice: without it reading is only slower
            handles: dict[Path, int] = {}
            for read in self._reads:
                with self._turn:
                    self._turn.wait_for(lambda: self._stopped or asked <= self._done + WINDOW)  # noqa: B023
                    if self._stopped:
                        return
                if read.file not in handles:
                    handles[read.file] = stack.enter_context(read.file.open("rb")).fileno()
                os.posix_fadvise(handles[read.file], read.start, read.length, os.POSIX_FADV_WILLNEED)
                asked += read.length
