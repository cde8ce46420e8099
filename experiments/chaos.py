"""`make chaos`: SIGKILL runs of the demo domain at random instants, each followed by the same command.

Half the kills fall uniformly in time; the other half wait until a stage has begun to write, since
start-up takes most of a stage's time here. Who dies is drawn too:

parents     `make` and the stage at work; its engine is left to the supervisor
make        only the `make` that was started
stage       only the stage at work
engine      only the engine's own process
everything  all processes of the run at once

`--in-turn` makes one kill of each kind instead, each when another stage has begun to write.

At the end of every run: the same pairs, tensors and scores as an undisturbed run, every answer
that was on disk at a kill still there and asked once, and no process left. Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from thinkswitch_plugin import files
from thinkswitch_plugin.console import table
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run import MODES, open_run, stages, stamp_path
from thinkswitch_plugin.run.hashes import read_stamp

Plan = Sequence[tuple[str | None, str | None]]  # of each kill, the stage that is waited for and who dies; None: drawn
ROOT = Path(__file__).resolve().parent.parent
VICTIMS = ("parents", "make", "stage", "engine", "everything")
# `--in-turn`: the stage that is waited for, and who dies.
IN_TURN = (
    ("generate", "make"),
    ("train", "engine"),
    ("merge-lora", "parents"),
    ("rebuild", "stage"),
    ("eval-instruct", "everything"),
)
STAGE_SECONDS = 12.0  # about one stage: uniform kills fall within two of them
GRACE = 10.0  # seconds until everything of a killed run must have gone
# What a stage writes first.
SIGNS = {
    "requests": "iter-1/.requests.jsonl.partial",
    "generate": "iter-1/generations.jsonl",
    "pairs": "iter-1/.pairs.jsonl.partial",
    "train": "iter-1/.adapter.partial",
    "merge-lora": "iter-1/.instruct*.partial",
    "rebuild": "iter-1/.thinking.partial",
    "eval-instruct": "iter-*/eval/.instruct.partial",
    "eval-thinking": "iter-*/eval/.thinking.partial",
}


@dataclass
class Kill:
    """One kill: when, whom, and what it hit."""

    run: int
    seconds: float
    victim: str
    stage: str
    waited_for: str
    answers_stored: int
    orphans: int
    seconds_until_gone: float


@dataclass
class Outcome:
    """What all runs came to."""

    kills: list[Kill] = field(default_factory=list)
    runs: int = 0
    pairs_differ: int = 0
    tensors_differ: int = 0
    scores_differ: int = 0
    answers_lost: int = 0
    asked_again: int = 0
    leftovers: int = 0
    failed_restarts: int = 0
    unverified: int = 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--in-turn", action="store_true", help="one kill of each kind, at successive stages")
    parser.add_argument("--undisturbed", type=Path, help="run folder of a finished run to compare with")
    options = parser.parse_args()
    started = time.monotonic()
    plan: Plan = IN_TURN if options.in_turn else [(None, None)] * options.kills
    with tempfile.TemporaryDirectory(prefix="thinkswitch-chaos-") as folder:
        outcome = chaos(Path(folder), plan, random.Random(options.seed), options.undisturbed)
    return show(outcome, time.monotonic() - started)


def chaos(folder: Path, plan: Plan, rng: random.Random, undisturbed: Path | None) -> Outcome:
    """Run, kill and compare until every kill of the plan has been made and its run has ended."""
    if undisturbed is None:
        process = start(folder / "undisturbed")
        if process.wait() != 0:
            raise SystemExit(f"chaos: the undisturbed run failed:\n{output_of(folder / 'undisturbed')}")
        undisturbed = folder / "undisturbed" / "arithmetic"
    outcome = Outcome()
    while len(outcome.kills) < len(plan):
        outcome.runs += 1
        runs = folder / f"run-{outcome.runs}"
        one_run(runs, plan, rng, outcome)
        compare(undisturbed, runs / "arithmetic", outcome)
        files.remove(runs)
    return outcome


def start(runs: Path) -> subprocess.Popen[bytes]:
    """`make iterate` in a session of its own."""
    runs.mkdir(parents=True, exist_ok=True)
    hidden = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "THINKSWITCH_OWNER", "OVERLAY", "KEEP")
    with (runs / "output.txt").open("ab") as output:
        return subprocess.Popen(
            ["make", "iterate", "DOMAIN=arithmetic", "ITERATIONS=1", "ENGINE=embedded", "SEED=0", f"RUNS={runs}"],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if k not in hidden},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def output_of(runs: Path) -> str:
    """The end of what the command printed."""
    return (runs / "output.txt").read_text(errors="replace")[-3000:]


def one_run(runs: Path, plan: Plan, rng: random.Random, outcome: Outcome) -> None:
    """The same command, killed again and again, until it ends by itself."""
    stored: dict[str, bytes] = {}
    generations = runs / "arithmetic" / "iter-1" / "generations.jsonl"
    while True:
        process = start(runs)
        began = time.monotonic()
        waited_for, victim = "", None
        if len(outcome.kills) < len(plan):
            awaited, victim = plan[len(outcome.kills)]
            waited_for = aim(runs, rng, process, awaited)
        else:
            process.wait()
        if process.poll() is not None:
            if process.returncode == 0:
                break
            outcome.failed_restarts += 1
            print(f"chaos: a restart failed:\n{output_of(runs)}", flush=True)
            if outcome.failed_restarts > 3:
                raise SystemExit("chaos: given up")
            continue
        seconds = time.monotonic() - began
        victim, stage = strike(runs, process, victim or rng.choice(VICTIMS))
        hit = time.monotonic()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        while (left := of_run(runs)) and time.monotonic() - hit < GRACE:
            time.sleep(0.02)
        gone = time.monotonic() - hit
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        now = answers(generations)
        outcome.answers_lost += len(stored.keys() - now.keys())
        outcome.asked_again += sum(now.get(name, line) != line for name, line in stored.items())
        stored |= now
        kill = Kill(outcome.runs, round(seconds, 2), victim, stage, waited_for, len(now), len(left), round(gone, 2))
        outcome.kills.append(kill)
        print(
            f"  kill {len(outcome.kills)}: run {kill.run}, {kill.seconds:.1f} s after its start, {victim} in {stage}",
            flush=True,
        )
    final = answers(generations)
    outcome.answers_lost += len(stored.keys() - final.keys())
    outcome.asked_again += sum(final.get(name, line) != line for name, line in stored.items())
    outcome.asked_again += generations.read_bytes().count(b"\n") - len(final)


def aim(runs: Path, rng: random.Random, process: subprocess.Popen[bytes], awaited: str | None) -> str:
    """Wait until a stage begins to write, or for a random instant, or for the run's end; what was waited for."""
    run = runs / "arithmetic"
    done = {path.stem for path in run.glob("iter-1/.stamps/*.json")}
    waiting = [stage for stage in SIGNS if stage not in done]
    if not awaited and (not waiting or rng.random() < 0.5):
        with suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, 2 * STAGE_SECONDS))
        return "an instant"
    name = awaited or rng.choice(waiting)
    while process.poll() is None and not any(size_of(found) for found in run.glob(SIGNS[name])):
        time.sleep(0.005)
    if not awaited:
        with suppress(subprocess.TimeoutExpired):
            process.wait(rng.choice((0.0, rng.uniform(0, 0.1), rng.uniform(0, 6))))
    return f"{name} to write"


