"""Real vLLM on the CPU, in its own environment: the requests of one iteration, a sweep, both modes from one base."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch

from tests.conftest import BIN, ROOT
from thinkswitch_plugin import files
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.data import distributions
from thinkswitch_plugin.data.pairs import write_pairs
from thinkswitch_plugin.demo import task
from thinkswitch_plugin.demo.tokenizer import CHAT_TEMPLATES
from thinkswitch_plugin.engines import servers
from thinkswitch_plugin.engines.embedded import EmbeddedEngine
from thinkswitch_plugin.engines.generate import generate
from thinkswitch_plugin.judging.evaluation import evaluate_checkpoint
from thinkswitch_plugin.judging.figures import summarize
from thinkswitch_plugin.judging.samples import graded
from thinkswitch_plugin.perception.training import load_model
from thinkswitch_plugin.recipe import load_recipe, overlay_path, recipe_path
from thinkswitch_plugin.router.make_switch import make_switch
from thinkswitch_plugin.router.switch import Switch
from thinkswitch_plugin.run import open_run
from thinkswitch_plugin.run.checkpoint import Subject

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(servers.vllm_python() is None, reason="vLLM is not installed: make setup-vllm"),
]


UNDERSTOOD = """
import json, sys
from vllm.config.quantization import resolve_quantization_config
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
for words in sys.argv[1:]:
    options = make_arg_parser(FlexibleArgumentParser()).parse_args(json.loads(words))
    found = options.quantization and resolve_quantization_config(options.quantization, None)
    print(json.dumps([options.quantization, bool(found and found.linear)]))
"""


def test_vllm_knows_the_recipes_options_and_rounds_the_matrices_of_a_dense_model() -> None:
    recipes: list[tuple[str, tuple[str, ...]]] = [("aime", ()), ("pubmedqa", ()), ("aime", ("24gb",))]
    keys = [load_recipe(recipe_path(domain), tuple(map(overlay_path, overlays))).keys for domain, overlays in recipes]
    words = [str(servers.vllm_python()), "-c", UNDERSTOOD, *(json.dumps(k.engine.vllm_args) for k in keys)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for recipe, its, line in zip(recipes, keys, done.stdout.splitlines()[-len(keys) :], strict=True):
        name, linear = json.loads(line)
        assert linear == (its.needs.gpu_gb == 8), (recipe, name)  # some roundings take the experts of a mixture only


@pytest.fixture
def special_tags(finished_run: Path, tmp_path: Path) -> Path:
    """The tiny thinking checkpoint with special tokens as tags; each request selects whether the template opens the trace."""
    here = tmp_path / "special-tags"
    shutil.copytree(files.read_json(finished_run / "iter-0" / "pair.json")["thinking"]["path"], here)
    tokenizer = files.read_json(here / "tokenizer.json")
    for token in tokenizer["added_tokens"]:
        token["special"] = True
    files.write_json(here / "tokenizer.json", tokenizer)
    opening = "{%- set opening = '<think>\\n' if opens else '' %}"
    (here / "chat_template.jinja").write_text(opening + CHAT_TEMPLATES["instruct"].partition("%}")[2])
    return here


def both_ways(requests: Path, out: Path, switch: str, count: int, **more: Any) -> Path:
    """The first requests of a file, with a template that opens the trace and with one that does not."""
    rows = []
    for _, row in itertools.islice(files.read_jsonl(requests), count):
        for opens in (True, False):
            name = f"{row['custom_id']}-{'opened' if opens else 'inline'}"
            body = row["body"] | {"chat_template_kwargs": {switch: opens}, **more}
            body["metadata"] = {"prompt_id": name, "trace": "opened" if opens else "inline"}
            rows.append(files.dumps_line({**row, "custom_id": name, "body": body}))
    out.write_bytes(b"".join(rows))
    return out


def pairs_of(requests: Path, generations: Path) -> list[tuple[str, str]]:
    """Id and answer of every pair."""
    out = generations.with_name(f"{generations.stem}-pairs.jsonl")
    write_pairs(requests, generations, out)
    return [(row["custom_id"], row["messages"][-1]["content"]) for _, row in files.read_jsonl(out)]


def probabilities(pairs: Path) -> Iterator[dict[int, float]]:
    """The distribution of every token of every pair's answer: probability by token id."""
    for _, row in files.read_jsonl(pairs):
        for one in row["logprobs"]:
            yield {distributions.token_id(each): math.exp(each["logprob"]) for each in one["top_logprobs"]}


