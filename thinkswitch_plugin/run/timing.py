"""Where a run is and how long it may still take, from the seconds that its stamps hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thinkswitch_plugin.run.progress import duration

if TYPE_CHECKING:
    from thinkswitch_plugin.run.stage import Stage

Seconds = Mapping[tuple[str, int], float]  # of the stages that are done, by name and iteration


@dataclass(frozen=True)
class Place:
    """A stage among all stages of a run.

    Attributes:
        number, of: its place, from 1, and how many there are.
        spent: seconds of the stages that are done.
        expected, later: seconds this stage and those still to be done after it took in an earlier
            iteration; None where one of them has not been done before.
    """

    name: str
    number: int
    of: int
    iteration: int
    iterations: int
    spent: float
    expected: float | None
    later: float | None

    def left(self, elapsed: float) -> float | None:
        """Seconds until the run is done, `elapsed` seconds into this stage; None if unknown."""
        if self.expected is None or self.later is None:
            return None
        return max(0.0, self.expected - elapsed) + self.later

    def text(self, elapsed: float) -> str:
        """`stage 7 of 20 · iteration 1 of 2 · train · 3 min so far · about 6 min left`."""
        where = f"iteration {self.iteration} of {self.iterations}" if self.iteration else "the starting pair"
        parts = [f"stage {self.number} of {self.of}", "report" if self.name == "report" else f"{where} · {self.name}"]
        if self.spent + elapsed >= 1:
            parts.append(f"{duration(self.spent + elapsed)} so far")
        if left := self.left(elapsed):
            parts.append(f"about {duration(left)} left")
        return " · ".join(parts)


def place_of(stage: Stage, every: Sequence[Stage], seconds: Seconds, iterations: int) -> Place:
    """Where a stage stands, and what it and the stages to come are expected to take."""
    number = 1 + [(s.name, s.iteration) for s in every].index((stage.name, stage.iteration))
    # The report is left out: no earlier iteration has one.
    coming = [s for s in every[number:] if (s.name, s.iteration) not in seconds and s.name != "report"]
    expected = [expectation(s, seconds) for s in coming]
    return Place(
        name=stage.name,
        number=number,
        of=len(every),
        iteration=stage.iteration,
        iterations=iterations,
        spent=sum(seconds.values()),
        expected=expectation(stage, seconds),
        later=None if None in expected else sum(found or 0.0 for found in expected),
    )


def expectation(stage: Stage, seconds: Seconds) -> float | None:
    """What the same stage took in the last iteration before that has done it; None if none has."""
    if stage.name == "report":
        return 0.0
    before = range(stage.iteration - 1, -1, -1)
    return next((seconds[stage.name, k] for k in before if (stage.name, k) in seconds), None)
