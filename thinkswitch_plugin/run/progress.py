"""How far a piece of work is: a live view on a terminal, a line now and then elsewhere, a small file for `make status`.

rich draws the live view and tqdm words the lines; NO_COLOR and TERM=dumb count, and what is no terminal gets
neither carriage returns nor escape codes.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkswitch_plugin import files

if TYPE_CHECKING:
    from rich.progress import Progress

QUIET_SECONDS = 30.0  # away from a terminal long work prints a line at most so often
RECORD_SECONDS = 2.0  # the file for `make status` is written at most so often
# `Running generate_until requests:  37%|███▋      | 148/400 [00:12<00:20, 12.3it/s]`, also with vLLM's words.
_TQDM = re.compile(
    r"^(?P<title>.*?):?[ \t]*(?P<percent>\d{1,3})%[^\n]*\|[ \t]*"
    r"(?P<done>\d+(?:\.\d+)?)(?P<done_unit>[kMGT]?)/(?P<total>\d+(?:\.\d+)?)(?P<total_unit>[kMGT]?)[^\d.]",
    re.MULTILINE,
)
_THOUSANDS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class Work:
    """A stage at work, as `make status` reads it from another process.

    Args:
        path: where it is recorded; a record that cannot be written stops nothing.
        facts: stage, iteration and whatever else is known from the start.
        where: one line that says where the run is, made anew each time it is shown.
    """

    def __init__(self, path: Path, facts: dict[str, Any], where: Callable[[], str]) -> None:
        self.path, self.where = path, where
        self.facts: dict[str, Any] = {**facts, "pid": os.getpid(), "began": time.time()}
        self.recorded = 0.0

    def record(self, **facts: Any) -> None:
        """Write what is known now, with these facts added."""
        self.facts |= facts
        self.recorded = time.monotonic()
        with suppress(OSError):
            files.write_json(self.path, self.facts)


_current: ContextVar[Work | None] = ContextVar("stage at work", default=None)
_shown: list[Progress] = []  # the view on the terminal, in which every open bar is a row


@contextmanager
def working(work: Work) -> Iterator[None]:
    """Record a stage for the length of the block, with every bar in it; what fails is recorded and raised again."""
    before = _current.set(work)
    work.record()
    try:
        yield
    except BaseException as error:
        why = (str(error) or type(error).__name__) if isinstance(error, Exception) else "it was stopped by a signal"
        work.record(failed={"at": time.time(), "why": why})
        raise
    else:
        with suppress(OSError):
            work.path.unlink(missing_ok=True)  # its stamp says that it is done
    finally:
        _current.reset(before)


def take_down() -> None:
    """Take the view away: what follows on the terminal is an error, or the shell's prompt."""
    while _shown:
        _shown.pop().stop()


def last_tqdm(text: str) -> tuple[str, int, int] | None:
    """What the last of tqdm's lines in an engine's output says: (title, done, total); None if there is none."""
    every = list(_TQDM.finditer(text.replace("\r", "\n") + "\n"))
    if not every:
        return None
    found = every[-1]
    done, total = (round(float(found[name]) * _THOUSANDS[found[f"{name}_unit"]]) for name in ("done", "total"))
    return found["title"].strip(), done, total