def test_special_tags_are_kept_and_pairs_and_distributions_equal_the_embedded_engines_whoever_opens_the_trace(
    finished_run: Path, special_tags: Path, tmp_path: Path
) -> None:
    more, source = distributions.request(8), finished_run / "iter-1" / "requests.jsonl"
    requests = both_ways(source, tmp_path / "requests.jsonl", "opens", 60, **more)
    found, texts = {}, {}
    for engine in ("vllm", "embedded"):
        out = tmp_path / f"{engine}.jsonl"
        generate(requests, out, str(special_tags), engine, EngineKeys.model_validate({}), log=tmp_path / "log")
        bodies = {row["custom_id"]: row["response"]["body"] for _, row in files.read_jsonl(out)}
        texts[engine] = {name: body["choices"][0]["message"]["content"] for name, body in bodies.items()}
        found[engine] = pairs_of(requests, out)
    assert texts["vllm"] == texts["embedded"]  # tags and spaces too
    assert all(("<think>" in text) == name.endswith("inline") for name, text in texts["vllm"].items())
    assert found["vllm"] == found["embedded"] and len(found["vllm"]) == 120
    assert all(answer.isdigit() for _, answer in found["vllm"])  # no part of a trace
    there, here = (list(probabilities(tmp_path / f"{engine}-pairs.jsonl")) for engine in found)
    assert len(there) == len(here) == 2 * 120  # a digit and the end of the turn
    for one, other in zip(there, here, strict=True):
        assert all(abs(one.get(token, 0.0) - other.get(token, 0.0)) < 1e-3 for token in one | other)


