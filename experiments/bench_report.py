"""`make bench-report`: the report of 10,000 questions x 8 samples, in how much time and memory?

Writes the files of such a run (tests/report_run.py) into a temporary folder, then writes its report in a
process of its own, once with the answers that the evaluation stage stored and once without, and watches
that process's memory. Where there is a Chromium it opens the page: how long until the list can be used, how
long does a search through every text take? The files are removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.bench_pairs import watched
from tests import browser
from tests.report_run import make_run
from thinkswitch_plugin.judging.samples import GENERATIONS, REQUESTS, newest

REPORT = """
import sys
from pathlib import Path
from thinkswitch_plugin.report import write_report
from thinkswitch_plugin.run import open_run
write_report(open_run(Path(sys.argv[1])))
"""
USABLE = "() => /^[0-9,]+ of/.test(document.getElementById('count').textContent)"


def written(run: Path) -> tuple[float, float, float]:
    """Seconds, seconds of processor time and peak megabytes of one report."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, _, peak, _ = watched(REPORT, run)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak


def opened(path: Path) -> dict[str, Any]:
    """Seconds until the list can be used, and of one search that has to look into every text."""
    if browser.CHROMIUM is None:
        return {"browser": browser.MISSING}
    with browser.started() as chromium:
        page = chromium.new_page()
        started = time.monotonic()
        page.goto(path.absolute().as_uri())
        page.wait_for_function(USABLE, timeout=120_000)
        usable = time.monotonic() - started
        started = time.monotonic()
        page.fill("#search", "found in no text at all")
        page.wait_for_function("() => document.getElementById('count').textContent.startsWith('0 of')", timeout=120_000)
        return {
            "seconds until usable": round(usable, 2),
            "seconds, search of all texts": round(time.monotonic() - started, 2),
        }


def measure(questions: int, samples: int, iterations: int, characters: int, folder: Path) -> dict[str, Any]:
    """Write the run, then its report with and without stored answers, then open the page."""
    needed = 3.0 * questions * samples * characters * 2 * (iterations + 1)
    if shutil.disk_usage(folder).free < needed:
        raise SystemExit(f"bench-report: {needed / 1e9:.1f} GB of free disk are needed in {folder}; set TMPDIR.")
    run = make_run(folder, questions=questions, samples=samples, iterations=iterations, characters=characters)
    judged = sorted(run.glob("iter-*/eval/*"))
    weight = sum(newest(place, "samples_*.jsonl").stat().st_size for place in judged)
    seconds, worked, peak = written(run)
    first = (run / "report.json").read_bytes()
    size = (run / "report.html").stat().st_size
    page = opened(run / "report.html")
    for place in judged:
        for name in (REQUESTS, GENERATIONS):
            (place / name).unlink()
    again, worked_again, peak_again = written(run)
    return {
        "questions": questions,
        "samples a question": samples,
        "checkpoints": len(judged),
        "completions": questions * samples * len(judged),
        "MB of samples files": round(weight / 1e6),
        "seconds, report": round(seconds, 1),
        "seconds of processor time, report": round(worked, 1),
        "peak MB, report": round(peak),
        "seconds, report without stored answers": round(again, 1),
        "seconds of processor time, without stored answers": round(worked_again, 1),
        "peak MB, report without stored answers": round(peak_again),
        "same figures both ways": first == (run / "report.json").read_bytes(),
        "MB of report.html": round(size / 1e6, 1),
        **page,
    }


def main() -> None:
    """Print a table, and the same as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--characters", type=int, default=1_500, help="of one thinking completion")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(options.questions, options.samples, options.iterations, options.characters, Path(temporary))
    for name, value in result.items():
        print(f"| {name} | {value} |")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
