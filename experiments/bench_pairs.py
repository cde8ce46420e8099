"""`make bench-pairs`: pairs from 100,000 generations of 20 kB, in how much memory and how fast?

Writes the two files into a temporary folder, reads and parses the generations with orjson alone,
builds the pairs with `thinkswitch_plugin.data.pairs.write_pairs` in a process of its own, and watches
that process's memory. The files are removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from thinkswitch_plugin import files

ALONE = """
import sys
from pathlib import Path
import orjson
with Path(sys.argv[1], "generations.jsonl").open("rb") as handle:
    rows = sum(orjson.loads(line)["custom_id"] is not None for line in handle)
print(rows)
"""
PAIRS = """
import sys
from pathlib import Path
from thinkswitch_plugin.data.pairs import write_pairs
folder = Path(sys.argv[1])
report = write_pairs(
    folder / "requests.jsonl", folder / "generations.jsonl", folder / "pairs.jsonl", keep_trace=bool(int(sys.argv[2])),
)
print(report.kept, report.samples, sum(report.dropped.values()))
"""


def write_files(folder: Path, count: int, size: int) -> None:
    """Requests and their generations, out of order, one in fifty cut; text like that of a trace on mathematics."""
    draw = random.Random(0)
    words = ["so", "we", "have", "x < 7", "3 + 4 = 7", "think", "again", "[1, 2]", "a", "therefore", "\n\n", "**no**"]
    traces = [" ".join(draw.choices(words, k=size))[: size - 400] for _ in range(64)]
    order = list(range(count))
    for start in range(0, count, 64):  # as they arrive from 64 requests under way
        order[start : start + 64] = draw.sample(order[start : start + 64], len(order[start : start + 64]))
    with (folder / "requests.jsonl").open("wb") as requests:
        for n in range(count):
            body = {
                "model": "m",
                "messages": [{"role": "user", "content": f"Question {n}"}],
                "max_tokens": 8192,
                "metadata": {"prompt_id": f"p{n}", "trace": "opened"},
            }
            requests.write(files.dumps_line({"custom_id": f"p{n}-s0", "body": body}))
    with (folder / "generations.jsonl").open("wb") as generations:
        for n in order:
            cut = n % 50 == 0
            end = "" if cut else f"\n</think>\n\nThe answer to question {n} is {n % 977}."
            message = {"role": "assistant", "content": f"{n}: {traces[n % 64]}{end}"}
            choice = {"index": 0, "message": message, "finish_reason": "length" if cut else "stop"}
            response = {"status_code": 200, "request_id": "x", "body": {"choices": [choice]}}
            generations.write(
                files.dumps_line({"id": f"gen-{n}", "custom_id": f"p{n}-s0", "response": response, "error": None})
            )


def watched(code: str, folder: Path, *words: str) -> tuple[float, list[float], float, str]:
    """Seconds, resident megabytes at intervals and at their peak, and the output of a Python process."""
    memory, peak = list[float](), 0.0
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder), *words], stdout=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = {
                name: int(kilobytes) * 1024 / 1e6 for name, kilobytes in re.findall(r"(VmHWM|VmRSS):\s+(\d+)", status)
            }
            if found:  # the kernel's own high-water mark; a process that is ending has none
                memory.append(found["VmRSS"])
                peak = max(peak, found["VmHWM"])
            time.sleep(0.05)
        seconds = time.monotonic() - started
        text = process.stdout.read().strip() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"bench-pairs: the process failed with exit code {process.returncode}")
    return seconds, memory, peak, text


def measure(count: int, size: int, folder: Path, rounds: int = 3, keep_trace: bool = False) -> dict[str, Any]:
    """Write the files, then take the two processes in turn, `rounds` times."""
    needed = 1.3 * count * size
    if shutil.disk_usage(folder).free < needed:
        raise SystemExit(f"bench-pairs: {needed / 1e9:.1f} GB of free disk are needed in {folder}; set TMPDIR.")
    write_files(folder, count, size)
    weight = (folder / "generations.jsonl").stat().st_size
    alone, ours, last, peaks = list[float](), list[float](), list[float](), list[float]()
    for _ in range(rounds):
        alone.append(watched(ALONE, folder)[0])
        seconds, last, peak, output = watched(PAIRS, folder, str(int(keep_trace)))
        ours.append(seconds)
        peaks.append(peak)
    kept, samples, dropped = (int(n) for n in output.split())
    middle, end = last[len(last) // 2 : len(last) // 2 + 3], last[-3:]
    return {
        "generations": count,
        "megabytes": round(weight / 1e6),
        "pairs": kept,
        "counts add up": kept + dropped == samples == count,
        "seconds, reading and parsing alone": round(statistics.median(alone), 2),
        "seconds, pairs": round(statistics.median(ours), 2),
        "ratio": round(statistics.median(ours) / statistics.median(alone), 2),
        "MB a second, pairs": round(weight / 1e6 / statistics.median(ours)),
        "peak MB": round(max(peaks)),
        "MB, half-way and at the end": [round(statistics.median(part or [0])) for part in (middle, end)],
    }


def main() -> None:
    """Print a table, and the same as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generations", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=20_000, help="characters of one generation")
    parser.add_argument("--keep-trace", action="store_true", help="rationales instead of pairs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(options.generations, options.size, Path(temporary), keep_trace=options.keep_trace)
    for name, value in result.items():
        print(f"| {name} | {value} |")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
