"""`make bench-live`: λ moved in a running vLLM beside a checkpoint written, and a vLLM started, for every λ.

Both ways answer the same questions at the same points under greedy decoding, one way after the other on this machine,
for the demo pair and for a pair of middle size with random bfloat16 weights. All texts have to be equal. A point
costs what passes before its first question: live, the weights of the point, and its share of the one start; written,
a merge, a start and a stop. Further parts compare the texts alone: a small mixture of experts; and, if they are named,
the demo pair with the weights rounded by vLLM (online quantization) and with two workers (tensor parallelism).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Qwen3MoeConfig

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
PARTS = ("embedded", "middle", "experts", "rounded", "workers")
ROUNDED = ("--dtype", "bfloat16", "--quantization", "fp8_per_tensor")
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


@dataclass(frozen=True)
class Part:
    """One comparison: a pair, how many questions are asked, tokens of an answer, and what vLLM is told."""

    title: str
    pair: Path
    questions: int
    tokens: int
    options: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


def part_of(name: str, place: Path, options: argparse.Namespace) -> Part:
    """A part by its name; a pair of random weights is made in `place`."""
    if name == "middle":
        return Part("middle size", random_pair(place, middle(options.parameters)), 4, 8)
    if name == "experts":
        return Part("mixture of experts", random_pair(place, experts()), 20, 8)
    if name == "rounded":
        return Part("demo pair, rounded", PAIR, 20, 64, ROUNDED)
    if name == "workers":
        apart = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # else vLLM wants a NUMA node for each
        return Part("demo pair, two workers", PAIR, 20, 64, ("--tensor-parallel-size", "2"), apart)
    return Part("demo pair", PAIR, options.questions, 64)


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


def middle(parameters: int) -> PretrainedConfig:
    """A dense model of about so many parameters."""
    config = AutoConfig.from_pretrained(PAIR / "thinking")
    config.hidden_size, config.intermediate_size, config.head_dim = 1024, 3072, 64
    config.num_attention_heads, config.num_key_value_heads, config.vocab_size = 16, 8, 8192
    layer = 1024 * 64 * 48 + 3 * 1024 * 3072
    config.num_hidden_layers = max(2, round((parameters - 1024 * 8192) / layer))
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    config.tie_word_embeddings = True
    return config


def experts() -> PretrainedConfig:
    """A small mixture of experts with the vocabulary of the demo pair."""
    dense = AutoConfig.from_pretrained(PAIR / "thinking")
    return Qwen3MoeConfig(
        **{name: getattr(dense, name) for name in ("vocab_size", "eos_token_id", "pad_token_id", "head_dim")},
        **{"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2},
        max_position_embeddings=dense.max_position_embeddings,
    )


def random_pair(out: Path, config: PretrainedConfig) -> Path:
    """Two checkpoints with random bfloat16 weights; they differ by a fifth of each tensor's spread."""
    config.dtype = "bfloat16"
    for seed, mode in enumerate(("instruct", "thinking"), 1):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        torch.manual_seed(seed)
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.mul_(8.0 if tensor.ndim > 1 else 1.0)  # else every prompt gets the same answer
                tensor.add_(torch.randn_like(tensor) * tensor.float().std().nan_to_num().clamp(1e-3) * 0.2)
        model.save_pretrained(out / mode)
        checkpoint.adopt_mode(PAIR / mode, out / mode)
    return out


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


def live(pair: Path, weights: list[float], asked: list[dict[str, Any]], work: Path, keys: EngineKeys) -> Way:
    """One server for all points."""
    way = Way()
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


def written(pair: Path, weights: list[float], asked: list[dict[str, Any]], work: Path, keys: EngineKeys) -> Way:
    """A checkpoint and a server for every point."""
    way = Way()
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


def compare(part: Part, weights: list[float], rewritten: list[float], work: Path) -> dict[str, Any]:
    """Both ways on one pair, as a table; what the last line of JSON says of it.

    Args:
        weights, rewritten: λ of all points, and of those that are written too.
    """
    work.mkdir(parents=True)
    keys, asked = EngineKeys.model_validate({"vllm_args": list(part.options)}), bodies(part.questions, part.tokens)
    with patch.dict(os.environ, part.variables):
        first = live(part.pair, weights, asked, work, keys)
        second = written(part.pair, rewritten, asked, work, keys)
    model = AutoModelForCausalLM.from_pretrained(part.pair / "thinking")
    parameters = sum(tensor.numel() for tensor in model.parameters())
    equal = [first.texts[weight] == second.texts[weight] for weight in rewritten]
    different = len({json.dumps(texts) for texts in first.texts.values()})
    print(
        f"{part.title}: {parameters:,} parameters, {len(weights)} points live, {len(rewritten)} written, {len(asked)} questions"
    )
    print(f"  {'':8} {'start':>8} {'a point':>9} {'both, a point':>14} {'peak memory':>12}")
    found: dict[str, Any] = {"parameters": parameters, "points": len(weights), "written": len(rewritten)}
    for label, way in (("live", first), ("written", second)):
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


def estimate(tiny: dict[str, Any], large: dict[str, Any]) -> float:
    """Seconds a point of Qwen3-4B live on this machine, in proportion to its parameters."""
    small, more = (found["live_seconds"]["point"] for found in (tiny, large))
    per_parameter = (more - small) / (large["parameters"] - tiny["parameters"])
    return float(small + per_parameter * (LARGE - tiny["parameters"]))


def main() -> None:
    """Print a table for each part and one line of JSON; exit 1 if a text differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=PARTS[:3], choices=PARTS)
    parser.add_argument("--lambdas", default="0 0.1 … 1", help="of the demo pair and of the middle size")
    parser.add_argument("--written", default="", help="only these points are written too (default: all)")
    parser.add_argument("--parameters", type=int, default=250_000_000, help="of the middle size")
    parser.add_argument("--questions", type=int, default=200, help="to the demo pair")
    options = parser.parse_args()
    if not PAIR.is_dir():
        sys.exit("bench-live: no demo pair yet; run `make pair` first.")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        for name in options.parts:
            if name in ("embedded", "middle"):
                weights = parse_weights(options.lambdas)
                rewritten = parse_weights(options.written) if options.written else weights
            else:
                weights = rewritten = [0.0, 0.5, 1.0]
            part = part_of(name, here / "pair" / name, options)
            found[name] = compare(part, weights, rewritten, here / name)
    if {"embedded", "middle"} <= found.keys():
        found["estimate_4b_seconds"] = round(estimate(found["embedded"], found["middle"]), 1)
        print(
            "Qwen3-4B, in proportion to its parameters: "
            f"{found['estimate_4b_seconds']:.0f} s a point live on this machine, without the start"
        )
    print(json.dumps(found))
    if not all(part["equal"] for part in found.values() if isinstance(part, dict)):
        sys.exit(1)


if __name__ == "__main__":
    main()
