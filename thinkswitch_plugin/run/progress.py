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
from types import TracebackType
from typing import TYPE_CHECKING, Any

from thinkswitch_plugin import files

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

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

    def forget(self) -> None:
        """The stage is done: its stamp says so."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


_current: ContextVar[Work | None] = ContextVar("stage at work", default=None)
# A bar within a bar (an engine's start within a sweep) is a row of the same view.
_shown: ContextVar[Progress | None] = ContextVar("view on the terminal", default=None)


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
        work.forget()
    finally:
        _current.reset(before)


def take_down() -> None:
    """Take the view away, whoever left it there: what follows on the terminal is an error, or the shell's prompt."""
    view = _shown.get()
    if view is not None:
        view.stop()
        _shown.set(None)


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
        self.title, self.total, self.unit = title, total, unit
        self.n = self.initial = initial
        self.text = ""
        self.begun = self.started = self.shown = time.monotonic()
        self.between = False  # an engine's own bar is full, and no other has come yet
        self.work = _current.get()
        self.view: Progress | None = None
        self.task: TaskID | None = None
        self.owner = False  # of the view, which goes when its owner does
        if sys.stderr.isatty():
            self._open_view()
        self._show()

    @property
    def elapsed(self) -> float:
        """Seconds since the start, or since the work last changed its kind."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float | None:
        """Seconds that are left at the speed so far; None where it is not known."""
        done = self.n - self.initial
        if not self.total or done <= 0:
            return None
        return max(0.0, (self.total - self.n) * self.elapsed / done)

    def update(self, n: float = 1) -> None:
        """So much more is done."""
        self.n += n
        self._show()

    def note(self, text: str) -> None:
        """What is to be said beside the bar from now on."""
        self.text = text

    def place(self, done: float, total: float, text: str = "") -> None:
        """What an engine says of itself; the clock starts anew where it has begun another kind of work."""
        anew = (text, total) != (self.text, self.total) or done < self.n
        self.n, self.between = done, done >= total
        if anew:
            self.text, self.total, self.initial, self.started = text, total, done, time.monotonic()
            if self.view is not None and self.task is not None:
                self.view.reset(self.task, total=total or None, completed=int(done), beside=self._beside())
        self._show()

    def close(self) -> None:
        """Take the view away, or this bar's row of it."""
        if self.view is None or self.task is None:
            return
        if self.owner:
            self.view.stop()
            _shown.set(None)
        else:
            self.view.remove_task(self.task)
        self.view = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_view(self) -> None:
        outer = _shown.get()
        self.owner = outer is None
        view = outer or _view(self.work)
        if view is None:
            return
        self.task = view.add_task(self.title, total=self.total or None, completed=int(self.initial), beside="")
        if self.owner:
            view.start()
            _shown.set(view)
        self.view = view

    def _show(self) -> None:
        now = time.monotonic()
        if self.work is not None and now - self.work.recorded >= RECORD_SECONDS:
            self.work.record(progress=self.facts())
        if self.view is not None and self.task is not None:
            self.view.update(self.task, completed=self.n, beside=self._beside())
        elif self.view is None and now - self.shown >= QUIET_SECONDS:
            self.shown = now
            print(self.line(), file=sys.stderr, flush=True)

    def facts(self) -> dict[str, Any]:
        """The bar as it is recorded."""
        return {
            "title": self.title,
            "done": self.n,
            "total": self.total,
            "unit": self.unit,
            "note": self.text,
            "left": self.left,
            "at": time.time(),
        }

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
    """rich's progress display with the run's own line below; None on a terminal that cannot redraw."""
    from rich.console import Console, RenderableType
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Terminal(Console):
        def show_cursor(self, show: bool = True) -> bool:
            """Leave it: whoever kills us would be left without one."""
            return False

    class View(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            if work is not None:
                yield Text(f"  {work.where()}", style="dim", no_wrap=True, overflow="ellipsis")

    terminal = Terminal(file=sys.stderr)  # this one, also while something redirects the name
    if not terminal.is_interactive or terminal.is_dumb_terminal:
        return None
    return View(
        TextColumn("  {task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[beside]}", markup=False),
        console=terminal,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # else what is piped elsewhere would land on the terminal
        refresh_per_second=4,
    )
