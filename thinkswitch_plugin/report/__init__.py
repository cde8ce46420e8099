"""The run at a glance: `report.json`, `report.md`, `report.html`, pictures, and the table on the terminal."""

from __future__ import annotations

from thinkswitch_plugin.report.build import price_per_hour, score
from thinkswitch_plugin.report.tables import header, headline, markdown, print_table, rows
from thinkswitch_plugin.report.write import write_report

__all__ = [
    "header",
    "headline",
    "markdown",
    "price_per_hour",
    "print_table",
    "rows",
    "score",
    "write_report",
]
