"""`make bench-export`: time and memory of extracting a LoRA at Qwen3-4B's shape, on this machine.

The whole model has 36 layers, all alike, so a few are measured and the rest follow: seconds by
layer are the difference of two depths. Memory is the largest resident set of mergekit's process, with
the pages of both checkpoints that it has mapped, which the system takes back where it needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
from pathlib import Path

import torch

from experiments.bench_merge import make_pair
from thinkswitch_plugin import files
from thinkswitch_plugin.export.extract import WEIGHTS, extract

LAYERS = 36


def measure(folder: Path, layers: int, rank: int) -> dict[str, float]:
    """Extract once; the memory is that of the largest process so far, so ask for small depths first."""
    instruct, thinking = make_pair(folder, layers)
    seconds = extract(instruct, thinking, folder / "adapter", rank, folder / "log")
    return {
        "layers": layers,
        "seconds": round(seconds, 1),
        "gigabytes": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9, 2),
        "adapter_megabytes": round(files.size(folder / "adapter" / WEIGHTS) / 1e6, 1),
    }


def main() -> None:
    """Make two depths, measure both, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(prog="bench-export", description=__doc__)
    parser.add_argument("--layers", type=int, nargs=2, default=[1, 2])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=Path(), help="where temporary folders are made")
    options = parser.parse_args()
    rows = []
    for layers in sorted(options.layers):
        with tempfile.TemporaryDirectory(prefix="bench-export-", dir=options.folder) as temporary:
            rows.append(measure(Path(temporary).resolve(), layers, options.rank))
    few, many = rows
    by_layer = (many["seconds"] - few["seconds"]) / (many["layers"] - few["layers"])
    whole = few["seconds"] + (LAYERS - few["layers"]) * by_layer
    where = "GPU" if torch.cuda.is_available() else f"{os.environ.get('OMP_NUM_THREADS') or os.cpu_count()} CPU threads"
    print(f"\nmergekit-extract-lora at rank {options.rank}, Qwen3-4B's shape, {where}")
    print(f"  {'layers':>6} {'seconds':>8} {'GB':>6} {'adapter MB':>11}")
    for row in rows:
        print(f"  {row['layers']:6} {row['seconds']:8} {row['gigabytes']:6} {row['adapter_megabytes']:11}")
    print(f"  {by_layer:.1f} s a layer, so about {whole / 60:.0f} minutes for {LAYERS} layers, which were not run")
    result = {"rank": options.rank, "measured": rows, "seconds_by_layer": by_layer, "estimated_seconds": whole}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
