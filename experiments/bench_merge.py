"""`make bench-merge`: the recipes' rebuild beside plain mergekit-yaml, at Qwen3-4B's shape.

Makes two random checkpoints (8 GB each in bfloat16, as near each other as the real pair),
then runs every candidate from the same state: in a process of its own, with no page of the
checkpoints or of an old output in the page cache, until the output is on disk (fsync).
Memory is the peak of the process's anonymous pages (RssAnon of /proc/PID/status, every
20 ms); mapped files are not in it. Imports are timed apart. Processor seconds are those of all
cores together, so they hardly depend on what else the machine does. The last line of the output is JSON
with the same figures; `ratio` is the recipes' time over that of the fastest mergekit-yaml call.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from experiments.random_pair import NOISE, QWEN3_4B, shapes, write_checkpoint
from thinkswitch_plugin import files
from thinkswitch_plugin.merging.command import MERGE_OPTIONS
from thinkswitch_plugin.merging.config import place_models, set_lambda
from thinkswitch_plugin.merging.tensors import list_tensors

ROOT = Path(__file__).parents[1]

WEIGHT = 0.8  # λ of every candidate
SPARE = 5 * 10**9  # bytes of disk left free
VOCABULARY = QWEN3_4B["vocab_size"]

READY = "print(f'ready {time.monotonic()} {time.process_time()}', flush=True)"
READ = """
import os, sys, time
from pathlib import Path
buffer = memoryview(bytearray(2**24))
def read(folder):
    for file in sorted(Path(folder).glob("*.safetensors")):
        with file.open("rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                yield buffer[:count]
"""
CODE = {
    "floor": READ
    + READY
    + """
out = Path(sys.argv[3])
out.mkdir()
with (out / "data").open("wb", buffering=0) as handle:
    for block, _ in zip(read(sys.argv[1]), read(sys.argv[2])):
        handle.write(block)
    os.fsync(handle.fileno())
""",
    "read": READ + READY + "\nfor folder in sys.argv[1:3]:\n    for _ in read(folder): pass\n",
    "ours": f"""
import sys, time
from pathlib import Path
from thinkswitch_plugin.merging.run import command
{READY}
command.main([sys.argv[4], sys.argv[3], *sys.argv[5:], "--no-copy-tokenizer"], standalone_mode=False)
""",
    "mergekit": f"""
import sys, time
from mergekit.scripts.run_yaml import main
{READY}
main.main([sys.argv[4], sys.argv[3], "--no-copy-tokenizer", *sys.argv[5:]], standalone_mode=False)
""",
    "paper": f"""
import sys, time
from pathlib import Path
from safetensors.torch import load_file, save_file
{READY}
first, second, out = map(Path, sys.argv[1:4])
side = {{}}
for shard in sorted(first.glob("*.safetensors")):
    side |= {{name: tensor.clone() for name, tensor in load_file(shard).items()}}
out.mkdir()
for shard in sorted(second.glob("*.safetensors")):
    mixed = {{n: ({1 - WEIGHT} * side[n] + {WEIGHT} * t).to(t.dtype) for n, t in load_file(shard).items()}}
    save_file(mixed, out / shard.name)
""",
    "similarity": f"""
import sys, time
from pathlib import Path
from thinkswitch_plugin.report.similarity import report_similarity
{READY}
report_similarity(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
""",
}
CODE["one thread"] = "import torch\ntorch.set_num_threads(1)\n" + CODE["mergekit"]
ASYNC = ("--async-write", "--out-shard-size", "1B")
# Title -> what runs, the merge config, options.
OURS = "the recipes' rebuild: thinkswitch merge"
KERNEL = "thinkswitch merge, method thinkswitch"
ONE_THREAD = "mergekit-yaml, the same, one torch thread"
MERGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "floor: read both, write one, no more": ("floor", "", ()),
    OURS: ("ours", "slerp", MERGE_OPTIONS),
    KERNEL: ("ours", "thinkswitch", MERGE_OPTIONS),
    "mergekit-yaml, its defaults": ("mergekit", "slerp", ()),
    "mergekit-yaml --async-write, 1B shards": ("mergekit", "slerp", ASYNC),
    ONE_THREAD: ("one thread", "slerp", ASYNC),
    "the paper's way: one side in memory": ("paper", "", ()),
}


def config(layers: int, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """Qwen3-4B's config.json with a number of layers and a vocabulary."""
    return {**QWEN3_4B, "num_hidden_layers": layers, "vocab_size": vocabulary}


def size(layers: int, vocabulary: int) -> int:
    """Bytes of a checkpoint."""
    none, one = (sum(map(math.prod, shapes(config(n, vocabulary)).values())) for n in (0, 1))
    return 2 * (none + layers * (one - none))


def make_pair(folder: Path, layers: int, vocabulary: int = VOCABULARY) -> tuple[Path, Path]:
    """Write the two checkpoints."""
    pair = folder / "instruct", folder / "thinking"
    for path, noise in zip(pair, (0.0, NOISE), strict=True):
        write_checkpoint(path, config(layers, vocabulary), noise)
    return pair


def write_configs(folder: Path, pair: tuple[Path, Path]) -> dict[str, Path]:
    """The recipes' merge config and mergekit's own slerp, with the same λ."""
    roles = {"instruct": str(pair[0]), "thinking": str(pair[1])}
    found = {}
    for method in ("slerp", "thinkswitch"):
        source = ROOT / "merge_configs" / f"{method}.yaml"
        found[method] = folder / source.name
        files.write_yaml(found[method], place_models(set_lambda(files.read_yaml(source), WEIGHT, source), roles))
    return found


def evict(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(code: str, *words: str | Path) -> dict[str, float]:
    """Run one candidate to the end, its output on disk: seconds of imports, of work and of processor, peak memory in GB."""
    out = Path(words[2])
    evict(out.parent)
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    peak = 0
    before = os.times()
    status = Path(f"/proc/{process.pid}/status")
    try:
        while process.poll() is None:
            text = status.read_text() if status.exists() else ""
            for line in text.splitlines():
                if line.startswith("RssAnon:"):
                    peak = max(peak, int(line.split()[1]) * 1024)
            time.sleep(0.02)
    finally:
        process.kill()
    output, errors = process.communicate()
    if process.returncode != 0:
        sys.exit(f"bench-merge: a candidate failed:\n{errors[-3000:]}")
    for file in out.glob("*"):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    ready, used = map(float, next(line for line in output.splitlines() if line.startswith("ready ")).split()[1:])
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system - used
    return {
        "imports": ready - started,
        "seconds": time.monotonic() - ready,
        "processor": processor,
        "gigabytes": peak / 1e9,
    }


def compare(left: Path, right: Path) -> dict[str, Any]:
    """How two merged checkpoints differ: elements that do, those by more than one rounding unit, the largest."""
    a, b = list_tensors(left), list_tensors(right)
    assert a.keys() == b.keys()
    unequal = total = beyond = 0
    largest = 0.0
    for name in a:
        with safe_open(a[name].file, "pt") as one, safe_open(b[name].file, "pt") as other:
            x, y = one.get_tensor(name).flatten(), other.get_tensor(name).flatten()
        for p, q in zip(x.split(2**22), y.split(2**22), strict=True):
            differ = p.view(torch.int16) != q.view(torch.int16)
            if count := int(differ.sum()):
                p, q = p[differ], q[differ]
                unequal += count
                largest = max(largest, float((p.float() - q.float()).abs().max()))
                beyond += int(((p.view(torch.int16).int() - q.view(torch.int16).int()).abs() > 1).sum())
        total += x.numel()
    return {"elements": total, "unequal": unequal, "largest": largest, "beyond_one_unit": beyond}


def measure(folder: Path, layers: int, rounds: int, vocabulary: int = VOCABULARY) -> Iterator[dict[str, Any]]:
    """All candidates, round after round: the figures so far after each. The first round's outputs are compared."""
    pair = make_pair(folder, layers, vocabulary)
    configs = write_configs(folder, pair)
    sigma = 0.0
    taken: dict[str, list[dict[str, float]]] = {}
    against: dict[str, Any] = {}
    out, kept = folder / "out", folder / "mergekit"
    for number in range(rounds):
        # mergekit in one thread goes first: with several, the roundings of its sums depend on their number
        for name, (kind, method, options) in sorted(MERGES.items(), key=lambda entry: entry[0] != ONE_THREAD):
            taken.setdefault(name, []).append(run(CODE[kind], *pair, out, configs.get(method, ""), *options))
            print(f"{name}: {taken[name][-1]['seconds']:.1f} s", file=sys.stderr)
            if number == 0 and name == ONE_THREAD:
                out.replace(kept)
            elif number == 0 and name in (OURS, KERNEL):
                against[name] = compare(out, kept)
            files.remove(out)
        files.remove(kept)
        for name in ("read", "similarity"):
            taken.setdefault(name, []).append(run(CODE[name], *pair, out))
            if name == "similarity":
                sigma = files.read_json(out / "similarity.json")["sigma"]
            files.remove(out)
        yield summary(taken, against, layers, sigma)


def summary(
    taken: dict[str, list[dict[str, float]]], against: dict[str, Any], layers: int, sigma: float
) -> dict[str, Any]:
    """The medians of every candidate over its rounds, and the recipes' rebuild beside the fastest mergekit-yaml call."""
    figures = {
        name: {key: round(statistics.median(r[key] for r in runs), 2) for key in runs[0]}
        | {"all_seconds": [round(r["seconds"], 1) for r in runs]}
        for name, runs in taken.items()
    }
    fastest = min((n for n in MERGES if n.startswith("mergekit-yaml")), key=lambda name: figures[name]["seconds"])
    return {
        "layers": layers,
        "rounds": len(taken[OURS]),
        "sigma": round(sigma, 4),
        "candidates": figures,
        "against": against,
        "seconds": figures[OURS]["seconds"],
        "gigabytes": figures[OURS]["gigabytes"],
        "fastest_mergekit": {"call": fastest, **figures[fastest]},
        "ratio": round(figures[OURS]["seconds"] / max(figures[fastest]["seconds"], 0.01), 3),
    }


def show(result: dict[str, Any]) -> None:
    """Print the tables, and the same figures as one line of JSON."""
    figures = result["candidates"]
    print(
        f"Two checkpoints of Qwen3-4B's shape ({result['layers']} layers, σ {result['sigma']}), from a cold page cache,"
    )
    print(f"until the output is on disk; medians of {result['rounds']} rounds:")
    print(f"  {'':42} {'seconds':>8} {'× floor':>8} {'processor':>10} {'anonymous':>10}  {'imports':>8}  all rounds")
    for group in (tuple(MERGES), ("read", "similarity")):
        base = figures[group[0]]["seconds"]
        for name in group:
            f = figures[name]
            title = {"read": "reading both once", "similarity": "thinkswitch similarity"}.get(name, name)
            print(
                f"  {title:42} {f['seconds']:6.1f} s {f['seconds'] / base:8.2f} {f['processor']:8.1f} s {f['gigabytes']:7.2f} GB "
                f"{f['imports']:7.1f} s  {f['all_seconds']}"
            )
    found, fastest = result["against"], result["fastest_mergekit"]
    print(
        f"The recipes' rebuild takes {result['ratio']:.2f} of the time of the fastest mergekit-yaml call ({fastest['call']}), "
        f"at {result['gigabytes']:.2f} GB instead of {fastest['gigabytes']:.2f} GB."
    )
    for name, differ in found.items():
        print(
            f"{name}, and mergekit-yaml in one torch thread: {differ['unequal']} of {differ['elements']} elements differ, by "
            f"at most {differ['largest']:.2g}; {differ['beyond_one_unit']} by more than one rounding unit of bfloat16."
        )
    print(json.dumps(result))


def main() -> None:
    """Make the checkpoints, measure, remove them."""
    parser = argparse.ArgumentParser(prog="bench-merge", description=__doc__)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(), help="where a temporary folder is made")
    options = parser.parse_args()
    needed = 5 * size(options.layers, options.vocabulary) + SPARE
    free = shutil.disk_usage(options.folder).free
    if free < needed:
        sys.exit(
            f"bench-merge: {options.folder.resolve()} has {free / 1e9:.0f} GB of free disk and "
            f"{needed / 1e9:.0f} GB are needed; use --folder, or --layers for a smaller shape."
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is removed then too
    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=options.folder) as temporary:
        for result in measure(Path(temporary).resolve(), options.layers, options.rounds, options.vocabulary):
            show(result)


if __name__ == "__main__":
    main()
