"""`switch.md`: what a router makes of a pair, as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from thinkswitch_plugin.report.pictures import switch_title
from thinkswitch_plugin.report.tables import percent, points, points_span
from thinkswitch_plugin.report.templates import markdown as filled
from thinkswitch_plugin.router.curve import BY


def markdown(result: dict[str, Any]) -> str:
    """`switch.md` from `switch.json`."""
    return filled("switch.md.j2", result=result, title=switch_title(result), points=_rows(result["evaluation"]))


def _rows(found: dict[str, Any]) -> Iterator[list[str]]:
    """Always instruct, the router at about every tenth of thinking, always thinking, the default, the oracle."""

    def always(mode: str, share: float) -> list[str]:
        return _row(f"always {mode}", {**found[mode], "accuracy": found[mode]["mean@k"], "share": share})

    seen = [p for p in found["curve"] if "ahead_at_same_share" in p and 0 < p["share"] < 1]
    tenths = range(1, 10) if seen else ()
    nearest = {min(range(len(seen)), key=lambda i: abs(10 * seen[i]["share"] - tenth)) for tenth in tenths}
    yield always("instruct", 0.0)
    yield from (_row("router", seen[i]) for i in sorted(nearest))
    yield always("thinking", 1.0)
    yield _row("router, default", found["default"])
    yield _row("oracle", found["oracle"])


def _row(name: str, point: dict[str, Any]) -> list[str]:
    """What there is of a point; only the router's have a threshold and a comparison."""
    cells = [name, "", percent(point["share"]), percent(point["accuracy"]), f"{point['tokens']:.1f}"]
    if "threshold" not in point:
        return [*cells, "", "", "", "", ""]
    cells[1] = f"{point['threshold']:.3f}"
    ahead = [(f"ahead_at_same_{by}", f"ahead_at_same_{by}_ci95") for by in BY]
    return [*cells, percent(point["mix"]), *(c for n, i in ahead for c in (points(point[n]), points_span(point[i])))]
