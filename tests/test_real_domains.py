"""AIME and PubMedQA at tiny scale: their recipes and tasks, with another model and other data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import BIN, ROOT
from thinkswitch_plugin import files
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.data.pairs import write_pairs
from thinkswitch_plugin.demo import task
from thinkswitch_plugin.engines import servers
from thinkswitch_plugin.engines.generate import generate
from thinkswitch_plugin.judging.samples import newest, samples_file

pytestmark = pytest.mark.slow
GREEDY = "temperature=0,do_sample=False,max_gen_toks=40"
GREEDY_TASKS = ("thinkswitch_aime", "thinkswitch_pubmedqa", "thinkswitch_arithmetic")
SAMPLED = "temperature=1.5,max_gen_toks=40"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local evaluation sets with the columns of the hub's datasets."""
    folder = tmp_path_factory.mktemp("data")
    questions = task.held_out(30)
    with files.atomic_file(folder / "aime_2026.jsonl") as out:
        for number, question in enumerate(questions):
            row = {"problem_idx": number, "problem": question, "answer": int(task.answer(question))}
            out.write(files.dumps_line(row))
    with files.atomic_file(folder / "pubmedqa.jsonl") as out:
        for number, question in enumerate(questions[:12]):
            decision = ("yes", "no", "maybe")[number % 3]
            row = {
                "pubid": number,
                "question": f"is {question} even?",
                "final_decision": decision,
                "context": {"contexts": [f"{question} was found.", "it was added up."]},
            }
            out.write(files.dumps_line(row))
    return folder


