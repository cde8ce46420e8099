"""`make bench-cluster`: a sweep on three Ray nodes of this machine, one of which is lost, against the same sweep without.

Needs a run (`make iterate`), or other options of the command such as `--instruct A --thinking B`; prints whether every point was evaluated once and equals the serial sweep's, and the
seconds that a task costs beyond the work itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from thinkswitch_plugin import files

UNEQUAL = ("seconds",)


def sweep(out: Path, words: list[str], cluster: str = "") -> tuple[float, dict[str, Any]]:
    """Seconds and result of one sweep through the ordinary command."""
    command = [sys.executable, "-m", "thinkswitch_plugin.cli", "sweep", *words, "--out", str(out), "--cluster", cluster]
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.monotonic() - started, files.read_json(out / "sweep" / "sweep.json")


def points(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What a sweep found at every point, without its seconds."""
    return [{k: v for k, v in row.items() if k not in UNEQUAL} for row in result["points"]]


def main() -> None:
    """Print a table, and the same as one line of JSON."""
    import ray
    from ray.cluster_utils import Cluster

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domain", default="arithmetic")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--lambdas", default="0 0.1 … 1")
    given, others = parser.parse_known_args()
    words = ["--domain", given.domain, "--runs", given.runs, "--lambdas", given.lambdas, *others]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    lost = [cluster.add_node(num_cpus=1) for _ in range(2)][-1]
    with tempfile.TemporaryDirectory(dir=".") as temporary:
        alone, serial = sweep(Path(temporary, "serial"), words)
        os.environ["RAY_ADDRESS"] = cluster.address
        out = Path(temporary, "spread")
        command = subprocess.Popen(
            [sys.executable, "-m", "thinkswitch_plugin.cli", "sweep", *words, "--out", str(out), "--cluster", "auto"],
            stdout=sys.stderr,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        started, total = time.monotonic(), len(points(serial))
        while command.poll() is None and lost is not None:
            if len(list(out.glob("sweep/points/*/candidate.json"))) * 2 >= total:
                cluster.remove_node(lost)
                lost = None
            time.sleep(0.2)
        code = command.wait()
        seconds = time.monotonic() - started
        spread = files.read_json(out / "sweep" / "sweep.json")
        again, _ = sweep(out, words, "auto")
    ray.shutdown()
    cluster.shutdown()
    work = sum(row["seconds"] for row in spread["points"])
    result = {
        "points": total,
        "exit code": code,
        "equal to the serial sweep": points(spread) == points(serial),
        "node lost on the way": lost is None,
        "seconds, serial": round(alone, 1),
        "seconds, three nodes": round(seconds, 1),
        "seconds of work in the tasks": round(work, 1),
        "seconds, second time": round(again, 1),
    }
    for name, value in result.items():
        print(f"| {name} | {value} |")
    print(json.dumps(result))
    if code or not result["equal to the serial sweep"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