def size_of(path: Path) -> int:
    """Bytes of a file or of a folder's entry; 0 if it has gone meanwhile."""
    with suppress(OSError):
        return path.stat().st_size
    return 0


def of_run(runs: Path) -> dict[int, list[str]]:
    """The processes that work for a run, with their words; known by RUNS in their environment."""
    mark = f"RUNS={runs}\0".encode()
    found: dict[int, list[str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                ours = mark in (entry / "environ").read_bytes() + b"\0"
                words = (entry / "cmdline").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if (ours or mark[:-1] in words) and state != "Z":
                    found[int(entry.name)] = [word.decode(errors="replace") for word in words]
    return found


def strike(runs: Path, process: subprocess.Popen[bytes], victim: str) -> tuple[str, str]:
    """SIGKILL the victim; who it was and which stage was at work."""
    there = of_run(runs)
    supervisors = {pid for pid, words in there.items() if any(w.endswith("supervise.py") for w in words)}
    engines = {pid for pid in there if parent(pid) in supervisors}
    below = {pid for pid in there if pid in engines or parent(pid) in engines}
    at_work = {
        pid: words
        for pid, words in there.items()
        if pid not in supervisors | below and any(w.endswith("/thinkswitch") for w in words[:3])
    }
    forks = {pid for pid in at_work if parent(pid) in at_work}  # each is a fork of what `make` started
    stage = "make"
    if forks:
        with suppress(ThinkSwitchError, OSError):
            work = files.read_json(runs / "arithmetic" / ".stamps" / "at-work.json")
            stage = f"{work['stage']} of iteration {work['iteration']}"
    if victim == "engine" and not engines:
        victim = "stage"
    if victim == "stage" and not forks:
        victim = "parents"
    chosen = {
        "parents": set(there) - supervisors - below,
        "make": {process.pid},
        "stage": forks,
        "engine": engines,
        "everything": set(there),
    }[victim]
    for pid in chosen | ({process.pid} if victim in ("parents", "everything") else set()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if supervisors:
        stage += " (its engine)"
    return victim, stage


def parent(pid: int) -> int:
    """The process above; 0 if it has gone."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def answers(path: Path) -> dict[str, bytes]:
    """The whole lines on disk by id."""
    found = {}
    if path.is_file():
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                found[str(orjson.loads(line)["custom_id"])] = line
    return found


def compare(undisturbed: Path, disturbed: Path, outcome: Outcome) -> None:
    """Count what differs between two finished runs."""
    pairs = [
        sorted((row for _, row in files.read_jsonl(run / "iter-1" / "pairs.jsonl")), key=lambda row: row["custom_id"])
        for run in (undisturbed, disturbed)
    ]
    outcome.pairs_differ += pairs[0] != pairs[1]
    for part, name in (("adapter", "adapter_model"), ("instruct", "model"), ("thinking", "model")):
        outcome.tensors_differ += differing_tensors(
            *(run / "iter-1" / part / f"{name}.safetensors" for run in (undisturbed, disturbed))
        )
    reports = [files.read_json(run / "report.json")["iterations"] for run in (undisturbed, disturbed)]
    outcome.scores_differ += sum(
        one[mode] != other[mode] for one, other in zip(*reports, strict=True) for mode in MODES
    )
    outcome.leftovers += len(list(disturbed.rglob(".*.partial")))
    opened = open_run(disturbed)
    outcome.unverified += sum(read_stamp(stamp_path(opened, stage)) is None for stage in stages(opened))
    verify = subprocess.run([Path(sys.executable).with_name("thinkswitch"), "verify", disturbed], cwd=ROOT, check=False)
    outcome.unverified += verify.returncode != 0


def differing_tensors(one: Path, other: Path) -> int:
    """How many tensors of two files are not equal bit by bit."""
    import torch
    from safetensors.torch import load_file

    a, b = load_file(str(one)), load_file(str(other))
    return len(a.keys() ^ b.keys()) + sum(not torch.equal(a[name], b[name]) for name in a.keys() & b.keys())


def show(outcome: Outcome, seconds: float) -> int:
    """Print the tables and the line of JSON; return the exit code."""
    hits: dict[str, dict[str, int]] = {}
    for kill in outcome.kills:
        row = hits.setdefault(kill.stage, dict.fromkeys(VICTIMS, 0))
        row[kill.victim] += 1
    lines = [[stage, str(sum(row.values())), *(str(row[v]) for v in VICTIMS)] for stage, row in sorted(hits.items())]
    print("\n" + "\n".join(table(["stage hit", "kills", *VICTIMS], lines)))
    orphans = sum(kill.orphans for kill in outcome.kills)
    wrong: dict[str, Any] = {
        "runs whose pairs differ": outcome.pairs_differ,
        "tensors that differ": outcome.tensors_differ,
        "scores that differ": outcome.scores_differ,
        "answers lost": outcome.answers_lost,
        "stored answers asked again": outcome.asked_again,
        "orphan processes": orphans,
        "half-built leftovers": outcome.leftovers,
        "restarts that failed": outcome.failed_restarts,
        "stages that do not verify": outcome.unverified,
    }
    gone = max((kill.seconds_until_gone for kill in outcome.kills), default=0.0)
    facts = {"kills": len(outcome.kills), "runs": outcome.runs, "longest seconds until all had gone": gone}
    print("\n" + "\n".join(table(["", "count"], ([k, str(v)] for k, v in (facts | wrong).items()))))
    result = {
        **facts,
        **wrong,
        "answers on disk at the kills": sum(kill.answers_stored for kill in outcome.kills),
        "hits": {stage: sum(row.values()) for stage, row in sorted(hits.items())},
        "seconds": round(seconds, 1),
    }
    print(orjson.dumps(result).decode(), flush=True)
    return 1 if any(wrong.values()) or not outcome.kills else 0


if __name__ == "__main__":
    sys.exit(main())
