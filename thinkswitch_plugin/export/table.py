"""The table of an export: every rank next to the full checkpoints, and whether it behaves like them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from thinkswitch_plugin import console
from thinkswitch_plugin.report.tables import interval, percent
from thinkswitch_plugin.run import MODES

LEAST_KEPT = 0.98  # of the full checkpoint's think ratio, as in the rebuild of thinking
HEADER = ["rank", "mode", "MB", "error", "accuracy", "95 %", "tokens", "think ratio", "keeps its mode and score"]


def keeps(full: dict[str, Any], lora: dict[str, Any], mode: str) -> bool:
    """Whether an adapter behaves like its full checkpoint, within the precision of this number of questions.

    Thinking: its think ratio is at least .98 of the full one's, one completion of tolerance; instruct: it thinks
    no more often, within the same 2 %. The full checkpoint's score is not above the 95 % interval of the adapter's.
    """
    slack = max(1 - LEAST_KEPT, 1 / (full["n"] * full["k"]))
    more = lora["think_ratio"] - full["think_ratio"]
    return bool((more >= -slack if mode == "thinking" else more <= slack) and full["mean@k"] <= lora["ci95"][1])


def markdown(result: dict[str, Any]) -> list[str]:
    """The table of ranks with the full checkpoints, and its conclusion."""
    base = result["base"]
    n, k = result["full"]["instruct"]["n"], result["full"]["instruct"]["k"]
    lines = [
        f"Base: {base['name']}" + (f" at {base['revision']}" if base["revision"] else ""),
        f"{n} questions, {k} sample{'s' if k > 1 else ''} a question",
        "",
        *console.table(HEADER, table_rows(result)),
        "",
    ]
    for mode in MODES:
        found = result["ranks"][-1].get(mode)
        lines.append(
            f"{mode}: {100 * found['left_out']:.2f} % of the squared difference is in norms and embeddings "
            f"({found['tensors_left_out']} tensors differ), which no rank contains."
            if found
            else f"{mode}: the base itself, no adapter."
        )
    lines.append(
        f"Rank {result['rank']} is the smallest of these that keeps both modes and both scores."
        if result["kept"]
        else f"No rank of these keeps both modes and both scores; rank {result['rank']} is the largest. Give a larger "
        "RANK=, another BASE=, or serve the full checkpoints one by one."
    )
    return lines


def table_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """The full checkpoints, then both modes of every rank."""
    for mode in MODES:
        megabytes = f"{result['full_bytes'][mode] / 1e6:.2f}"
        yield ["full", mode, megabytes, "", *figures_row(result["full"][mode]), ""]
    for row in result["ranks"]:
        for mode, kept in row["kept"].items():
            one = row[mode]
            measured = [f"{one['bytes'] / 1e6:.2f}", f"{one['error']:.4f}", *figures_row(one["figures"])]
            yield [str(row["rank"]), mode, *measured, "yes" if kept else "no"]


def figures_row(figures: dict[str, Any]) -> list[str]:
    """Accuracy, its 95 % interval, tokens and think ratio of a checkpoint."""
    accuracy, limits = percent(figures["mean@k"]), interval(figures["ci95"])
    return [accuracy, limits, f"{figures['tokens']:.1f}", f"{figures['think_ratio']:.3f}"]
