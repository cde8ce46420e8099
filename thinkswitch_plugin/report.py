"""The run at a glance: `report.json`, `report.md` and the table on the terminal."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.evaluation import read_samples, summarize
from thinkswitch_plugin.run import MODES, Run, stages, stamp_path, versions

TIMED = {
    "requests": "generate",
    "generate": "generate",
    "pairs": "pairs",
    "train": "train",
    "merge-lora": "merge_lora",
    "rebuild": "merge",
    "eval-instruct": "eval",
    "eval-thinking": "eval",
}


def build_report(run: Run) -> dict[str, Any]:
    """Everything `report.json` holds, read from the files of a run."""
    seconds = stage_seconds(run)
    iterations = []
    for k in range(run.iterations + 1):
        here = run.iteration(k)
        entry: dict[str, Any] = {"iteration": k}
        for mode in MODES:
            entry[mode] = score(run, here / "eval" / mode, run.checkpoint(mode, k))
        if k > 0:
            pairs, rebuilt = files.read_json(here / "pairs.json"), files.read_json(here / "rebuild.json")
            entry["pairs"] = {key: pairs[key] for key in ("prompts", "samples", "kept", "dropped", "selection")}
            entry["merge"] = rebuilt
        entry["seconds"] = seconds.get(k, {})
        iterations.append(entry)
    total = sum(sum(stage.values()) for stage in seconds.values())
    price = price_per_hour()
    return {
        "domain": run.recipe.keys.domain,
        "seed": run.seed,
        "engine": run.engine,
        "iterations": iterations,
        "versions": versions(),
        "hardware": hardware(),
        "cost": {"hours": total / 3600, "price_per_hour": price, "total": price * total / 3600},
    }


def price_per_hour() -> float:
    """PRICE_PER_HOUR of the environment. Raises `ThinkSwitchError` if it is no number."""
    text = os.environ.get("PRICE_PER_HOUR") or "0"
    try:
        return float(text)
    except ValueError:
        raise ThinkSwitchError(f"PRICE_PER_HOUR={text} is no number; write it as 0.35.") from None


def score(run: Run, folder: Path, checkpoint: str) -> dict[str, Any]:
    """The figures of one evaluated checkpoint."""
    keys = run.recipe.keys
    return summarize(list(read_samples(folder, keys.evaluation.task, checkpoint, keys.labels.answer)))


def stage_seconds(run: Run) -> dict[int, dict[str, float]]:
    """Seconds of every finished stage by iteration, from the stamps."""
    found: dict[int, dict[str, float]] = {}
    for stage in stages(run):
        path = stamp_path(run, stage)
        if stage.name == "report" or not path.is_file():
            continue
        times = found.setdefault(stage.iteration, {})
        name = TIMED.get(stage.name, stage.name)
        times[name] = round(times.get(name, 0.0) + files.read_json(path)["seconds"], 2)
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and GPU of this machine."""
    from thinkswitch_plugin.engines import has_cuda

    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(pages * size / 2**30, 1),
        "gpu": None,
    }
    if has_cuda():
        import torch

        found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found


def rows(report: dict[str, Any]) -> Iterator[list[str]]:
    """The headline table, a row a checkpoint."""
    first = report["iterations"][0]
    for entry in report["iterations"]:
        for mode in MODES:
            s = entry[mode]
            low, high = (100 * v for v in s["ci95"])
            change = 100 * (s["mean@k"] - first[mode]["mean@k"])
            yield [
                str(entry["iteration"]),
                mode,
                f"{100 * s['mean@k']:.1f} %",
                f"{low:.1f}–{high:.1f}",
                "" if entry is first else f"{change:+.1f}",
                f"{s['tokens']:.1f}",
                f"{s['think_ratio']:.3f}",
                f"{100 * s['answered']:.1f} %",
                f"{100 * s['truncated']:.1f} %",
            ]


HEADER = [
    "iteration",
    "checkpoint",
    "accuracy",
    "95 % interval",
    "change",
    "tokens",
    "think ratio",
    "answered",
    "truncated",
]


def markdown(report: dict[str, Any]) -> str:
    """`report.md`: what changed, what was trained on, how it was rebuilt, how long it took."""
    n, k = report["iterations"][0]["instruct"]["n"], report["iterations"][0]["instruct"]["k"]
    lines = [
        f"# {report['domain']}, seed {report['seed']}",
        "",
        f"{n} held-out questions, {k} sample{'s' if k > 1 else ''} a question, engine {report['engine']}. "
        "Change is in points against iteration 0; a change inside the interval may be noise.",
        "",
        *table(HEADER, rows(report)),
        "",
        *table(
            [
                "iteration",
                "prompts",
                "pairs kept",
                "dropped",
                "selection",
                "λ",
                "think ratio at λ",
                "σ",
                "median angle",
            ],
            (_made(entry) for entry in report["iterations"][1:]),
        ),
        "",
        *table(
            ["iteration", "seconds by stage"],
            (
                [str(e["iteration"]), ", ".join(f"{name} {s:.0f}" for name, s in e["seconds"].items())]
                for e in report["iterations"]
            ),
        ),
        "",
        f"In all {3600 * report['cost']['hours']:.0f} s of stages. "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + ".",
        "",
    ]
    return "\n".join(lines)


def _made(entry: dict[str, Any]) -> list[str]:
    pairs, merge = entry["pairs"], entry["merge"]
    dropped = ", ".join(f"{n} {reason}" for reason, n in pairs["dropped"].items()) or "none"
    return [
        str(entry["iteration"]),
        str(pairs["prompts"]),
        str(pairs["kept"]),
        dropped,
        pairs["selection"],
        f"{merge['lambda']:g}",
        f"{merge['think_ratio']:.3f}",
        f"{merge['sigma']:.4f}",
        f"{merge['angle']['median']:.4f}",
    ]


def table(header: list[str], body: Any) -> list[str]:
    """A Markdown table as lines."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body)]


def write_report(run: Run) -> dict[str, Any]:
    """Write `report.json` and `report.md`, and print the headline table."""
    report = build_report(run)
    files.write_json(run.folder / "report.json", report)
    with files.atomic_file(run.folder / "report.md") as handle:
        handle.write(markdown(report).encode())
    print_table(report)
    console.say(f"  {run.folder / 'report.md'}")
    return {}


def print_table(report: dict[str, Any]) -> None:
    """The headline table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(
        title=f"{report['domain']}, seed {report['seed']}: {report['iterations'][0]['instruct']['n']} held-out questions"
    )
    for name in HEADER:
        shown.add_column(name, justify="left" if name == "checkpoint" else "right")
    for row in rows(report):
        shown.add_row(*row)
    Console(width=None if os.isatty(1) else 120).print(shown)
