"""`make bench-faults`: 10,000 requests through a server that fails; is every one accounted for once?

`BENCH="--in-flight 64 1000 4000"` measures the client instead: its CPU time for each request, with so many of them
waiting at a server that answers after a fixed time. `BENCH="--shards --requests 100000 --rows-per-file 10000"` kills the
client again and again while its answers go into several files, and measures how long the repair of one file takes.

The server (faulty_server.py) refuses, stalls, answers 429, 500 and 503, sends half an answer, broken
JSON, HTML, nothing, text in another encoding, answers twice and out of order, and dies and returns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.faulty_server import FOREVER, HARMLESS, MODEL, ONCE, FaultyServer
from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.data import batch
from thinkswitch_plugin.engines.generate import generate
from thinkswitch_plugin.engines.stored import COMPLETE, StoredAnswers, repair

PER_SECOND = 260  # requests that the client sends in a second; a server waits long enough for all to be in flight


CLIENT = """
import sys
from pathlib import Path
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.engines.generate import generate
requests, out, url, rows = sys.argv[1:]
keys = EngineKeys(concurrency=128, rows_per_file=int(rows))
generate(Path(requests), Path(out), "m", url, keys, log=Path(out).with_name("log"))
"""


def prompts(count: int, seed: int = 0) -> Iterator[str]:
    """Mostly good prompts; one in ten meets a fault once, one in a hundred always."""
    draw = random.Random(seed)
    for n in range(count):
        chance = draw.random()
        if chance < 0.01:
            yield f"{draw.choice(FOREVER)}:* {n}"
        elif chance < 0.11:
            yield f"{draw.choice(ONCE)}:1 {n}"
        else:
            yield f"{draw.choice(HARMLESS)} {n}"


def account(asked: list[str], generations: Path) -> dict[str, int]:
    """What became of every prompt, by the file alone."""
    lines = Counter[str]()
    found = {"answered": 0, "failed with a reason": 0, "answers of another prompt": 0}
    for name, row in batch.read_stored(generations):
        lines[name] += 1
        body = batch.completion_body(row)
        if body is None:
            found["failed with a reason"] += bool(row["error"]["message"])
        else:
            found["answered"] += 1
            text = body["choices"][0]["message"]["content"]
            found["answers of another prompt"] += text != f"echo: {asked[int(name[1:])]}"
    ids = {f"p{n}" for n in range(len(asked))}
    return {
        "requests": len(asked),
        **found,
        "missing": len(ids - lines.keys()),
        "twice": sum(n > 1 for n in lines.values()),
        "unknown": len(lines.keys() - ids),
    }


def run(count: int, folder: Path, keys: EngineKeys, *, die_after: tuple[int, ...], away: float = 1.0) -> dict[str, Any]:
    """Ask everything, ask again, and account for both times."""
    asked = list(prompts(count))
    requests = folder / "requests.jsonl"
    out = folder / ("generations" if count > keys.rows_per_file else "generations.jsonl")
    write_requests(requests, asked)
    with FaultyServer(die_after=die_after, away=away) as server:
        started = time.monotonic()
        generate(requests, out, MODEL, server.url, keys, log=folder / "log")
        seconds = time.monotonic() - started
        result: dict[str, Any] = account(asked, out)
        result["expected to fail"] = sum(":*" in text for text in asked)
        result["times the server died"] = server.deaths
        result["HTTP requests"] = server.asked.total()
        stored = {text for text in asked if ":*" not in text}
        before, started = server.asked.copy(), time.monotonic()
        generate(requests, out, MODEL, server.url, keys, log=folder / "log")
        result["seconds of the second run"] = round(time.monotonic() - started, 1)
        result["stored answers asked again"] = sum(server.asked[text] > before[text] for text in stored)
        again = account(asked, out)
        result["second run accounts for"] = again["answered"] + again["failed with a reason"]
    result["seconds"] = round(seconds, 1)
    return result


def _serve(pipe: Connection) -> None:
    """Run a server until something arrives; then send what it saw."""
    with FaultyServer() as server:
        pipe.send(server.url)
        pipe.recv()
        pipe.send((server.most_connections, server.asked.total(), sum(n > 1 for n in server.asked.values())))


@contextmanager
def server_elsewhere() -> Iterator[tuple[str, Connection]]:
    """The address of a server in a process of its own, so that its CPU time is not the client's, and a pipe to `_serve`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ours.recv(), ours
    finally:
        process.kill()


