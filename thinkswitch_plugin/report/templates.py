"""The templates beside this file, with the figures' forms as filters."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from thinkswitch_plugin import console
from thinkswitch_plugin.report import tables


def environment(*, html: bool = False) -> Environment:
    """Where the templates are loaded from; in `html` every value is escaped."""
    found = Environment(
        loader=PackageLoader("thinkswitch_plugin.report", "."),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not html,
    )
    found.filters |= {
        "percent": tables.percent,
        "interval": tables.interval,
        "points": tables.points,
        "span": tables.points_span,
        "some": console.some,
        "table": lambda rows, header: "\n".join(console.table(header, rows)),
    }
    return found


def markdown(name: str, **values: Any) -> str:
    """A template of Markdown, filled in."""
    return environment().get_template(name).render(values)
