"""`make cost`: what the generations of very many prompts cost on paper, by formulas from inputs that are all printed.

Nothing is measured here. The defaults of the inputs are estimates; replace them by your own.
"""

from __future__ import annotations

import argparse
import json

from thinkswitch_plugin import console

# name, default, what it is
INPUTS = (
    ("prompts", 1_000_000, "prompts"),
    ("samples", 8, "answers to each"),
    ("tokens", 20_000, "tokens of an answer"),
    ("rate", 2_000, "tokens a second of one GPU, all its requests together"),
    ("stream", 40, "tokens a second of one request"),
    ("gpus", 100, "GPUs"),
    ("price", 2, "price of a GPU for an hour"),
    ("bytes_per_token", 4, "bytes of stored text for a token"),
    ("client_ms", 3, "processor milliseconds of the client for a request (`make bench-faults` measures it)"),
    ("repair_us", 87, "microseconds to repair a row after a kill (`make bench-faults` measures it)"),
    ("rows_per_file", 8_000, "rows in a file of answers (`thinkswitch.engine.rows_per_file`)"),
)


def cost(given: dict[str, float]) -> list[tuple[str, str, float, str]]:
    """Name, formula, value and unit of every figure."""
    rows = given["prompts"] * given["samples"]
    tokens = rows * given["tokens"]
    gpu_hours = tokens / given["rate"] / 3600
    per_second = given["gpus"] * given["rate"] / given["tokens"]
    return [
        ("answers", "prompts × samples", rows, ""),
        ("tokens", "answers × tokens", tokens, ""),
        ("GPU hours", "tokens ÷ rate", gpu_hours, "h"),
        ("money", "GPU hours × price", gpu_hours * given["price"], ""),
        ("time", "GPU hours ÷ gpus", gpu_hours / given["gpus"] / 24, "days"),
        ("stored answers", "tokens × bytes_per_token", tokens * given["bytes_per_token"] / 1e9, "GB"),
        ("answers a second", "gpus × rate ÷ tokens of an answer", per_second, ""),
        (
            "requests in flight",
            "answers a second × tokens ÷ stream",
            per_second * given["tokens"] / given["stream"],
            "",
        ),
        ("processor time of the client", "answers × client_ms", rows * given["client_ms"] / 3.6e6, "h"),
        ("files of answers", "answers ÷ rows_per_file", rows / given["rows_per_file"], ""),
        ("repair of one file", "rows_per_file × repair_us", given["rows_per_file"] * given["repair_us"] / 1e6, "s"),
        ("repair of all", "answers × repair_us", rows * given["repair_us"] / 6e7, "min"),
    ]


def main() -> None:
    """Print two tables, and the same as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default, text in INPUTS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=default, help=text)
    given = vars(parser.parse_args())
    found = cost(given)
    inputs = [[name, f"{given[name]:,.10g}", text] for name, _, text in INPUTS]
    figures = [
        [name, formula, f"{value:,.{0 if value >= 1000 else 1}f} {unit}".strip()]
        for name, formula, value, unit in found
    ]
    for title, rows in (("input", inputs), ("figure", figures)):
        for line in console.table([title, "", ""], rows):
            print(line)
        print()
    print(json.dumps({"inputs": given, "figures": {name: round(value, 2) for name, _, value, _ in found}}))


if __name__ == "__main__":
    main()