def duration(seconds: float) -> str:
    """Seconds in words: `42 s`, `3 min`, `2 h 5 min`."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def amount(value: float, unit: str) -> str:
    """A count as it is shown; bytes as kB, MB, GB."""
    if unit == "B":
        from rich.filesize import decimal

        return decimal(int(value))
    return f"{value:,.0f}"


class Bar:
    """Progress of one piece of work.

    Args:
        total: how much there is to do; 0 where that is not known.
        initial: how much was done before, which says nothing about the speed.
        unit: what is counted.
    """

    def __init__(self, total: float, title: str, *, initial: float = 0, unit: str = "it") -> None:
        self.title, self.total, self.unit, self.text = title, total, unit, ""
        self.n = self.initial = initial
        self.begun = self.started = self.shown = time.monotonic()
        self.between = False  # an engine's own bar is full, and no other has come yet
        self.work = _current.get()
        self.view = _view(self.work)
        if self.view is not None:
            self.task = self.view.add_task(title, total=total or None, completed=int(initial), beside="")
            self.view.start()
        self.update(0)

    @property
    def elapsed(self) -> float:
        """Seconds since the start, or since the work last changed its kind."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float | None:
        """Seconds that are left at the speed so far; None where it is not known."""
        done = self.n - self.initial
        return max(0.0, (self.total - self.n) * self.elapsed / done) if self.total and done > 0 else None

    def update(self, n: float = 1) -> None:
        """So much more is done: show it, and record it for `make status`."""
        self.n += n
        now = time.monotonic()
        if self.work is not None and now - self.work.recorded >= RECORD_SECONDS:
            self.work.record(progress=self.facts())
        if self.view is not None:
            self.view.update(self.task, completed=self.n, beside=self._beside())
        elif now - self.shown >= QUIET_SECONDS:
            self.shown = now
            print(self.line(), file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """What is to be said beside the bar from now on."""
        self.text = text

    def place(self, done: float, total: float, text: str = "") -> None:
        """What an engine says of itself; the clock starts anew where it has begun another kind of work."""
        anew = (text, total) != (self.text, self.total) or done < self.n
        self.n, self.between = done, done >= total
        if anew:
            self.text, self.total, self.initial, self.started = text, total, done, time.monotonic()
            if self.view is not None:
                self.view.reset(self.task, total=total or None, completed=int(done))
        self.update(0)

    def close(self) -> None:
        """Take this bar's row away, and the view with the last one."""
        if self.view is not None and len(self.view.tasks) > 1:
            self.view.remove_task(self.task)
        elif self.view is not None:
            take_down()
        self.view = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def facts(self) -> dict[str, Any]:
        """The bar as it is recorded."""
        counted = {"title": self.title, "done": self.n, "total": self.total, "unit": self.unit}
        return {**counted, "note": self.text, "left": self.left, "at": time.time()}

    def _beside(self) -> str:
        if not self.total:
            return self.text or (f"{amount(self.n, self.unit)} {self.unit}" if self.n else "")
        counted = f"{amount(self.n, self.unit)}/{amount(self.total, self.unit)}"
        return "  ".join(part for part in (counted, self.text) if part)

    def line(self) -> str:
        """The bar as one line of a log."""
        from tqdm import tqdm

        if not self.total or self.between:
            said = f"{self.text} done".lstrip() if self.between else self.text
            return f"  {self.title}: {duration(time.monotonic() - self.begun)} so far" + (f", {said}" if said else "")
        return tqdm.format_meter(
            self.n,
            self.total,
            self.elapsed,
            prefix=f"  {self.title}",
            unit=f" {self.unit}",
            unit_scale=self.unit == "B",
            initial=self.initial,
            postfix=self.text or None,
            bar_format="{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )


def _view(work: Work | None) -> Progress | None:
    """The view on the terminal, made for its first bar, with the run's own line below; None where nothing can redraw."""
    if _shown or not sys.stderr.isatty():
        return _shown[0] if _shown else None
    from rich import progress
    from rich.console import Console, RenderableType
    from rich.text import Text

    class Terminal(Console):
        def show_cursor(self, show: bool = True) -> bool:
            """Leave it: whoever kills us would be left without one."""
            return False

    class View(progress.Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            if work is not None:
                yield Text(f"  {work.where()}", style="dim", no_wrap=True, overflow="ellipsis")

    terminal = Terminal(file=sys.stderr)  # this one, also while something redirects the name
    if not terminal.is_interactive or terminal.is_dumb_terminal:
        return None
    view = View(
        progress.TextColumn("  {task.description}", markup=False),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(compact=True),
        progress.TextColumn("{task.fields[beside]}", markup=False),
        console=terminal,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # else what is piped elsewhere would land on the terminal
        refresh_per_second=4,
    )
    _shown.append(view)
    return view
