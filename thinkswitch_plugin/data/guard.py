"""The guard that needs no list: traces are expected, and (nearly) none can be seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thinkswitch_plugin.data.messages import content_of, reasoning_of
from thinkswitch_plugin.data.traces import Completion, Outcome
from thinkswitch_plugin.errors import ThinkSwitchError

BEGINNING = 100  # characters of a completion that are shown
FEWEST_TRACES = 0.1  # of the completions that came to an end; with fewer, the traces must be of a kind we do not know


class Guard:
    """Counts traces where traces are expected, whatever convention they are written in."""

    def __init__(self, generations: Path) -> None:
        self.generations = generations
        self.whole = self.traced = 0
        self.first: tuple[int, str] | None = None  # line and beginning of the first completion without a trace

    def look_at(self, number: int, row: dict[str, Any], done: Completion) -> None:
        """Count a completion if it shows whether traces can be seen: it has one, or came to its end without."""
        if done.closed_trace:
            self.traced += 1
        elif done.cut or done.outcome in (Outcome.FAILED, Outcome.EMPTY):
            return
        elif self.first is None:
            message = row["response"]["body"]["choices"][0]["message"]
            self.first = number, (reasoning_of(message) or content_of(message)).strip()[:BEGINNING]
        self.whole += 1

    def require_traces(self) -> None:
        """Raise `ThinkSwitchError` if (nearly) no completion has a trace."""
        if self.first is not None and self.traced < FEWEST_TRACES * self.whole:
            number, text = self.first
            raise ThinkSwitchError(
                f"{self.generations}, line {number}: of {self.whole} finished completions {self.traced} have a trace that "
                f"can be told from the answer; this one begins {text!r}: set `thinkswitch.trace` in the recipe to the "
                "convention in which this checkpoint writes its trace, to {open: …, close: …}, or, if it answers "
                "directly, to none."
            )
