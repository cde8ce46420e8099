"""What a run's stamps compare: sha256 of files and folders, remembered so that nothing is read twice."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError

CARD = "README.md"  # of a folder; documentation, which may be completed and corrected
CLOCK_TICK = 20_000_000  # ns; two writes within one tick of the file system's clock look alike


def read_stamp(path: Path) -> dict[str, Any] | None:
    """A stamp's values; None if there is none or it is damaged."""
    try:
        found = files.read_json(path)
    except (ThinkSwitchError, OSError):
        return None
    return found if isinstance(found, dict) else None


def within(value: Any, folder: Path) -> Any:
    """JSON values with every path inside a run folder written from that folder on, so that the run may be moved."""
    if isinstance(value, str):
        return value.removeprefix(f"{folder}/")
    if isinstance(value, dict):
        return {within(key, folder): within(item, folder) for key, item in value.items()}
    return [within(item, folder) for item in value] if isinstance(value, list | tuple) else value


class Hashes:
    """sha256 of files and folders, remembered by size and times so that nothing is read twice.

    A pruned file keeps the hash it had, so pruning makes nothing run again.
    """

    def __init__(self, folder: Path, *, trust: bool = True) -> None:
        """The hashes of a run folder.

        Args:
            trust: take a file that looks unchanged as unchanged; else everything is read.
        """
        self.folder = folder
        self.memory = folder / ".stamps" / "hashes.json"
        self.known: dict[str, list[Any]] = within(read_stamp(self.memory) or {}, folder) if trust else {}
        self.prunings = folder / ".stamps" / "pruned.json"
        self.pruned: dict[str, str] = within(read_stamp(self.prunings) or {}, folder)
        self.changed = False

    def of(self, path: Path) -> str | None:
        """The hash of a file, or of all files that make up a folder; None if it is not there.

        Cards and hidden files do not count, and of a checkpoint nothing that is no part of it.
        """
        if path.is_dir():
            digest = hashlib.sha256()
            for file, found in self._files(path, parts_only=True).items():
                digest.update(f"{file.relative_to(path)}\0{found}\0".encode())
            return digest.hexdigest()
        return self._file(path) if path.is_file() else None

    def name(self, path: Path) -> str:
        """A path as stamps hold it: from the run folder on if it lies in there."""
        return str(path.relative_to(self.folder) if path.is_relative_to(self.folder) else path)

    def files(self, path: Path) -> dict[str, str]:
        """The hash of a file, or of every file of a folder (but cards) by its name in stamps, pruned ones among them."""
        found = {path: self._file(path)} if path.is_file() else self._files(path)
        return {self.name(file): hashed for file, hashed in found.items()}

    def _files(self, path: Path, *, parts_only: bool = False) -> dict[Path, str]:
        """The files of a folder; `parts_only` leaves out what `of` does not count."""
        from thinkswitch_plugin.run.checkpoint import FETCHED

        # What the hub's client adds to a checkpoint's folder later, or git keeps there, makes no other checkpoint of it.
        patterns = (*FETCHED, "*.yml") if (path / "config.json").is_file() else ("*",)

        def counts(file: Path) -> bool:
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            return not hidden and any(fnmatch(file.name, pattern) for pattern in patterns)

        every = (file for file in path.rglob("*") if file.is_file() and file.name != CARD)
        there = {file: self._file(file) for file in every if not parts_only or counts(file)}
        gone = {file: self.pruned[self.name(file)] for file in self._pruned_of(path)}
        return dict(sorted((gone | there).items()))

    def _pruned_of(self, path: Path) -> list[Path]:
        """The files of a folder that were pruned."""
        return [file for name in self.pruned if path in (file := self.folder / name).parents]

    def missing(self, path: Path) -> list[Path]:
        """The files of a folder that were pruned and are not there again."""
        return [file for file in self._pruned_of(path) if not file.is_file()]

    def prune(self, paths: Iterable[Path]) -> None:
        """Delete files, and remember their hashes first."""
        chosen = list(paths)
        self.pruned |= {self.name(p): self._file(p) for p in chosen}
        files.write_json(self.prunings, self.pruned)
        for path in chosen:
            path.unlink()

    def forget_pruned(self, path: Path) -> None:
        """What lay at `path` is made anew: its pruned files count no longer."""
        made = {self.name(file) for file in self._pruned_of(path)}
        kept = {name: found for name, found in self.pruned.items() if name not in made}
        if kept != self.pruned:
            self.pruned = kept
            files.write_json(self.prunings, kept)

    def _file(self, path: Path) -> str:
        status = path.stat()
        # The change time cannot be set back, so a file of equal size copied with its old time is seen.
        mark = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        found = self.known.get(self.name(path))
        if isinstance(found, list) and found[:-1] == mark:
            return str(found[-1])
        return self._read(path, mark)

    def _read(self, path: Path, mark: list[int]) -> str:
        with path.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
        if time.time_ns() - mark[2] > CLOCK_TICK:
            self.known[self.name(path)] = [*mark, found]
            self.changed = True
        return found

    def save(self) -> None:
        """Write the memory back if anything was read."""
        if self.changed:
            files.write_json(self.memory, self.known)
            self.changed = False
