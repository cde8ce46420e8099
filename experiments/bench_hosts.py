"""`make bench-hosts`: one training on two hosts against two processes on one host; is it the same adapter, bit for bit?

The hosts are network namespaces of this machine (hosts.py), so this needs root. Both trainings are axolotl's, NF4 QLoRA of
the tiny pair by torchrun over gloo, from the pairs of iteration 1 of a run (`make iterate`). The first host runs the
training of the loop; the second the command that it prints, with a rank of its own.
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

import torch
from safetensors.torch import load_file

from experiments.hosts import hosts, missing
from thinkswitch_plugin import files
from thinkswitch_plugin.run.checkpoint import ADAPTER_WEIGHTS
from thinkswitch_plugin.training import distil

PORT = "29511"
VARIABLES = {**distil.ENGINE_ENV, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
TRAIN = """
import json, sys
from pathlib import Path
from thinkswitch_plugin import files
from thinkswitch_plugin.training import distil
here = Path(sys.argv[1])
print(json.dumps(distil.train(files.read_yaml(here / "recipe.yaml"), here, options=sys.argv[2:], minimum=1e-4)))
"""


def launcher(*options: str) -> list[str]:
    """Options of `axolotl train` for torchrun."""
    return ["--launcher", "torchrun", "--", *options]


def write_config(run: Path, here: Path, steps: int) -> None:
    """The config of a run's iteration 1, for a training of so many steps in another folder."""
    config = files.read_yaml(run / "iter-1" / "axolotl.yaml")
    own = {"output_dir": str(here / "adapter"), "dataset_prepared_path": str(here / "prepared")}
    files.write_yaml(here / "recipe.yaml", config | own | {"max_steps": steps, "logging_steps": max(1, steps // 8)})


def train(here: Path, options: list[str], prefix: list[str] | None = None, **variables: str) -> subprocess.Popen[str]:
    """Start the training of the loop, on another host if a prefix says so; its last line of output is what it found."""
    words = [*(prefix or []), sys.executable, "-c", TRAIN, str(here), *options]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, **VARIABLES, **variables})


def result_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a training found, when it has ended."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"bench-hosts: the training failed with exit code {process.returncode}")
    return dict(json.loads(output.splitlines()[-1]))


def on_two_hosts(here: Path) -> dict[str, Any]:
    """Train on two hosts, with one process on each."""
    with hosts(2) as (first, second):
        place = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", first.address, "--master_port", PORT]
        card = {"GLOO_SOCKET_IFNAME": first.interface}
        process = train(here, launcher(*place, "--node_rank", "0"), first.command([]), **card)
        while not (here / "axolotl.yaml").exists() and process.poll() is None:
            time.sleep(0.1)
        building = files.temporary_sibling(here / "adapter")
        axolotl = Path(sys.executable).with_name("axolotl")
        path = f"{axolotl.parent}{os.pathsep}{os.environ['PATH']}"  # for torchrun
        words = [
            axolotl,
            "train",
            here / "axolotl.yaml",
            "--output-dir",
            building,
            *launcher(*place, "--node_rank", "1"),
        ]
        with (here / "second.log").open("wb") as log:
            environment = {**os.environ, **VARIABLES, **card, "PATH": path}
            other = subprocess.Popen(second.command(words), stdout=log, stderr=log, env=environment)
            result = result_of(process)
            if other.wait():
                raise SystemExit(f"bench-hosts: the second host failed; {(here / 'second.log').read_text()[-3000:]}")
    return result


def differing(one: Path, other: Path) -> int:
    """How many tensors of two adapters are not equal bit for bit."""
    first, second = (load_file(str(folder / "adapter" / ADAPTER_WEIGHTS)) for folder in (one, other))
    if first.keys() != second.keys():
        raise SystemExit("bench-hosts: the two adapters have other tensors")
    return sum(not torch.equal(first[name], second[name]) for name in first)


def main() -> None:
    """Print a table, and the same as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domain", default="arithmetic")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, default=32)
    given = parser.parse_args()
    if lacking := missing():
        print(f"bench-hosts: skipped, {lacking}")
        print(json.dumps({"skipped": lacking}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary, name) for name in ("one", "two")}
        for folder in folders.values():
            folder.mkdir()
            write_config(given.runs / given.domain, folder, given.steps)
        one = result_of(train(folders["one"], launcher("--standalone", "--nproc_per_node", "2")))
        two = on_two_hosts(folders["two"])
        result = {
            "steps": given.steps,
            "processes, one host": one["processes"],
            "processes, two hosts": two["processes"],
            "loss, first and last, one host": [one["losses"][0][1], one["losses"][-1][1]],
            "loss, first and last, two hosts": [two["losses"][0][1], two["losses"][-1][1]],
            "tensors of the adapter that differ between one host and two": differing(folders["one"], folders["two"]),
        }
    for name, value in result.items():
        print(f"| {name} | {value} |")
    print(json.dumps(result))
    if result["tensors of the adapter that differ between one host and two"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