def load(in_flight: int, count: int, folder: Path) -> dict[str, Any]:
    """CPU milliseconds of the client for each request, with `in_flight` of them waiting for their answers."""
    requests, out = folder / f"requests-{in_flight}.jsonl", folder / f"generations-{in_flight}.jsonl"
    write_requests(requests, [f"wait:{in_flight / PER_SECOND:g} {n}" for n in range(count)])
    keys = EngineKeys(concurrency=in_flight, timeout=600)  # type: ignore[call-arg]
    with server_elsewhere() as (url, pipe):
        started, before = time.monotonic(), time.process_time()
        report = generate(requests, out, MODEL, url, keys, log=folder / "log")
        spent, seconds = time.process_time() - before, time.monotonic() - started
        pipe.send("end")
        most, asked, twice = pipe.recv()
    return {
        "in flight": in_flight,
        "requests": count,
        "answered": report.answered,
        "most connections": most,
        "HTTP requests": asked,
        "asked twice": twice,
        "CPU ms a request": round(1000 * spent / count, 2),
        "seconds": round(seconds, 1),
    }


def shards(count: int, rows: int, folder: Path, kills: int = 3) -> dict[str, Any]:
    """Kill the client while it fills one file in so many, continue to the end, and account for every row."""
    asked = [f"long {n}" for n in range(count)]
    requests, out = folder / "requests.jsonl", folder / "generations"
    write_requests(requests, asked)
    started, resumed = time.monotonic(), list[float]()
    with server_elsewhere() as (url, pipe):
        command = [sys.executable, "-c", CLIENT, str(requests), str(out), url, str(rows)]
        for kill in range(1, kills + 1):
            number = count // rows * kill // (kills + 1)
            with subprocess.Popen(command) as client:
                while client.poll() is None and not (out / f"{number:05}.jsonl").exists():
                    time.sleep(0.05)
                time.sleep(1)
                client.kill()
            resumed.append(timed(lambda: StoredAnswers(out, rows)))
        subprocess.run(command, check=True)
        pipe.send("end")
        _, sent, _ = pipe.recv()
    seconds = time.monotonic() - started
    result: dict[str, Any] = account(asked, out)
    parts = files.part_files(out)
    one = timed(lambda: repair(parts[0]))
    (out / COMPLETE).unlink()
    return result | {
        "files": len(parts),
        "MB in a file": round(parts[0].stat().st_size / 1e6, 1),
        "kills": kills,
        "HTTP requests": sent,
        "seconds in all": round(seconds, 1),
        "seconds to repair one file": round(one, 3),
        "seconds to repair what a kill left, at most": round(max(resumed), 3),
        "seconds to repair all files": round(timed(lambda: StoredAnswers(out, rows)), 3),
    }


def timed(work: Callable[[], object]) -> float:
    """The seconds that it takes."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


def write_requests(path: Path, texts: Sequence[str]) -> None:
    """A batch file with one request for each text."""
    with files.atomic_file(path) as handle:
        for n, text in enumerate(texts):
            body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 10}
            handle.write(files.dumps_line({"custom_id": f"p{n}", "body": body}))


def is_whole(result: dict[str, Any]) -> bool:
    """Whether every request is accounted for exactly once, with its own answer."""
    nothing = ("missing", "twice", "unknown", "answers of another prompt", "stored answers asked again")
    return (
        all(result[name] == 0 for name in nothing)
        and result["failed with a reason"] == result["expected to fail"]
        and result["answered"] + result["failed with a reason"] == result["requests"]
        and result["second run accounts for"] == result["requests"]
    )


def main() -> None:
    """Print a table, and the same as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rows-per-file", type=int, default=100_000)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[])
    parser.add_argument("--shards", action="store_true")
    given = parser.parse_args()
    count = given.requests
    with tempfile.TemporaryDirectory() as temporary:
        if given.in_flight:
            resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
            rows = [load(n, count, Path(temporary)) for n in given.in_flight]
            for line in console.table(list(rows[0]), [[str(value) for value in row.values()] for row in rows]):
                print(line)
            print(json.dumps({"in flight": rows}))
            return
        if given.shards:
            result = shards(count, given.rows_per_file, Path(temporary))
            whole = result["answered"] == count and not result["missing"] + result["twice"] + result["unknown"]
        else:
            keys = EngineKeys(concurrency=128, timeout=5, outage=60, rows_per_file=given.rows_per_file)  # type: ignore[call-arg]
            deaths = tuple(count * share // 100 for share in (5, 25, 45, 65, 85))
            result = run(count, Path(temporary), keys, die_after=deaths)
            whole = is_whole(result)
    for name, value in result.items():
        print(f"| {name} | {value} |")
    result["every request accounted for exactly once"] = whole
    print(json.dumps(result))
    if not whole:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
