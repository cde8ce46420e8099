"""Lines for the user, and engines kept from writing their own."""

from __future__ import annotations

import logging
import os
import sys
import unicodedata
from collections.abc import Collection, Iterable, Sequence

from click import unstyle


def quiet_engines() -> None:
    """Keep the imports of torch and transformers from writing about other machines' kernels."""
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def fetch_no_code() -> None:
    """Keep transformers and bitsandbytes from downloading and running kernels, also in the engines that are started here.

    bitsandbytes asks the hub for a CPU kernel at import; a local place that is empty stops it. A setting
    of the user's own counts.
    """
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    os.environ.setdefault("LOCAL_KERNELS", "kernels-community/quantization-bitsandbytes=/nonexistent")


def printable(text: str) -> str:
    """Text of a model or an engine without what could steer a terminal: escape codes, and other control characters."""
    return "".join(c for c in unstyle(text) if c in "\n\t" or unicodedata.category(c) != "Cc")


def some(names: Sequence[str], most: int = 5) -> str:
    """How many names there are, and the first of them: `7 (p00003, p00008, …)`."""
    return f"{len(names)} ({', '.join(names[:most])}{', …' if len(names) > most else ''})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table as lines."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str] = ()) -> None:
    """A table on the terminal, its columns aligned to the right but for those named in `left`."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title)
    for name in header:
        shown.add_column(name, justify="left" if name in left else "right", overflow="fold")  # never cut a task's name
    for row in rows:
        shown.add_row(*row)
    Console(width=None if os.isatty(1) else 120).print(shown)


def say(text: str) -> None:
    """One line for the user, at once."""
    print(text, flush=True)


def notice(text: str) -> None:
    """One line about how the work goes; on the standard error, since the standard output may be data."""
    print(text, file=sys.stderr, flush=True)
