"""Look up the rows of JSONL by a key, as many as there may be."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from thinkswitch_plugin import files
from thinkswitch_plugin.files import Line


@contextmanager
def rows_by_key(
    path: Path, key: Callable[[Line, dict[str, Any]], Hashable], *, torn_end: bool = False
) -> Iterator[Callable[[Hashable], tuple[Line, dict[str, Any]] | None]]:
    """A function from a key to the line and the row that have it; memory grows with keys only.

    Args:
        key: of a line and its row; None if the row does not count. Of equal keys the last one counts.
        path, torn_end: as of `files.read_jsonl`, which says what is raised too.
    """
    known: dict[Hashable, tuple[Path, int, int]] = {}
    for where, start, text in files.lines(path, torn_end=torn_end):
        if (name := key(where, files.parse_line(text, where))) is not None:
            known[name] = where.path, where.number, start
    with ExitStack() as stack:
        opened: dict[Path, IO[bytes]] = {}  # one file at a time

        def get(name: Hashable) -> tuple[Line, dict[str, Any]] | None:
            if name not in known:
                return None
            part, number, start = known[name]
            if part not in opened:
                stack.close()
                opened.clear()
                opened[part] = stack.enter_context(part.open("rb", buffering=files.READ_BUFFER))
            opened[part].seek(start)
            where = Line(part, number)
            return where, files.parse_line(opened[part].readline(), where)

        yield get
