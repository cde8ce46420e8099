"""`make bench-servers`: 500 requests to two vLLM servers, one of which is killed and started again meanwhile.

Both serve the thinking checkpoint of the demo pair (`make pair`). Prints whether every request has one stored answer,
and how many each server answered. Answers go on after their end (`ignore_eos`), so that there is time for a start of vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil

from thinkswitch_plugin.args import EngineKeys, SamplingKeys
from thinkswitch_plugin.data import batch
from thinkswitch_plugin.data.prompts import write_requests
from thinkswitch_plugin.demo import task
from thinkswitch_plugin.engines.generate import generate
from thinkswitch_plugin.engines.servers import Server, free_port, serving

CHECKPOINT = Path(".cache/arithmetic/seed-0/thinking")
IN_FLIGHT = 4


@dataclass
class Replica:
    """A vLLM on a port of its own, which can be killed and started again."""

    port: int
    log: Path
    core: int
    server: Server | None = None
    answered: int = 0  # before it was killed

    def start(self, until: ExitStack) -> None:
        """Serve the checkpoint until the stack is closed."""
        keys = EngineKeys(port=self.port, vllm_args=["--gpu-memory-utilization", "0.1"])  # type: ignore[call-arg]
        env = {"VLLM_CPU_OMP_THREADS_BIND": str(self.core)}
        self.server = until.enter_context(serving("vllm", str(CHECKPOINT), keys, self.log, max_len=512, env=env))

    def kill(self) -> None:
        """Kill all of its processes at once."""
        assert self.server and self.server.process
        self.answered = self.count()
        for process in psutil.Process(self.server.process.pid).children(recursive=True):
            process.kill()
        self.server.process.wait()

    def count(self) -> int:
        """The answers since its start, as vLLM counts them."""
        with urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as reply:
            found = re.findall(r"^vllm:request_success_total\{[^}]*\} ([\d.e+]+)$", reply.read().decode(), re.MULTILINE)
        return int(sum(map(float, found)))


def disturb(replica: Replica, out: Path, share: int, until: ExitStack, times: dict[str, float]) -> None:
    """Kill a server when so many answers are stored, and start it again at once."""
    while not out.exists() or out.read_bytes().count(b"\n") < share:
        time.sleep(0.1)
    replica.kill()
    times["killed"] = time.monotonic()
    replica.start(until)
    times["back"] = time.monotonic()


def measure(count: int, tokens: int, folder: Path) -> dict[str, Any]:
    """Ask everything once, with one of the servers killed after a fifth of the answers."""
    requests, out = folder / "requests.jsonl", folder / "generations.jsonl"
    prompts = [(f"p{i}", [{"role": "user", "content": q}]) for i, q in enumerate(task.training_prompts(0, count))]
    sampling = SamplingKeys(temperature=0, max_tokens=tokens)  # type: ignore[call-arg]
    write_requests(requests, prompts, model=str(CHECKPOINT), how=batch.Asked(opened=True), sampling=sampling, seed=0)
    cores = sorted(os.sched_getaffinity(0))
    kept, killed = (
        Replica(free_port(0), folder / f"{name}.log", core)
        for name, core in (("kept", cores[0]), ("killed", cores[-1]))
    )
    keys = EngineKeys.model_validate({"concurrency": IN_FLIGHT, "server": {"add": {"ignore_eos": True}}})
    times = dict[str, float]()
    with ExitStack() as until:
        for replica in (kept, killed):
            replica.start(until)
        urls = ",".join(f"http://127.0.0.1:{replica.port}/v1" for replica in (kept, killed))
        thread = threading.Thread(target=disturb, args=(killed, out, count // 5, until, times), daemon=True)
        thread.start()
        started = time.monotonic()
        report = generate(requests, out, str(CHECKPOINT), urls, keys, log=folder / "log")
        seconds = time.monotonic() - started
        thread.join()
        lines = Counter(name for name, row in batch.read_stored(out) if not row["error"])
        return {
            "requests": count,
            "answered": report.answered,
            "stored once": sum(n == 1 for n in lines.values()),
            "answered by the server that was kept": kept.count(),
            "by the other, before it was killed": killed.answered,
            "by the other, after it came back": killed.count(),
            "seconds": round(seconds, 1),
            "seconds until the other was back": round(times["back"] - times["killed"], 1),
        }


def main() -> None:
    """Print a table, and the same as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    if not CHECKPOINT.is_dir():
        sys.exit("bench-servers: the demo pair is not there yet; run `make pair` first.")
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(given.requests, given.tokens, Path(temporary))
    for name, value in result.items():
        print(f"| {name} | {value} |")
    print(json.dumps(result))
    if not (
        result["answered"] == result["stored once"] == given.requests and result["by the other, after it came back"]
    ):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
