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


class Hashes:
    """sha256 of files and folders, remembered by size and times so that nothing is read twice.

    A pruned file keeps the hash it had, so pruning makes nothing run again.
    """

    def __init__(self, folder: Path, *, trust: bool = True) -> None:
        """The hashes of a run folder.

        Args:
            trust: take a file that looks unchanged as unchanged; else everything is read.
        """
        self.memory = folder / ".stamps" / "hashes.json"
        self.known: dict[str, list[Any]] = (read_stamp(self.memory) or {}) if trust else {}
        self.prunings = folder / ".stamps" / "pruned.json"
        self.pruned: dict[str, str] = read_stamp(self.prunings) or {}
        self.changed = False

    def of(self, path: Path) -> str | None:
        """The hash of a file, or of all files that make up a folder; None if it is not there.

        Cards and hidden files do not count, and of a checkpoint nothing that is no part of it.
        """
        if path.is_dir():
            digest = hashlib.sha256()
            for file, found in self.files(path, parts_only=True).items():
                digest.update(f"{Path(file).relative_to(path)}\0{found}\0".encode())
            return digest.hexdigest()
        return self._file(path) if path.is_file() else None

    def files(self, path: Path, *, parts_only: bool = False) -> dict[str, str]:
        """The hash of a file, or of every file of a folder (but cards) by its path, pruned ones among them.

        Args:
            parts_only: leave out what `of` does not count.
        """
        if path.is_file():
            return {str(path): self._file(path)}
        from thinkswitch_plugin.run.checkpoint import FETCHED

        # What the hub's client adds to a checkpoint's folder later, or git keeps there, makes no other checkpoint of it.
        patterns = (*FETCHED, "*.yml") if (path / "config.json").is_file() else ("*",)

        def counts(file: Path) -> bool:
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            return not hidden and any(fnmatch(file.name, pattern) for pattern in patterns)

        every = (file for file in path.rglob("*") if file.is_file() and file.name != CARD)
        there = {file: self._file(file) for file in every if not parts_only or counts(file)}
        gone = {Path(f): h for f, h in self.pruned.items() if path in Path(f).parents}
        return {str(file): found for file, found in sorted((gone | there).items())}

    def missing(self, path: Path) -> list[str]:
        """The files of a folder that were pruned and are not there again."""
        return [f for f in self.pruned if path in Path(f).parents and not Path(f).is_file()]

    def prune(self, paths: Iterable[Path]) -> None:
        """Delete files, and remember their hashes first."""
        chosen = list(paths)
        self.pruned |= {str(p): self._file(p) for p in chosen}
        files.write_json(self.prunings, self.pruned)
        for path in chosen:
            path.unlink()

    def forget_pruned(self, path: Path) -> None:
        """What lay at `path` is made anew: its pruned files count no longer."""
        kept = {f: h for f, h in self.pruned.items() if path not in Path(f).parents}
        if kept != self.pruned:
            self.pruned = kept
            files.write_json(self.prunings, kept)

    def _file(self, path: Path) -> str:
        status = path.stat()
        # The change time cannot be set back, so a file of equal size copied with its old time is seen.
        mark = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        found = self.known.get(str(path))
        if isinstance(found, list) and found[:-1] == mark:
            return str(found[-1])
        return self._read(path, mark)

    def _read(self, path: Path, mark: list[int]) -> str:
        with path.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()
        if time.time_ns() - mark[2] > CLOCK_TICK:
            self.known[str(path)] = [*mark, found]
            self.changed = True
        return found

    def save(self) -> None:
        """Write the memory back if anything was read."""
        if self.changed:
            files.write_json(self.memory, self.known)
            self.changed = False
