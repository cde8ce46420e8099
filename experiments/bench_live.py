"""`make bench-live`: λ moved in a running vLLM beside a checkpoint written, and a vLLM started, for every λ.

Both ways answer the same questions at the same points under greedy decoding, one way after the other on this machine,
for the embedded pair and for a pair of middle size with random bfloat16 weights. All texts have to be equal. A point
costs what passes before its first question: live, the weights of the point, and its share of the one start; written,
a merge, a start and a stop.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from thinkswitch_plugin import files
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.demo import task
from thinkswitch_plugin.engines.ask import ask_in_order
from thinkswitch_plugin.engines.client import ServedModel
from thinkswitch_plugin.engines.servers import serving
from thinkswitch_plugin.merging.command import write_merge
from thinkswitch_plugin.merging.config import place_models, set_lambda
from thinkswitch_plugin.merging.holding import Live, MergeJob
from thinkswitch_plugin.run import checkpoint
from thinkswitch_plugin.search.sweep import parse_weights

PAIR = Path(".cache/arithmetic/seed-0")
SOURCE = Path("merge_configs/slerp.yaml")
ROOM = 512
LARGE = 4_022_468_096  # parameters of Qwen3-4B


@dataclass
class Way:
    """What one way took: seconds of every start and of every point, the peak of memory, and all texts."""

    starts: list[float] = field(default_factory=list)
    points: list[float] = field(default_factory=list)
    peak: float = 0.0
    texts: dict[float, list[Any]] = field(default_factory=dict)

    def overhead(self, points: int) -> float:
        """Seconds a point without answering, starts included, in a sweep of so many points."""
        starts = sum(self.starts) / points if len(self.starts) == 1 else mean(self.starts)
        return mean(self.points) + starts


@contextmanager
def peak_memory(way: Way) -> Iterator[None]:
    """Note the peak of what this process and all below it hold beside files, in GB."""
    ended = threading.Event()

    def held(pid: int) -> int:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            return 0
        return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))

    def watch() -> None:
        while not ended.wait(0.5):
            here = psutil.Process()
            pids = [here.pid, *(below.pid for below in here.children(recursive=True))]
            way.peak = max(way.peak, sum(map(held, pids)) * 1024 / 1e9)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def make_middle(out: Path, parameters: int) -> None:
    """Two checkpoints of about so many parameters with random bfloat16 weights, σ as that of the real pair."""
    for mode in ("instruct", "thinking"):
        config = AutoConfig.from_pretrained(PAIR / mode)
        config.hidden_size, config.intermediate_size, config.head_dim = 1024, 3072, 64
        config.num_attention_heads, config.num_key_value_heads, config.vocab_size = 16, 8, 8192
        layer = 1024 * 64 * 48 + 3 * 1024 * 3072
        config.num_hidden_layers = max(2, round((parameters - 1024 * 8192) / layer))
        config.layer_types = ["full_attention"] * config.num_hidden_layers
        config.dtype, config.tie_word_embeddings = "bfloat16", True
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        torch.manual_seed(len(mode))
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.mul_(8.0 if tensor.ndim > 1 else 1.0)  # else every prompt gets the same answer
                tensor.add_(torch.randn_like(tensor) * tensor.float().std().nan_to_num().clamp(1e-3) * 0.2)
        model.save_pretrained(out / mode)
        checkpoint.adopt_mode(PAIR / mode, out / mode)


def bodies(questions: int, tokens: int) -> list[dict[str, Any]]:
    """Greedy requests that ask for the ids of the tokens too: random weights give tokens without a text."""
    settings = {"max_tokens": tokens, "temperature": 0, "stop": ["<|im_end|>"], "return_token_ids": True}
    return [{"messages": [{"role": "user", "content": text}], **settings} for text in task.held_out(questions)]


def said(replies: list[Any]) -> list[Any]:
    """Text and token ids of every reply."""
    choices = [reply["choices"][0] for reply in replies]
    return [(choice["message"]["content"], choice.get("token_ids")) for choice in choices]


def config_at(pair: Path, weight: float) -> dict[str, Any]:
    """The merge config of a point."""
    roles = {mode: str((pair / mode).absolute()) for mode in ("instruct", "thinking")}
    return dict(place_models(set_lambda(files.read_yaml(SOURCE), weight, SOURCE), roles))


def live(pair: Path, weights: list[float], asked: list[dict[str, Any]], work: Path) -> Way:
    """One server for all points."""
    way, keys = Way(), EngineKeys.model_validate({})
    with peak_memory(way):
        holder = Live(MergeJob(pair / "thinking", pair / "instruct", keys, work, work / "vllm.log", batch=64))
        try:
            for weight in weights:
                started = time.monotonic()
                engine = holder.hold(config_at(pair, weight))
                if engine.server is None:
                    engine.start(ROOM)
                    way.starts.append(time.monotonic() - started)
                    started = time.monotonic()
                engine.ready(ROOM)
                way.points.append(time.monotonic() - started)
                way.texts[weight] = said(ask_in_order(engine, asked))
        finally:
            holder.close()
    return way


def written(pair: Path, weights: list[float], asked: list[dict[str, Any]], work: Path) -> Way:
    """A checkpoint and a server for every point."""
    way, keys = Way(), EngineKeys.model_validate({})
    merged, log = work / "merged", work / "vllm.log"
    with peak_memory(way):
        for weight in weights:
            started = time.monotonic()
            files.write_yaml(work / "merge.yaml", config_at(pair, weight))
            write_merge(work / "merge.yaml", merged, work / "merge.log")
            checkpoint.adopt_mode(pair / "instruct", merged)
            way.points.append(time.monotonic() - started)
            started = time.monotonic()
            with serving("vllm", str(merged), keys, log, max_len=ROOM) as server:
                way.starts.append(time.monotonic() - started)
                way.texts[weight] = said(ask_in_order(ServedModel(server, str(merged), keys), asked))
                started = time.monotonic()
            files.remove(merged)
            way.points[-1] += time.monotonic() - started
    return way


def compare(name: str, pair: Path, options: Any, asked: list[dict[str, Any]], work: Path) -> dict[str, Any]:
    """Both ways on one pair, as a table; what the last line of JSON says of it."""
    weights, rewritten = parse_weights(options.lambdas), parse_weights(options.written or options.lambdas)
    work.mkdir(parents=True)
    ways = {"live": live(pair, weights, asked, work), "written": written(pair, rewritten, asked, work)}
    first, second = ways.values()
    parameters = sum(tensor.numel() for tensor in AutoModelForCausalLM.from_pretrained(pair / "thinking").parameters())
    equal = [first.texts[weight] == second.texts[weight] for weight in rewritten]
    different = len({json.dumps(texts) for texts in first.texts.values()})
    print(
        f"{name}: {parameters:,} parameters, {len(weights)} points live, {len(rewritten)} written, {len(asked)} questions"
    )
    print(f"  {'':8} {'start':>8} {'a point':>9} {'both, a point':>14} {'peak memory':>12}")
    found: dict[str, Any] = {"parameters": parameters, "points": len(weights), "written": len(rewritten)}
    for label, way in ways.items():
        overhead = way.overhead(len(weights))
        print(f"  {label:8} {mean(way.starts):6.1f} s {mean(way.points):7.2f} s {overhead:12.2f} s {way.peak:9.2f} GB")
        found[label + "_seconds"] = {
            "start": round(mean(way.starts), 2),
            "point": round(mean(way.points), 3),
            "overhead": round(overhead, 2),
            "peak_gb": round(way.peak, 2),
        }
    ratio = second.overhead(len(weights)) / first.overhead(len(weights))
    print(
        f"  {ratio:.1f} × less; texts equal at {sum(equal)} of {len(equal)} points; {different} different sets of answers",
        flush=True,
    )
    return {**found, "ratio": round(ratio, 1), "equal": all(equal), "different": different}


def main() -> None:
    """Print both tables and one line of JSON; exit 1 if a text differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lambdas", default="0 0.1 … 1")
    parser.add_argument("--written", default="", help="only these points are written too (default: all)")
    parser.add_argument("--parameters", type=int, default=250_000_000, help="of the middle size")
    parser.add_argument("--questions", type=int, default=200)
    options = parser.parse_args()
    if not PAIR.is_dir():
        sys.exit("bench-live: no embedded pair yet; run `make pair` first.")
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        tiny = compare("embedded pair", PAIR, options, bodies(options.questions, 64), here / "tiny")
        make_middle(here / "pair", options.parameters)
        middle = compare("middle size", here / "pair", options, bodies(4, 8), here / "middle")
    small, large = (found["live_seconds"]["point"] for found in (tiny, middle))
    per_parameter = (large - small) / (middle["parameters"] - tiny["parameters"])
    estimate = small + per_parameter * (LARGE - tiny["parameters"])
    print(
        f"Qwen3-4B, in proportion to its parameters: {estimate:.0f} s a point live on this machine, without the start"
    )
    print(json.dumps({"tiny": tiny, "middle": middle, "estimate_4b_seconds": round(estimate, 1)}))
    if not (tiny["equal"] and middle["equal"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
