"""A JSONL file, or a folder of them that is read as if it were one file: `generations/00000.jsonl`, `00001.jsonl`, …"""

from __future__ import annotations

import bisect
import io
import itertools
from pathlib import Path
from typing import IO, Any


def has_parts(path: Path) -> bool:
    """Whether this is a folder of parts; a folder `name.jsonl` stands where a file is expected."""
    return not path.suffix and path.is_dir()


def part_files(path: Path) -> list[Path]:
    """The files of a folder in order, or the file itself."""
    return sorted(path.glob("[0-9]*.jsonl")) if has_parts(path) else [path]


def located(path: Path, number: int) -> str:
    """`generations/00017.jsonl, line 3` for a line number that counts the lines of all parts."""
    for part in part_files(path):
        with part.open("rb") as handle:
            lines = sum(1 for _ in handle)
        if number <= lines:
            return f"{part}, line {number}"
        number -= lines
    return f"{path}, line {number}"


def open_parts(path: Path, buffering: int) -> IO[bytes]:
    """The files of a folder, one behind the other, for reading; or the file. Raises `OSError` as `open`."""
    if not has_parts(path):
        return path.open("rb", buffering=buffering)
    return io.BufferedReader(_Joined(part_files(path)), buffering)


class _Joined(io.RawIOBase):
    """Several files as one; only one of them is open at a time."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._starts = [0, *itertools.accumulate(path.stat().st_size for path in paths)]
        self._open: tuple[int, IO[bytes] | io.RawIOBase] = (-1, io.BytesIO())
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._starts[-1]}[whence]
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        if self._place >= self._starts[-1]:
            return 0
        number = bisect.bisect_right(self._starts, self._place) - 1
        if self._open[0] != number:
            self._open[1].close()
            self._open = number, self._paths[number].open("rb", buffering=0)
        self._open[1].seek(self._place - self._starts[number])
        count = int(self._open[1].readinto(buffer) or 0)  # type: ignore[union-attr]
        self._place += count
        return count

    def close(self) -> None:
        self._open[1].close()
        super().close()
