"""Write everything that a report consists of into the run folder."""

from __future__ import annotations

from typing import Any

from thinkswitch_plugin import console, files
from thinkswitch_plugin.report import page, pictures, tables
from thinkswitch_plugin.report.build import build_report, evaluations
from thinkswitch_plugin.run import Run


def write_report(run: Run) -> dict[str, Any]:
    """Write `report.json`, `report.md`, `report.html` and the pictures, and print the headline table."""
    judged = evaluations(run)
    report = build_report(run, judged)
    files.write_json(run.folder / "report.json", report)
    files.write_text(run.folder / "report.md", tables.markdown(report))
    for name, draw in pictures.OF_REPORT.items():
        pictures.save(draw(report), run.folder / name)
    page.write_page(run, report, judged, run.folder / "report.html")
    tables.print_table(report)
    console.say(f"  {tables.headline(report)}")
    console.say(f"  {run.folder / 'report.html'}, report.md, report.json")
    return {}
