"""`make bench-cluster`: a sweep, or labels, on three Ray nodes of this machine, one of which is lost half-way, against the same without.

Needs a run (`make iterate`). `BENCH="--part labels"` labels by 5 folds instead of evaluating 11 points; `BENCH=--hosts` starts the
nodes on network namespaces with an address and a host name of their own (hosts.py; needs root), as on three machines.
Prints whether every result is there once and equals the serial command's, and the seconds of a processor that a task costs
beyond its work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.hosts import hosts, missing
from thinkswitch_plugin import files

NODES = 3
PORT = "6399"
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Part:
    """A command that can be spread: its words, the stamps of its tasks under its folder, and what it finds."""

    words: tuple[str, ...]
    stamps: str
    found: Callable[[Path], list[dict[str, Any]]]


def points(out: Path) -> list[dict[str, Any]]:
    """What a sweep found at every point."""
    return list(files.read_json(out / "sweep" / "sweep.json")["points"])


def labels(home: Path) -> list[dict[str, Any]]:
    """The labels of every question."""
    return [row for _, row in files.read_jsonl(next(home.glob("*/adaptive/seed-0/labels/labels.jsonl")))]


PARTS = {
    "sweep": Part(("sweep", "--lambdas", "0 0.1 … 1"), "sweep/points/*/candidate.json", points),
    "labels": Part(("labels", "--folds", "5"), "*/adaptive/seed-0/labels/fold-*/post/generations.json", labels),
}


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same without what differs between two runs of the same work."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@contextmanager
def nodes_here() -> Iterator[tuple[list[str], str, Callable[[], None]]]:
    """Three nodes on this host: what to put before a command, the cluster's address, and a function that loses a node."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    last = [cluster.add_node(num_cpus=1) for _ in range(NODES - 1)][-1]
    try:
        yield [], cluster.address, lambda: cluster.remove_node(last)
    finally:
        ray.shutdown()
        cluster.shutdown()


@contextmanager
def nodes_on_hosts(log: Path) -> Iterator[tuple[list[str], str, Callable[[], None]]]:
    """The same with a host for each node."""
    ray, started = Path(sys.executable).with_name("ray"), b"Ray runtime started"
    with hosts(NODES) as found, log.open("wb") as output:
        address = f"{found[0].address}:{PORT}"
        for number, host in enumerate(found):
            role = ["--address", address] if number else ["--head", "--port", PORT, "--include-dashboard", "false"]
            words = [ray, "start", *role, "--node-ip-address", host.address, "--num-cpus", "1", "--block"]
            node = subprocess.Popen(host.command(words), stdout=output, stderr=output, env={**os.environ, **QUIET})
            while log.read_bytes().count(started) <= number:
                if node.poll() is not None:
                    raise SystemExit(f"bench-cluster: Ray did not start; {log.read_text()[-2000:]}")
                time.sleep(0.2)
        yield found[0].command([]), address, found[-1].kill


@dataclass(frozen=True)
class Command:
    """The command of a part, for one domain of one runs folder."""

    part: Part
    words: list[str]

    def start(self, out: Path, prefix: list[str], address: str = "") -> subprocess.Popen[bytes]:
        """Start it; on a cluster, if it is given the address of one."""
        into = ["--out", str(out)] if self.part.words[0] == "sweep" else ["--runs", str(out)]
        words = [*prefix, sys.executable, "-m", "thinkswitch_plugin.cli", *self.part.words, *self.words, *into]
        cluster = ["--cluster", "auto"] if address else []
        env = {**os.environ, **QUIET, **({"RAY_ADDRESS": address} if address else {})}
        return subprocess.Popen([*words, *cluster], stdout=sys.stderr, env=env)

    def run(self, out: Path, prefix: list[str], address: str = "") -> float:
        """Run it to its end; return its seconds."""
        started = time.monotonic()
        if self.start(out, prefix, address).wait():
            raise SystemExit("bench-cluster: the command failed; see the lines above")
        return time.monotonic() - started


def measure(command: Command, serial: Path, spread: Path, nodes: tuple[list[str], str, Callable[[], None]]) -> Any:
    """The command alone; on the cluster, with a node lost after half of the tasks; and once more."""
    prefix, address, lose = nodes
    alone = command.run(serial, [])
    stamps, lost = command.part.stamps, False
    total = len(list(serial.glob(stamps)))
    started, process = time.monotonic(), command.start(spread, prefix, address)
    while process.poll() is None:
        if not lost and len(list(spread.glob(stamps))) * 2 >= total:
            lose()
            lost = True
        time.sleep(0.2)
    seconds = time.monotonic() - started
    again = command.run(spread, prefix, address)
    processors = min(len(os.sched_getaffinity(0)), NODES)
    return {
        "tasks": total,
        "exit code": process.returncode,
        "results": len(command.part.found(spread)),
        "equal to the serial command's": without_seconds(command.part.found(spread))
        == without_seconds(command.part.found(serial)),
        "node lost on the way": lost,
        "seconds, serial": round(alone, 1),
        "seconds, three nodes": round(seconds, 1),
        "seconds of a processor that a task costs beyond its work": round((processors * seconds - alone) / total, 1),
        "seconds, second time": round(again, 1),
    }


def main() -> None:
    """Print a table, and the same as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domain", default="arithmetic")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--part", choices=PARTS, default="sweep")
    parser.add_argument("--hosts", action="store_true")
    given, others = parser.parse_known_args()
    if given.hosts and (lacking := missing()):
        print(f"bench-cluster: skipped, {lacking}")
        print(json.dumps({"skipped": lacking}))
        return
    part = PARTS[given.part]
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        folder, words = Path(temporary).resolve(), ["--domain", given.domain, *others]
        serial, spread = folder / "serial", folder / "spread"
        if given.part == "sweep":
            words += ["--runs", str(given.runs)]
        else:
            for copy in (serial, spread):
                shutil.copytree(given.runs / given.domain, copy / given.domain)
        with nodes_on_hosts(folder / "ray.log") if given.hosts else nodes_here() as nodes:
            result = {"part": given.part, **measure(Command(part, words), serial, spread, nodes)}
    for name, value in result.items():
        print(f"| {name} | {value} |")
    print(json.dumps(result))
    if result["exit code"] or not result["equal to the serial command's"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
