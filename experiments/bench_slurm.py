"""`make bench-slurm`: a sweep as a job array of Slurm on two nodes, one of which is killed; is every point there, and the same?

Slurm's controller and two nodes run on this machine, each node on a host of its own (hosts.py; needs root), with Debian's
packages (`apt-get install slurmctld slurmd slurm-client munge`). Needs a run (`make iterate`). Every task of the array is the ordinary command
for one λ in a folder of its own; at the end the same command for all λ collects them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from experiments import bench_cluster
from experiments.hosts import NETWORK, Host, hosts, missing
from thinkswitch_plugin.search.sweep import parse_weights

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
CONFIG = """
ClusterName=bench
SlurmctldHost={controller}({network}.254)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmdTimeout=10
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
TASK = """#!/bin/sh
cd {here}
exec {python} -m thinkswitch_plugin.cli {words} --lambdas "$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {folder}/lambdas)" --out {folder}/part-$SLURM_ARRAY_TASK_ID
"""


@contextmanager
def started(command: Sequence[str | Path], log: Path, **variables: str) -> Iterator[None]:
    """A service for the length of the block."""
    with log.open("ab") as output:
        process = subprocess.Popen([*map(str, command)], stdout=output, stderr=output, env={**os.environ, **variables})
        try:
            yield
        finally:
            process.terminate()
            process.wait()


@contextmanager
def cluster(folder: Path) -> Iterator[list[Host]]:
    """The nodes of a Slurm cluster of two."""
    with ExitStack() as until:
        found = until.enter_context(hosts(2))
        nodes = "\n".join(f"NodeName={host.name} NodeAddr={host.address} CPUs=1" for host in found)
        config = CONFIG.format(controller=socket.gethostname(), network=NETWORK, folder=folder, nodes=nodes)
        (folder / "slurm.conf").write_text(config)
        for name in ("state", *(host.name for host in found)):
            (folder / name).mkdir()
        (folder / "munge.key").touch(mode=0o600)
        (folder / "munge.key").write_bytes(secrets.token_bytes(64))
        files = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        munge = [f"--{name}={folder}/munge.{name.removesuffix('-file')}" for name in files]
        until.enter_context(started(["munged", "--foreground", "--force", *munge], folder / "munge.log"))
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        while not (folder / "munge.socket").exists():
            time.sleep(0.1)
        until.enter_context(started(["slurmctld", "-D"], folder / "slurmctld.out"))
        for host in found:
            until.enter_context(started(host.command(["slurmd", "-D"]), folder / "slurmd.out"))
        yield found


def told(*words: str) -> str:
    """What a command of Slurm prints."""
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def run_array(folder: Path, words: list[str], lambdas: list[float]) -> dict[str, Any]:
    """Submit the points as an array, kill a node that works on one when two are done, and wait for the end."""
    (folder / "lambdas").write_text("".join(f"{weight:g}\n" for weight in lambdas))
    task = folder / "task.sh"
    task.write_text(TASK.format(here=Path.cwd(), python=sys.executable, words=" ".join(words), folder=folder))
    with cluster(folder) as (_, second):
        options = [f"--array=1-{len(lambdas)}", "--requeue", "--open-mode=append", f"--output={folder}/task-%a.log"]
        began = time.monotonic()
        job = told("sbatch", "--parsable", *options, str(task)).strip()
        killed, restarts = "", 0
        while told("squeue", "--noheader", "--array", f"--jobs={job}"):
            running = told("squeue", "--noheader", "--states=R", "--format=%K", f"--nodelist={second.name}").strip()
            if not killed and running and len(list(folder.glob("part-*/sweep/points/*/candidate.json"))) >= 2:
                second.kill()
                killed = running
            restarts = max(restarts, sum(map(int, re.findall(r"Restarts=(\d+)", told("scontrol", "show", "job", job)))))
            time.sleep(1)
        return {
            "node killed during task": killed,
            "tasks requeued": restarts,
            "seconds": round(time.monotonic() - began, 1),
        }


def main() -> None:
    """Print a table, and the same as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domain", default="arithmetic")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--lambdas", default="0 0.2 … 1")
    given = parser.parse_args()
    lacking = missing() or next((f"`{name}` is not installed" for name in PROGRAMS if shutil.which(name) is None), "")
    if lacking:
        print(f"bench-slurm: skipped, {lacking}")
        print(json.dumps({"skipped": lacking}))
        return
    weights = parse_weights(given.lambdas)
    words = ["sweep", "--domain", given.domain, "--runs", str(given.runs.resolve())]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)  # for munge's socket
        result = {"points": len(weights), **run_array(folder, words, weights)}
        for place in folder.glob("part-*/sweep/points/*"):
            shutil.copytree(place, folder / "all" / "sweep" / "points" / place.name)
        found = {}
        for name in ("all", "serial"):
            began = time.monotonic()
            command = [sys.executable, "-m", "thinkswitch_plugin.cli", *words, "--lambdas", given.lambdas]
            subprocess.run([*command, "--out", str(folder / name)], check=True, stdout=sys.stderr)
            result[f"seconds, {'collecting' if name == 'all' else name}"] = round(time.monotonic() - began, 1)
            found[name] = bench_cluster.without_seconds(bench_cluster.points(folder / name))
        result["equal to the serial command's"] = found["all"] == found["serial"]
    for name, value in result.items():
        print(f"| {name} | {value} |")
    print(json.dumps(result))
    if not (result["equal to the serial command's"] and result["tasks requeued"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