def wait_for(found: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 300
    while not found():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


def test_a_sweep_through_vllm_scores_as_in_memory_though_it_is_killed_and_then_its_server(
    finished_run: Path, tmp_path: Path, forked: Any
) -> None:
    overlay = tmp_path / "server.overlay.yaml"
    files.write_yaml(overlay, {"thinkswitch": {"evaluation": {"backend": "server"}}})
    pair = files.read_json(finished_run / "iter-0" / "pair.json")
    words = [BIN / "thinkswitch", "sweep", "--domain", "arithmetic", "--runs", tmp_path, "--lambdas", "0.2 0.9"]
    words += ["--limit", "60", "--instruct", pair["instruct"]["path"], "--thinking", pair["thinking"]["path"]]
    done = forked(*words, "--engine", "embedded", "--out", tmp_path / "embedded")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    words += ["--engine", "vllm", "--out", tmp_path / "vllm", "--overlay", overlay]
    points, log = tmp_path / "vllm" / "sweep" / "points", tmp_path / "output"
    with log.open("wb") as output:
        start = partial(subprocess.Popen, [str(word) for word in words], cwd=ROOT, stdout=output, stderr=output)
        process = start()
        answers = points / ".lambda-0.2-n60.partial" / "generations.jsonl"
        wait_for(lambda: answers.is_file() and answers.stat().st_size, process)
        process.kill()
        process.wait()
        process = start()
        wait_for((points / "lambda-0.2-n60" / "candidate.json").is_file, process)
        for below in psutil.Process(process.pid).children(recursive=True):
            if "EngineCore" in " ".join([below.name(), *below.cmdline()]):
                below.kill()
        assert process.wait(300) == 0, log.read_text()[-3000:]
    assert log.read_text().count("it is started again") == 1
    found = {}
    for engine in ("embedded", "vllm"):
        rows = files.read_json(tmp_path / engine / "sweep" / "sweep.json")["points"]
        found[engine] = [(p["lambda"], p["mean@k"], p["tokens"], p["think_ratio"]) for p in rows]
        assert not list((tmp_path / engine).rglob("*.safetensors"))  # one candidate at a time, and none is left
    assert found["vllm"] == found["embedded"]


@pytest.fixture(scope="module")
def both(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """`thinkswitch serve` on an export, and a client of it."""
    port, log = servers.free_port(0), tmp_path_factory.mktemp("serve") / "log"
    runs = exported.parent.parent.parent
    words = ["serve", "--domain", "arithmetic", "--runs", runs, "--rank", "128", "--port", port]
    with log.open("wb") as handle:
        process = subprocess.Popen(
            [str(word) for word in (BIN / "thinkswitch", *words)],
            cwd=ROOT,
            stdout=handle,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def ask(client: openai.OpenAI, model: str, question: str, **switch: bool) -> str:
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=64,
        extra_body={"chat_template_kwargs": switch} if switch else None,
    )
    return str(reply.choices[0].message.content)


def greedy(exported: Path, mode: str, questions: list[str]) -> list[str]:
    """What transformers and PEFT answer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = exported / "rank-128" / mode
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(files.read_json(exported / "export.json")["base"]["path"])
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    found = []
    for question in questions:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
        )
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0]
        found.append(tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


def test_one_server_answers_in_both_modes_as_transformers_does(both: openai.OpenAI, exported: Path) -> None:
    assert {model.id for model in both.models.list()} == {"base", "instruct", "thinking"}
    questions = task.held_out()[:12]
    asked = [(mode, question) for question in questions for mode in ("instruct", "thinking")]
    with ThreadPoolExecutor(len(asked)) as pool:  # both adapters are in one batch
        said = dict(
            zip(asked, pool.map(lambda a: ask(both, *a, enable_thinking=a[0] == "thinking"), asked), strict=True)
        )
    for mode, trace in (("instruct", False), ("thinking", True)):
        found = [said[mode, question] for question in questions]
        assert all(("</think>" in text) == trace for text in found)
        assert found == greedy(exported, mode, questions)


def test_without_the_switch_no_trace_is_opened_and_each_mode_does_as_it_learnt(both: openai.OpenAI) -> None:
    for question in task.held_out()[:4]:
        assert ask(both, "instruct", question) == ask(both, "instruct", question, enable_thinking=False)
        alone = ask(both, "thinking", question)
        assert alone.startswith("<think>") and "</think>" in alone
        assert not ask(both, "thinking", question, enable_thinking=True).startswith("<think>")  # the template wrote it


def test_a_vllm_of_the_users_own_gives_the_embedded_engines_pairs_whoever_opens_the_trace(
    finished_run: Path, exported: Path, both: openai.OpenAI, tmp_path: Path
) -> None:
    requests = both_ways(finished_run / "iter-1" / "requests.jsonl", tmp_path / "r.jsonl", "enable_thinking", 20)
    base = files.read_json(exported / "export.json")["base"]["path"]
    adapter = exported / "rank-128" / "thinking"
    here = EmbeddedEngine(adapter, load_model(Path(base), adapter))
    here.tokenizer.chat_template = (exported / "chat_template.jinja").read_text()
    rows = [row for _, row in files.read_jsonl(requests)]
    answers = [
        {"custom_id": row["custom_id"], "response": {"body": body}, "error": None}
        for row, body in here.stream(rows, 40)
    ]
    (tmp_path / "here.jsonl").write_bytes(b"".join(map(files.dumps_line, answers)))
    keys = EngineKeys.model_validate({"server": {"model": "thinking"}})
    generate(requests, tmp_path / "there.jsonl", "another name", str(both.base_url), keys, log=tmp_path / "log")
    there = pairs_of(requests, tmp_path / "there.jsonl")
    assert there == pairs_of(requests, tmp_path / "here.jsonl") and len(there) == 40


def test_the_requests_of_the_documentation(both: openai.OpenAI, command: Any) -> None:
    text = (ROOT / "docs" / "serving.md").read_text().replace("127.0.0.1:8000", f"127.0.0.1:{both.base_url.port}")
    curl, _ = re.findall(r"```sh\n(curl .*?)```", text, re.S)  # the other one is for the endpoint of the switch
    (python,) = re.findall(r"```python\n(.*?)```", text, re.S)
    if shutil.which("curl"):
        shown = command("bash", "-c", curl)
        assert "</think>" in json.loads(shown.stdout)["choices"][0]["message"]["content"], shown.stderr
    instruct, thinking = command(sys.executable, "-c", python).stdout.splitlines()
    assert instruct.startswith("instruct ") and "</think>" not in instruct
    assert thinking.startswith("thinking ") and "</think>" in thinking


def test_the_switch_asks_the_mode_that_its_router_says_of_one_server(own_run: Path, both: openai.OpenAI) -> None:
    folder = own_run
    labels = folder / "labels.jsonl"
    texts = task.training_prompts(0, 120)
    rows = [{"prompt": text, "label": "pre" if "*" in text else "post"} for text in texts]
    labels.write_bytes(b"".join(map(files.dumps_line, rows)))
    make_switch(open_run(folder), 1, labels_file=labels)
    questions = task.held_out(40)
    there = Switch.open(folder, url=str(both.base_url)).answer_all(questions)
    here = Switch.open(folder).answer_all(questions)
    assert [f.mode for f in there] == [f.mode for f in here] and {f.mode for f in there} == {"instruct", "thinking"}
    for one in there:
        assert one.reply is not None and (one.reply.trace is not None) == (one.mode == "thinking")
    # Norms and embeddings are not in an adapter, so a mode of the export is nearly its checkpoint, not quite.
    assert sum(a.answer == b.answer for a, b in zip(there, here, strict=True)) >= 38


def test_a_lora_judged_through_vllm_scores_as_in_transformers(exported: Path, tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes" / "arithmetic.yaml")
    base = files.read_json(exported / "export.json")["base"]["path"]
    lora, figures = exported / "rank-128" / "thinking", []
    for backend in ("hf", "server"):
        judged = recipe.keys.evaluation.model_copy(update={"backend": backend, "limit": 60})
        keys = recipe.keys.model_copy(update={"evaluation": judged})
        out = tmp_path / backend
        evaluate_checkpoint(Subject(base, lora=lora), out, keys, "vllm", log=tmp_path / f"{backend}.log")
        figures.append(summarize(list(graded(out, judged.task, str(lora), "digit")[1])))
    assert figures[0] == figures[1] and figures[0]["think_ratio"] == 1.0
