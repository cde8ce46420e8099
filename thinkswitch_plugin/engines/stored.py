"""The stored answers of a batch: `generations.jsonl`, or for very many a folder of files that are repaired one by one.

    iter-1/generations/00000.jsonl, 00001.jsonl, …   the answers to `rows` requests each, in the order of the requests
    iter-1/generations/.complete.json                {"rows": 100000, "sizes": {"00000.jsonl": 8123456}}

A file that is complete is not read again when a killed generation is resumed, so that takes the time of the few files
that were not.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from thinkswitch_plugin import files
from thinkswitch_plugin.data import batch
from thinkswitch_plugin.run.hashes import read_stamp

COMPLETE = ".complete.json"  # hidden, so that it is no part of what a stamp compares
MOST_OPEN = 8  # answers arrive nearly in order, so few files get any at a time


def repair(path: Path) -> set[str]:
    """Cut off a torn last line and return the ids of all stored answers.

    Stored failures are forgotten, so that a resumed run asks them again.
    Raises `ThinkSwitchError` for a broken line in the middle.
    """
    done: set[str] = set()
    if not path.exists():
        return done
    whole, failures = 0, False
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            if line.strip():
                row = files.parse_line(line.removeprefix(files.BYTE_ORDER_MARK), files.Line(path, number))
                failures = failures or bool(row.get("error"))
                if not row.get("error"):
                    done.add(batch.stored_id(row, files.Line(path, number)))
    if whole < path.stat().st_size:
        os.truncate(path, whole)
    if failures:
        files.write_jsonl(path, (row for _, row in files.read_jsonl(path) if not row.get("error")))
    return done


class StoredAnswers:
    """What is stored already, and where further answers go.

    Args:
        out: a file, or (if its name does not end in `.jsonl`) a folder.
        rows: the requests whose answers one file of a folder holds.
    """

    def __init__(self, out: Path, rows: int) -> None:
        self.out, self.rows, self.total = out, rows, 0
        self.parted = out.suffix != ".jsonl"
        self.done: set[str] = set()
        self.counts: Counter[int] = Counter()  # answers by the number of their file
        self.sizes: dict[str, int] = {}  # of the files that are complete
        self.open: dict[int, IO[bytes]] = {}
        if not self.parted:
            self.done = repair(out)
            return
        known = read_stamp(out / COMPLETE) or {}
        sizes = known.get("sizes", {}) if known.get("rows") == rows else {}
        for path in files.part_files(out) if out.is_dir() else []:
            if sizes.get(path.name) == path.stat().st_size:
                self.sizes[path.name] = sizes[path.name]
                continue
            found = repair(path)
            self.done |= found
            self.counts[int(path.stem)] = len(found)

    def path(self, place: int) -> Path:
        """The file of the request at this place in the batch."""
        return self.out / f"{place // self.rows:05}.jsonl" if self.parted else self.out

    def has(self, place: int, name: str) -> bool:
        """Whether there is an answer to a request, by its place in the batch and its id."""
        return name in self.done or (self.parted and self.path(place).name in self.sizes)

    @contextmanager
    def appending(self, total: int) -> Iterator[None]:
        """Append answers for the length of the block; `total` is the number of requests."""
        self.total = total
        self.path(0).parent.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            for handle in self.open.values():
                handle.close()
            self.open.clear()

    def append(self, place: int, line: bytes, *, answered: bool) -> None:
        """Write one line; if it is the last answer that its file waited for, record that."""
        number = place // self.rows if self.parted else 0
        handle = self.open.get(number)
        if handle is None:
            while len(self.open) >= MOST_OPEN:
                self.open.pop(next(iter(self.open))).close()
            handle = self.open[number] = self.path(place).open("ab")
        handle.write(line)
        handle.flush()
        self.counts[number] += answered
        if self.parted and self.counts[number] == min(self.rows, self.total - number * self.rows):
            self.sizes[self.path(place).name] = handle.tell()
            self.open.pop(number).close()
            files.write_json(self.out / COMPLETE, {"rows": self.rows, "sizes": self.sizes})
