"""`make bench-sweep`: a sweep in memory beside the plain chain of mergekit-yaml and lm_eval.

Both judge the same points of the demo pair with the same task under greedy decoding, one
after the other on this machine, each from a cold start. The scores have to be equal at
every point: the sweep merges with mergekit too, only the checkpoint on disk is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from thinkswitch_plugin import files
from thinkswitch_plugin.judging.figures import summarize
from thinkswitch_plugin.judging.samples import graded, newest
from thinkswitch_plugin.merging.config import place_models, set_lambda
from thinkswitch_plugin.search.sweep import parse_weights

PAIR = Path(".cache/arithmetic/seed-0")
TASK = "thinkswitch_arithmetic"
FIGURES = ("mean@k", "tokens", "think_ratio", "answered", "truncated")
BIN = Path(sys.executable).parent


def call(*words: str | Path) -> None:
    """Run a command; its output is shown only if it fails."""
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"bench-sweep: {' '.join(map(str, words))} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def in_memory(weights: list[float], out: Path, limit: int | None) -> dict[float, dict[str, float]]:
    """`thinkswitch sweep`."""
    words = ["--domain", "arithmetic", "--runs", out / "none", "--engine", "embedded"]
    words += ["--instruct", PAIR / "instruct", "--thinking", PAIR / "thinking", "--out", out]
    words += ["--lambdas", " ".join(map(str, weights)), *(["--limit", str(limit)] if limit else [])]
    call(BIN / "thinkswitch", "sweep", *words)
    points = files.read_json(out / "sweep" / "sweep.json")["points"]
    return {p["lambda"]: {name: p[name] for name in FIGURES} for p in points}


def plain_chain(weights: list[float], out: Path, limit: int | None) -> dict[float, dict[str, float]]:
    """`mergekit-yaml`, then `lm_eval`, per point; the checkpoint is deleted after its turn."""
    source = Path("merge_configs/slerp.yaml")
    found = {}
    for weight in weights:
        config, merged, judged = out / "merge.yaml", out / "merged", out / f"eval-{weight:g}"
        roles = {mode: str(PAIR.absolute() / mode) for mode in ("instruct", "thinking")}
        files.write_yaml(config, place_models(set_lambda(files.read_yaml(source), weight, source), roles))
        call(BIN / "mergekit-yaml", config, merged, "--copy-tokenizer", "--lazy-unpickle")
        call(
            *(BIN / "lm_eval", "run", "--model", "hf"),
            *("--model_args", f"pretrained={merged},tokenizer={PAIR / 'instruct'},dtype=auto", "--device", "cpu"),
            *("--tasks", TASK, "--include_path", "lm_eval_tasks", "--batch_size", "400"),
            *("--apply_chat_template", "--log_samples", "--output_path", judged),
            *(("--limit", str(limit)) if limit else ()),
        )
        newest(judged, f"samples_{TASK}_*.jsonl")
        figures = summarize(list(graded(judged, TASK, str(PAIR / "instruct"), "digit")[1]))
        found[weight] = {name: figures[name] for name in FIGURES}
        files.remove(merged)
    return found


def main() -> None:
    """Print a table, and the same figures as one line of JSON; exit 1 if a score differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lambdas", default="0 0.1 … 1")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    options = parser.parse_args()
    if not PAIR.is_dir():
        sys.exit("bench-sweep: no demo pair yet; run `make pair` first.")
    weights = parse_weights(options.lambdas)
    seconds, scores = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, way in (("in memory", in_memory), ("mergekit-yaml + lm_eval", plain_chain)):
            folder = Path(temporary) / name.replace(" ", "-")
            folder.mkdir()
            started = time.monotonic()
            scores[name] = way(weights, folder, options.limit)
            seconds[name] = round(time.monotonic() - started, 1)
    ours, plain = scores.values()
    print(f"{len(weights)} points of λ, greedy:")
    print(f"  {'λ':>6}  {'in memory':>22}  {'mergekit-yaml + lm_eval':>24}  equal")
    for weight in weights:
        shown = [f"{100 * s[weight]['mean@k']:.1f} % {s[weight]['tokens']:.3f} tokens" for s in (ours, plain)]
        print(f"  {weight:6g}  {shown[0]:>22}  {shown[1]:>24}  {ours[weight] == plain[weight]}")
    ratio = seconds["mergekit-yaml + lm_eval"] / seconds["in memory"]
    for name, value in seconds.items():
        print(f"  {name:26} {value:7.1f} s")
    print(f"  {ratio:.1f} times faster")
    print(json.dumps({"points": len(weights), "seconds": seconds, "ratio": round(ratio, 2), "equal": ours == plain}))
    if ours != plain:
        sys.exit(1)


if __name__ == "__main__":
    main()
