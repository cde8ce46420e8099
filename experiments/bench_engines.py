"""`make bench-engines`: which engine should answer where vLLM is not installed?

Each candidate answers the same 512 questions of the demo domain with the same
checkpoint, greedy, from a cold start, one after the other on this machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import openai

from thinkswitch_plugin import files
from thinkswitch_plugin.args import SamplingKeys
from thinkswitch_plugin.data.batch import Asked
from thinkswitch_plugin.data.prompts import write_requests
from thinkswitch_plugin.demo import task
from thinkswitch_plugin.engines import servers

CHECKPOINT = Path(".cache/arithmetic/seed-0/thinking")
QUESTIONS = 512

EMBEDDED = """
import sys
from pathlib import Path
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.engines.generate import generate
folder = Path(sys.argv[1])
generate(folder / "requests.jsonl", folder / "out.jsonl", sys.argv[2], "embedded", EngineKeys(), log=folder / "log")
"""
LM_EVAL = """
import sys
from pathlib import Path
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from thinkswitch_plugin import files
model = HFLM(pretrained=sys.argv[2], device="cpu", dtype="float32", batch_size=64)
settings = {"until": ["<|im_end|>"], "do_sample": False, "max_gen_toks": 64}
rows = [row for _, row in files.read_jsonl(Path(sys.argv[1]) / "requests.jsonl")]
model.generate_until([
    Instance("generate_until", {}, (model.apply_chat_template(row["body"]["messages"]), settings), i)
    for i, row in enumerate(rows)
])
"""


def in_process(code: str) -> Callable[[Path], None]:
    """A candidate that is one Python process."""

    def run(folder: Path) -> None:
        subprocess.run([sys.executable, "-c", code, str(folder), str(CHECKPOINT)], check=True, capture_output=True)

    return run


def serve(*options: str) -> Callable[[Path], None]:
    """A candidate behind `transformers serve`."""

    def run(folder: Path) -> None:
        port = servers.free_port(0)
        command = [Path(sys.executable).with_name("transformers"), "serve", CHECKPOINT, "--port", str(port), *options]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([str(w) for w in command], stdout=log, stderr=log)
        try:
            while True:
                try:
                    urlopen(f"http://localhost:{port}/health", timeout=1)
                    break
                except OSError:
                    time.sleep(0.2)
            client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", timeout=600)

            def ask(row: dict[str, Any]) -> str:
                wanted = {k: row["body"][k] for k in ("model", "messages", "temperature", "max_tokens")}
                return str(client.chat.completions.create(**wanted).choices[0].finish_reason)

            with ThreadPoolExecutor(64) as pool:
                ends = list(pool.map(ask, (row for _, row in files.read_jsonl(folder / "requests.jsonl"))))
            assert ends == ["stop"] * QUESTIONS
        finally:
            process.terminate()
            process.wait()

    return run


CANDIDATES: dict[str, Callable[[Path], None]] = {
    "transformers generate, in process": in_process(EMBEDDED),
    "lm-eval's hf backend, in process": in_process(LM_EVAL),
    "transformers serve": serve(),
    "transformers serve --continuous-batching": serve("--continuous-batching"),
}


def main() -> None:
    """Print a table, and the same figures as one line of JSON."""
    if not CHECKPOINT.is_dir():
        sys.exit("bench-engines: no demo pair yet; run `make pair` first.")
    prompts = [(f"p{i}", [{"role": "user", "content": q}]) for i, q in enumerate(task.training_prompts(0, QUESTIONS))]
    sampling = SamplingKeys(temperature=0, max_tokens=64)  # type: ignore[call-arg]
    seconds: dict[str, float] = {}
    for name, run in CANDIDATES.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_requests(
                folder / "requests.jsonl",
                prompts,
                model=str(CHECKPOINT),
                how=Asked(opened=True),
                sampling=sampling,
                seed=0,
            )
            started = time.monotonic()
            run(folder)
            seconds[name] = round(time.monotonic() - started, 1)
    best = next(iter(seconds.values()))
    print(f"{QUESTIONS} answers from a cold start:")
    for name, value in seconds.items():
        print(f"  {name:42} {value:6.1f} s  {value / best:4.1f} ×")
    result: dict[str, Any] = {"questions": QUESTIONS, "seconds": seconds}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
