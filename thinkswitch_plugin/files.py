"""Read and write the files of a run: completely or not at all, one row at a time."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import orjson
import yaml

from thinkswitch_plugin.errors import ThinkSwitchError

READ_BUFFER = 2**20  # lines are longer than the 8 kB of the default
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def temporary_sibling(path: Path) -> Path:
    """Where `path` is built before it is renamed into place."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears under its name only when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary_sibling(path)
    try:
        with partial.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
        sync_entry(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Build a folder next to `path`; it is renamed to `path` (replacing an old one) if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary_sibling(path)
    remove(partial)
    partial.mkdir()
    try:
        yield partial
        put_in_place(partial, path)
    finally:
        remove(partial)


def put_in_place(built: Path, path: Path) -> None:
    """Give what was built whole its name; an old one is there until the very moment the new one is."""
    _share_as_folder(built)
    sync(built)
    if path.exists() and _exchange(built, path):
        sync_entry(path.parent)
        remove(built)
        return
    remove(path)
    built.replace(path)
    sync_entry(path.parent)


def _share_as_folder(built: Path) -> None:
    """Give a folder's files to those who may read the folder: safetensors writes them for their owner alone."""
    if built.is_dir():
        readers = built.stat().st_mode & 0o444
        for file in built.rglob("*"):
            if file.is_file() and not file.is_symlink() and (file.stat().st_mode & 0o444) != readers:
                file.chmod(file.stat().st_mode & 0o777 | readers)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, if the kernel and the file system support it."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def sync(path: Path) -> None:
    """Have a file, or everything in a folder, reach the disk."""
    if path.is_dir():
        for found in path.rglob("*"):
            if found.is_dir() or found.is_file():
                sync_entry(found)
    sync_entry(path)


def sync_entry(path: Path) -> None:
    """Have one file's content, or one folder's list of names, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 if it is not there."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size if path.is_file() else 0


def free_space(folder: Path) -> int:
    """Bytes that are free where `folder` lies, or will lie."""
    return shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise `ThinkSwitchError` unless so many bytes and a tenth more are free where `folder` lies."""
    free = free_space(folder)
    if free < 1.1 * needed:
        raise ThinkSwitchError(
            f"{what} writes about {needed / 1e9:.1f} GB into {folder}, and {free / 1e9:.1f} GB are free; "
            "make room (KEEP=last prunes old checkpoints) and run the same command again."
        )


def remove(path: Path) -> None:
    """Delete a file, a link or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link(file: Path, target: Path) -> None:
    """Give a file a second name; a copy where the file system has no hard links, or it is another one."""
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copy2(file, target)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 atomically."""
    with atomic_file(path) as handle:
        handle.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    with atomic_file(path) as handle:
        handle.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS) + b"\n")


def read_json(path: Path) -> Any:
    """Parse one JSON file. Raises `ThinkSwitchError` naming the file."""
    try:
        return orjson.loads(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from None
    except orjson.JSONDecodeError as error:
        raise ThinkSwitchError(f"{path} is not valid JSON: {error}.") from None


def unreadable(path: Path, error: OSError) -> ThinkSwitchError:
    """The sentence for a file that cannot be opened."""
    if isinstance(error, PermissionError):
        return ThinkSwitchError(f"{path} cannot be read: you have no permission; see `ls -l {path}`.")
    known = {FileNotFoundError: "does not exist", IsADirectoryError: "is a folder; a file is expected there"}
    return ThinkSwitchError(f"{path} {known.get(type(error), f'cannot be read: {error.strerror}')}.")


class Line(NamedTuple):
    """Where a row stands; as text `pairs.jsonl, line 3`."""

    path: Path
    number: int

    def __str__(self) -> str:
        return f"{self.path}, line {self.number}"


def part_files(path: Path) -> list[Path]:
    """The files `00000.jsonl`, … of a folder that is read as one file, in order; or the file itself.

    A folder `name.jsonl` is not one: it stands where a file is expected.
    """
    return sorted(path.glob("[0-9]*.jsonl")) if not path.suffix and path.is_dir() else [path]


def read_jsonl(path: Path, *, torn_end: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a file or of the files of a folder; blank lines are passed over.

    Reads by line feed alone, since texts may hold U+2028.

    Args:
        torn_end: leave out a last line without line feed, which a killed writer left.

    Raises:
        ThinkSwitchError: the file cannot be read, or a line is broken; named by file and line.
    """
    for where, _, line in lines(path, torn_end=torn_end):
        yield where.number, parse_line(line, where)


def lines(path: Path, *, torn_end: bool = False) -> Iterator[tuple[Line, int, bytes]]:
    """Yield every line that is not blank, the place of its first byte in its file, and its bytes; as `read_jsonl`."""
    for part in part_files(path):
        try:
            handle = part.open("rb", buffering=READ_BUFFER)
        except OSError as error:
            raise unreadable(part, error) from None
        with handle:
            start = 0
            for number, line in enumerate(handle, 1):
                text = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
                if torn_end and not text.endswith(b"\n"):
                    break
                if text and not text.isspace():
                    yield Line(part, number), start + len(line) - len(text), text
                start += len(line)


def parse_line(line: bytes, where: Line) -> dict[str, Any]:
    """One JSONL line as an object. Raises `ThinkSwitchError` naming file and line."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError:
            raise ThinkSwitchError(f"{where}: not UTF-8 text; save the file as JSON lines in UTF-8.") from None
        raise ThinkSwitchError(
            f"{where}: not valid JSON ({error.msg}, column {error.colno}); repair or delete the line."
        ) from None
    if not isinstance(row, dict):
        raise ThinkSwitchError(f"{where}: expected a JSON object, found {type(row).__name__}.")
    return row


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse a YAML mapping safely. Raises `ThinkSwitchError` naming file, line and cause."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError:
        raise ThinkSwitchError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
    try:
        value = yaml.safe_load(text)
        depth(value)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "invalid YAML"
        raise ThinkSwitchError(f"{path}{where}: {problem}.") from None
    except ValueError as error:  # a date such as 2024-13-01, a number such as 0b2
        raise ThinkSwitchError(f"{path}: a value cannot be read: {error}.") from None
    except RecursionError:
        raise ThinkSwitchError(f"{path}: it is nested too deeply, or contains itself.") from None
    if not isinstance(value, dict):
        raise ThinkSwitchError(f"{path}: expected a YAML mapping of keys to values.")
    return value


def depth(value: Any) -> int:
    """How deeply mappings and lists are nested. Raises `RecursionError` for a value that holds itself."""
    if isinstance(value, dict):
        return 1 + max((depth(item) for item in value.values()), default=0)
    if isinstance(value, list):
        return 1 + max((depth(item) for item in value), default=0)
    return 0


def write_yaml(path: Path, value: dict[str, Any], header: str = "") -> None:
    """Write a YAML mapping atomically, keys in their given order."""
    text = "".join(f"# {line}\n" for line in header.splitlines())
    text += yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    write_text(path, text)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a line for each row atomically."""
    with atomic_file(path) as handle:
        handle.writelines(map(dumps_line, rows))


def dumps_line(row: dict[str, Any]) -> bytes:
    """One object as a JSONL line."""
    return orjson.dumps(row) + b"\n"
