"""The run at a glance: `report.json`, `report.md`, `report.html`, pictures, and the table on the terminal."""

from __future__ import annotations

from thinkswitch_plugin.report.beside import parts_table
from thinkswitch_plugin.report.build import price_per_hour, write_report
from thinkswitch_plugin.report.tables import header, rows

__all__ = ["header", "parts_table", "price_per_hour", "rows", "write_report"]