@pytest.fixture(scope="module")
def tiny(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An overlay that replaces the model and the training data, and nothing of the method.

    The pair is stored in bfloat16, as published ones are.
    """
    folder = tmp_path_factory.mktemp("overlay")
    for mode, found in files.read_json(finished_run / "iter-0" / "pair.json").items():
        AutoModelForCausalLM.from_pretrained(found["path"], dtype=torch.bfloat16).save_pretrained(folder / mode)
        AutoTokenizer.from_pretrained(found["path"]).save_pretrained(folder / mode)
    with files.atomic_file(folder / "prompts.jsonl") as out:
        for question in task.training_prompts(0, 40):
            out.write(files.dumps_line({"problem": question}))
    overlay = folder / "tiny.yaml"
    overlay.write_text(
        yaml.safe_dump(
            {
                "thinkswitch": {
                    "needs": {"gpu_gb": 0, "ram_gb": 1, "disk_gb": 1},
                    "pair": {mode: str(folder / mode) for mode in ("instruct", "thinking")},
                    "prompts": {"hub": None, "path": str(folder / "prompts.jsonl"), "template": "{{problem}}"},
                    "sampling": {"max_tokens": 64},
                    "engine": {"vllm_args": []},
                    "evaluation": {"backend": "hf", "batch_size": "30", "max_tokens": 40},
                }
            }
        )
    )
    return overlay


def lm_eval(forked: Any, out: Path, data: Path, names: Sequence[str], gen_kwargs: str, *model: str) -> None:
    """Run plain lm_eval on tasks."""
    done = forked(
        BIN / "lm_eval",
        *model,
        "--tasks",
        ",".join(names),
        "--apply_chat_template",
        "--gen_kwargs",
        gen_kwargs,
        "--output_path",
        out,
        "--log_samples",
        THINKSWITCH_DATA=str(data),
        OPENAI_API_KEY="none",
    )
    assert done.returncode == 0, done.stderr[-3000:]


def completions(out: Path, name: str) -> dict[int, list[str]]:
    """The completions of one task by question."""
    return {row["doc_id"]: row["resps"][0] for _, row in files.read_jsonl(samples_file(out, name))}


def scores(out: Path, name: str) -> dict[str, float]:
    results = files.read_json(newest(out, "results_*.json"))["results"][name]
    return {metric: value for metric, value in results.items() if isinstance(value, float) and "stderr" not in metric}


def test_the_template_domain_runs_at_once(finished_run: Path, make: Any, tmp_path: Path) -> None:
    done = make("iterate", "DOMAIN=template", "ITERATIONS=1", f"RUNS={tmp_path}", "ENGINE=embedded")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    zero, one = files.read_json(tmp_path / "template" / "report.json")["iterations"]
    assert zero["instruct"]["n"] == 100
    assert one["instruct"]["mean@k"] > zero["instruct"]["mean@k"]


def test_an_evaluation_question_among_the_prompts_stops_the_run(
    tiny: Path, data: Path, forked: Any, tmp_path: Path
) -> None:
    planted = tmp_path / "planted.jsonl"
    question = task.held_out(30)[4]
    text = f"{question}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    rows = [{"problem": text}, *({"problem": q} for q in task.training_prompts(0, 14))]
    planted.write_bytes(b"".join(files.dumps_line(row) for row in rows))
    overlay = tmp_path / "planted.yaml"
    overlay.write_text(yaml.safe_dump({"thinkswitch": {"prompts": {"path": str(planted)}}}))
    words = ["--domain", "aime", "--overlay", f"{tiny} {overlay}", "--runs", tmp_path, "--engine", "embedded"]
    assert forked(BIN / "thinkswitch", "begin", *words, THINKSWITCH_DATA=str(data)).returncode == 0
    # Reported by the first stage of `make iterate`, and by the one that writes the requests, in case prompts changed.
    aime = tmp_path / "aime"
    for stage, made in ((["pair", aime], "iter-0/pair.json"), (["requests", aime, "1"], "iter-1/requests.jsonl")):
        done = forked(BIN / "thinkswitch", *stage, THINKSWITCH_DATA=str(data))
        assert done.returncode != 0 and "1 training prompt(s) overlap with the evaluation set" in done.stderr
        assert f"{question}" in done.stderr and not (aime / made).exists()


def test_k_samples_are_different_samples_with_hf(tiny: Path, data: Path, forked: Any, tmp_path: Path) -> None:
    thinking = yaml.safe_load(tiny.read_text())["thinkswitch"]["pair"]["thinking"]
    model = ["--model", "hf", "--model_args", f"pretrained={thinking}", "--batch_size", "64"]
    lm_eval(forked, tmp_path, data, ["thinkswitch_aime_k8"], SAMPLED, *model)
    texts = completions(tmp_path, "thinkswitch_aime_k8")
    assert {len(samples) for samples in texts.values()} == {8}
    assert sum(len(set(samples)) > 1 for samples in texts.values()) > 15
    found = scores(tmp_path, "thinkswitch_aime_k8")
    assert found["pass@k,samples"] >= found["mean@k,samples"]


@pytest.fixture(scope="module")
def thinking(finished_run: Path) -> str:
    """The tiny thinking checkpoint."""
    return str(files.read_json(finished_run / "iter-0" / "pair.json")["thinking"]["path"])


@pytest.fixture(scope="module")
def server(thinking: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    """One real vLLM on the CPU."""
    log = tmp_path_factory.mktemp("vllm") / "log"
    with servers.serving("vllm", thinking, EngineKeys.model_validate({}), log, max_len=512) as started:
        yield started


def model_words(server: servers.Server, model: str) -> list[str]:
    """The server as lm-eval's model arguments."""
    where = f"base_url={server.base_url}/chat/completions,num_concurrent=16,timeout=600,tokenizer_backend=none"
    return ["--model", "local-chat-completions", "--model_args", f"model={model},{where}"]


@pytest.fixture(scope="module")
def judged(
    server: servers.Server, thinking: str, data: Path, forked: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """lm-eval's files of every task by transformers, and by vLLM: one call each, since each takes long to start."""
    hf = ["--model", "hf", "--model_args", f"pretrained={thinking}", "--batch_size", "64"]
    folders = tmp_path_factory.mktemp("hf"), tmp_path_factory.mktemp("vllm")
    for folder, model in zip(folders, (hf, model_words(server, thinking)), strict=True):
        lm_eval(forked, folder, data, GREEDY_TASKS, GREEDY, *model)
    return folders


@pytest.mark.vllm
@pytest.mark.skipif(servers.vllm_python() is None, reason="vLLM is not installed: make setup-vllm")
@pytest.mark.parametrize("name", GREEDY_TASKS)
def test_hf_and_a_vllm_server_give_the_same_scores(name: str, judged: tuple[Path, Path]) -> None:
    hf, vllm = judged
    assert completions(hf, name) == completions(vllm, name)
    assert scores(hf, name) == scores(vllm, name)


@pytest.mark.vllm
@pytest.mark.skipif(servers.vllm_python() is None, reason="vLLM is not installed: make setup-vllm")
def test_k_samples_are_different_samples_with_vllm(
    server: servers.Server, thinking: str, data: Path, forked: Any, tmp_path: Path
) -> None:
    lm_eval(forked, tmp_path, data, ["thinkswitch_pubmedqa_k8"], SAMPLED, *model_words(server, thinking))
    texts = completions(tmp_path, "thinkswitch_pubmedqa_k8")
    assert {len(samples) for samples in texts.values()} == {8}
    assert sum(len(set(samples)) > 1 for samples in texts.values()) > 6


@pytest.mark.vllm
@pytest.mark.skipif(servers.vllm_python() is None, reason="vLLM is not installed: make setup-vllm")
def test_pairs_from_vllm_equal_those_of_the_embedded_engine(
    server: servers.Server, thinking: str, finished_run: Path, tmp_path: Path
) -> None:
    here, out = finished_run / "iter-1", tmp_path / "generations.jsonl"
    keys = EngineKeys.model_validate({})
    report = generate(here / "requests.jsonl", out, thinking, server.base_url, keys, log=tmp_path / "log")
    assert (report.answered, report.failed) == (512, 0)
    message = next(files.read_jsonl(out))[1]["response"]["body"]["choices"][0]["message"]
    assert "</think>" in message["content"]  # raw text, the trace in it
    write_pairs(here / "requests.jsonl", out, tmp_path / "pairs.jsonl")
    assert (tmp_path / "pairs.jsonl").read_bytes() == (here / "pairs.jsonl").read_bytes()


def test_the_tasks_are_found_outside_the_project_by_include_path(data: Path, command: Any, tmp_path: Path) -> None:
    code = (
        "from lm_eval.tasks import TaskManager;"
        f"m = TaskManager(include_path={str(ROOT / 'lm_eval_tasks')!r}, include_defaults=False);"
        "print(sorted(m.all_tasks))"
    )
    done = command(BIN / "python", "-c", code, cwd=tmp_path, THINKSWITCH_DATA=str(data))
    for name in ("thinkswitch", "thinkswitch_aime", "thinkswitch_pubmedqa_full", "thinkswitch_aime_k64"):
        assert f"'{name}'" in done.stdout, done.stderr[-2000:]
    assert "axolotl" not in os.environ.get("PYTHONPATH", "")
