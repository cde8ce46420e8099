"""What the recipe costs on a GPU: QLoRA under 8 GB, merges, a λ in place, generation; one table in under 8 minutes.

    python3 experiments/gpu_check.py --out gpu-check.json     # a GPU with 40 GB or more
    python3 experiments/gpu_check.py --tiny                   # the same on a CPU, at small size

Needs torch, transformers and safetensors; peft and bitsandbytes for QLoRA, axolotl to have it run the recipe itself.
Nothing is downloaded: the weights are random. Each part is a process of its own with a time limit, so one that
fails leaves a line and its log, and the rest goes on. The last line printed is the same as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 470  # for everything
ROOM = 12 * 10**9  # bytes for the checkpoint
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "axolotl", "mergekit", "triton")
COLUMNS = ("part", "case", "seconds", "rate", "allocated GB", "reserved GB", "note")


class Part(NamedTuple):
    """One process: its time limit in seconds, and the part that it stands in for if that one measured nothing."""

    limit: int
    title: str
    instead_of: str = ""


# In the order of what matters: a part gets what is left of the time, at most its limit.
PARTS = {
    "checkpoint": Part(75, "random checkpoint"),
    "axolotl-limited": Part(180, "QLoRA by axolotl, held to 8 GB"),
    "peft-limited": Part(100, "QLoRA by peft, held to 8 GB", instead_of="axolotl-limited"),
    "merges": Part(60, "merge"),
    "live": Part(90, "λ in place"),
    "axolotl": Part(120, "QLoRA by axolotl, no limit"),
    "peft": Part(90, "QLoRA by peft, no limit", instead_of="axolotl"),
    "generation": Part(100, "generation by transformers"),
}


def work_on(name: str, work: Path, tiny: bool) -> None:
    """Measure one part in this process; rows go to `work/NAME.jsonl` as they are measured."""
    import gpu_shape

    setting = gpu_shape.tiny(work) if tiny else gpu_shape.full(work)
    record = partial(append, work / f"{name}.jsonl", PARTS[name].title)
    if name == "checkpoint":
        began = time.perf_counter()
        gpu_shape.write_checkpoint(setting)
        record(f"made and written to {work}", seconds=time.perf_counter() - began)
    elif name in ("merges", "live"):
        import gpu_merges

        getattr(gpu_merges, name)(setting, record)
    elif name == "generation":
        from gpu_generation import generation

        generation(setting, record)
    else:
        import gpu_qlora

        train = gpu_qlora.through_axolotl if name.startswith("axolotl") else gpu_qlora.through_peft
        train(setting, record, limited=name.endswith("limited"))


def append(path: Path, part: str, case: str, **figures: Any) -> None:
    """Add one measured row to a part's file."""
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps({"part": part, "case": case, **figures}) + "\n")


def run(name: str, work: Path, tiny: bool, seconds: float) -> list[dict[str, Any]]:
    """Run one part in a process of its own and return its rows; if it fails, the last one says why."""
    log = work / f"{name}.log"
    command = [sys.executable, __file__, "--part", name, "--work", str(work), *(["--tiny"] if tiny else [])]
    with log.open("w") as handle:
        process = subprocess.Popen(command, stdout=handle, stderr=handle, env=environment(), start_new_session=True)
        try:
            process.wait(seconds)
            failure = "" if process.returncode == 0 else f"failed: {last_line(log)}"
        except subprocess.TimeoutExpired:
            failure = f"stopped after {seconds:.0f} s"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # compilers and loaders that it started
        process.wait()
    rows = work / f"{name}.jsonl"
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    if failure:
        found.append({"part": PARTS[name].title, "case": "stopped early", "note": failure})
        print(f"--- {name} {failure}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-12:]), flush=True)
    return found


def last_line(log: Path) -> str:
    """The last line of a log that says anything."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


def environment() -> dict[str, str]:
    """The environment of every part: no network, no telemetry."""
    offline = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "WANDB_MODE": "disabled"}
    return {**os.environ, **offline, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


def machine(tiny: bool) -> dict[str, str]:
    """The card, its driver, and the versions of what was measured."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if tiny:
        return {"card": "none: tiny size on the CPU", **found}
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        card, memory, driver = answer.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return {"card": f"nvidia-smi does not answer: {error}", **found}
    return {"card": f"{card}, {memory}", "driver": driver, **found}


def measure(names: list[str], work: Path, tiny: bool, seconds: float = SECONDS) -> list[dict[str, Any]]:
    """Run the parts in order, each with what is left of the time."""
    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    empty: set[str] = set()
    for name in names:
        part, left = PARTS[name], seconds - (time.monotonic() - began)
        if part.instead_of and part.instead_of in names and part.instead_of not in empty:
            continue
        if left < 5:
            rows.append({"part": part.title, "case": "not measured", "note": "no time was left"})
            continue
        started = time.monotonic()
        found = run(name, work, tiny, min(part.limit, left))
        if not any("rate" in row for row in found):
            empty.add(name)
        rows += found
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""

    def cells(row: dict[str, Any]) -> list[str]:
        rate = f"{row['rate']:.1f} {row['unit']}" if "rate" in row else ""
        memory = [f"{row[key]:.2f}" if key in row else "" for key in ("allocated", "reserved")]
        seconds = f"{row['seconds']:.4g}" if "seconds" in row else ""
        return [row["part"], row["case"], seconds, rate, *memory, row.get("note", "").replace("|", "/")]

    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *map(cells, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def roomy_folder() -> str | None:
    """In memory if it holds the checkpoint, else the default temporary folder."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > ROOM else None


def main(arguments: list[str] | None = None) -> int:
    """Measure every part and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the figures to this file, and the logs beside it")
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default: %(default)s)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:
        work_on(options.part, options.work, options.tiny)
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=None if options.tiny else roomy_folder()) as folder:
        work = Path(folder)
        rows = measure([name for name in PARTS if name in options.only], work, options.tiny, options.seconds)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            logs = [f"=== {log.stem}\n{log.read_text(errors='replace')}" for log in sorted(work.glob("*.log"))]
            options.out.with_suffix(".log").write_text("\n".join(logs), encoding="utf-8")
    figures = {"machine": machine(options.tiny), "seconds": round(time.monotonic() - began, 1), "rows": rows}
    print("\n" + "\n".join(f"{name}: {value}" for name, value in figures["machine"].items()) + "\n")
    print(table(rows) + f"\n\n{figures['seconds']:.0f} s in all")
    line = json.dumps(figures, ensure_ascii=False)
    if options.out:
        options.out.write_text(line + "\n", encoding="utf-8")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
