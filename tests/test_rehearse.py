"""The dress rehearsal: a real one at tiny size, what it learns for `make check`, and its parts."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from experiments import __main__ as commands
from experiments import rehearse, rehearse_form, rehearse_material
from experiments.rehearse_watch import Watch
from tests.conftest import ROOT
from thinkswitch_plugin import environment, files
from thinkswitch_plugin.demo.tokenizer import CHAT_TEMPLATES
from thinkswitch_plugin.engine_args import option_values
from thinkswitch_plugin.engines import servers
from thinkswitch_plugin.loop import check, foretell
from thinkswitch_plugin.recipe import Recipe, recipe_of

TINY = {
    **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16", "tie_word_embeddings": True},
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 640, "max_position_embeddings": 4096},
}


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An overlay whose pair is two folders with a config.json alone: the shape that is rehearsed.

    Evaluated in process: each start of vLLM takes as long as all the rest.
    """
    folder = tmp_path_factory.mktemp("shape")
    for mode in ("instruct", "thinking"):
        files.write_json(folder / mode / "config.json", TINY)
    path = folder / "tiny.overlay.yaml"
    pair = {mode: str(folder / mode) for mode in ("instruct", "thinking")}
    files.write_yaml(path, {"thinkswitch": {"pair": pair, "evaluation": {"backend": "hf"}}})
    return path


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(servers.vllm_python() is None, reason="vLLM is not installed: make setup-vllm")
def test_a_rehearsal_runs_every_stage_and_check_learns_from_it(
    overlay: Path, forking: Path, forked: Any, tmp_path: Path
) -> None:
    words = (f"{forking}/bin/python", "-m", "experiments", "rehearse", "--domain", "aime")
    words += ("--runs", str(tmp_path), "--overlay", str(overlay))
    done = forked(*words)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    here = tmp_path / "rehearsal-aime"
    found = files.read_json(here / "rehearsal.json")
    stages = [(row["stage"], row["iteration"]) for row in found["stages"]]
    assert len(stages) == 12 and {name for name, _ in stages} == found["costs"].keys()
    assert found["tokens_per_second"] > 0 and found["seconds_a_step"] > 0
    assert "| train 1 | " in done.stdout and "about " in done.stdout  # how long it would take is said first
    run = here / "aime"
    answers = [row["response"]["body"]["choices"][0] for _, row in files.read_jsonl(run / "iter-1/generations.jsonl")]
    form = r"[0-9]{38}</think>\n\n[0-9]{24}\n\n\\boxed\{[0-9]{1,3}\}"
    assert len(answers) == 10 and all(re.match(form, answer["message"]["content"]) for answer in answers)
    assert files.read_json(run / "iter-1/pairs.json")["kept"] == 5
    assert files.read_json(run / "iter-1/rebuild.json")["sigma"] == pytest.approx(
        0.027, abs=0.01
    )  # the norms of a tiny model weigh more
    trained, plain = files.read_yaml(run / "iter-1/axolotl.yaml"), files.read_yaml(ROOT / "recipes/aime.yaml")
    for key in ("lora_r", "num_epochs", "learning_rate", "gradient_accumulation_steps", "chunked_cross_entropy"):
        assert trained[key] == plain[key]
    report = files.read_json(run / "report.json")["iterations"][1]
    assert report["instruct"]["n"] == 3 and report["merge"]["lambda"] == 0.8
    assert not list(here.rglob("model*.safetensors"))  # deleted as soon as nothing was to read them
    again = forked(*words)
    assert again.returncode == 0 and again.stdout.count("| train 1 | ") == 1 and "making" not in again.stdout
    recipe = recipe_of("aime", (str(overlay),))
    known = foretell.foretell(tmp_path, recipe, 0)
    assert known is not None and known.tokens_per_second == pytest.approx(found["tokens_per_second"])
    assert "measured on this machine" in foretell.describe(known, recipe, {"thinkswitch_aime": 30}, 2)


def test_an_embedded_domain_needs_no_rehearsal() -> None:
    done = CliRunner().invoke(commands.main, ["rehearse", "--domain", "arithmetic"])
    assert done.exit_code == 1 and "recipes/arithmetic.yaml: the pair is made on the spot" in done.output


def written(runs: Path, recipe: Recipe, **changes: Any) -> None:
    """Figures of a rehearsal of a recipe."""
    pair = recipe.keys.pair
    costs = {
        "generate": {"fixed": 40.0, "unit": 0.01, "memory": 1.2, "written": 0.0},
        "train": {"fixed": 80.0, "unit": 30.0, "memory": 1.3, "written": 0.3},
        "eval-instruct": {"fixed": 60.0, "unit": 0.01, "memory": 1.2, "written": 0.0},
        "eval-thinking": {"fixed": 60.0, "unit": 0.01, "memory": 1.2, "written": 0.0},
        "pair": {"fixed": 2.0, "unit": 0.0, "memory": 1.0, "written": 0.0},
        "report": {"fixed": 5.0, "unit": 0.0, "memory": 1.0, "written": 0.0},
    }
    figures = {"pairs": [[pair.instruct, pair.thinking]], "hardware": environment.hardware(), "costs": costs}
    files.write_json(foretell.folder_of(runs, "aime") / foretell.FIGURES, {**figures, **changes})


def test_the_time_of_a_run_follows_from_a_rehearsal(tmp_path: Path) -> None:
    recipe = recipe_of("aime")
    written(tmp_path, recipe)
    known = foretell.measured(tmp_path, recipe)
    assert known is not None and known.tokens_per_second == pytest.approx(100)
    stages = known.stages(recipe, {"thinkswitch_aime": 30})
    assert stages["generate"][0] == pytest.approx(40 + 15 * 4 * 8192 * 0.01)
    assert stages["train"][0] == pytest.approx(80 + 15 * 8 * 30)  # 15 pairs, 8 epochs
    assert stages["eval-instruct"][0] == pytest.approx(60 + 30 * 8192 * 0.01)
    assert "at most 1.3 GB of memory (train)" in foretell.describe(known, recipe, {"thinkswitch_aime": 30}, 2)
    assert "at 100 tokens/s (measured on this machine" in check.budget(recipe.keys, 2, None, {}, "", known)
    assert "1.3 GB needed" in check.memory(recipe.keys, known)
    other = foretell.measured(tmp_path, recipe_of("pubmedqa"))
    assert other is not None and other.costs == known.costs and "DOMAIN=aime`" in other.basis  # it has the same pair


@pytest.mark.parametrize("changes", [{"hardware": {"cores": 1}}, {"pairs": [["a", "b"]]}, {"costs": {"train": {}}}])
def test_figures_of_another_machine_or_pair_do_not_count(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = recipe_of("aime")
    written(tmp_path, recipe, **changes)
    assert foretell.measured(tmp_path, recipe) is None
    assert "make rehearse DOMAIN=aime" in foretell.describe(None, recipe, {}, 2)


def test_the_memory_of_all_processes_is_watched_by_stage(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; x = b'1' * 10**8; open('out', 'wb').write(x); print(flush=True); time.sleep(60)"
    )
    child = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"]
    with subprocess.Popen(child, cwd=tmp_path, stdout=subprocess.PIPE) as process:
        watch = Watch(process.pid, lambda: "train-1", tmp_path, tmp_path / "used" / "used.json")
        watch.start()
        assert process.stdout is not None and process.stdout.readline()
        deadline = time.monotonic() + 60
        while watch.figures["disk"] < 10**8 and time.monotonic() < deadline:
            time.sleep(0.1)
        for below in watch.process.children(recursive=True):
            below.kill()
        process.wait()
        figures = watch.end()
    assert 10**8 < figures["train-1"]["memory"] < 3 * 10**8 and figures["disk"] >= 10**8
    assert files.read_json(tmp_path / "used" / "used.json") == figures


def test_the_form_is_added_to_requests_for_completions_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearse_form, "__file__", str(tmp_path / "form.py"))
    files.write_json(tmp_path / "form.json", {"structured_outputs": {"regex": "a"}})
    seen: list[tuple[str, bytes, bytes]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["path"], (await receive())["body"], dict(scope["headers"])[b"content-length"]))

    async def ask(path: str) -> None:
        parts = [{"body": b'{"max_', "more_body": True}, {"body": b'tokens": 3}', "more_body": False}]

        async def receive() -> Any:
            return parts.pop(0)

        scope = {"type": "http", "path": path, "headers": [(b"content-length", b"17"), (b"x", b"y")]}
        await rehearse_form.Form(app)(scope, receive, None)

    for path in ("/v1/chat/completions", "/health"):
        asyncio.run(ask(path))
    (_, body, length), (_, untouched, _) = seen
    assert json.loads(body) == {"max_tokens": 3, "structured_outputs": {"regex": "a"}}
    assert int(length) == len(body) and untouched == b'{"max_'


def test_the_tokenizer_made_here_has_digits_of_one_token_and_the_tags() -> None:
    tokenizer = rehearse_material.trained(640)
    tokenizer.chat_template = CHAT_TEMPLATES["thinking"]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "7é"}], tokenize=False, add_generation_prompt=True
    )
    assert len(tokenizer) <= 640 and text.endswith("<|im_start|>assistant\n<think>\n")
    assert tokenizer.decode(tokenizer.encode(text + "1234</think>")) == text + "1234</think>"
    assert tokenizer.tokenize("1234</think>") == ["1", "2", "3", "4", "</think>"]


def test_the_shapes_held_here_are_those_of_the_shipped_recipes() -> None:
    held = {recipe_of("aime", names).keys.pair.instruct for names in ((), ("llama-r1",), ("qwen3-30b",))}
    assert held == rehearse_material.SHAPES.keys()
    sizes = [rehearse_material.Shape(rehearse_material.SHAPES[name], None).bytes / 2 for name in sorted(held)]
    assert [round(size / 1e9, 2) for size in sizes] == [30.53, 4.02, 8.03]


def test_a_limit_of_gpu_memory_reaches_torch_and_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "has_cuda", lambda: True)
    monkeypatch.setattr(rehearse, "gpu_memory", lambda what: 80 * 10**9)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    made = rehearse_material.Material({"instruct": "a", "thinking": "b"}, {}, {}, None, Path("vllm"))
    changes = rehearse.derived(recipe_of("aime"), made, rehearse.Budgets(), 8, 10**9)["thinkswitch"]
    options = changes["engine"]["vllm_args"]
    assert "fp8_per_tensor" in options and "rehearse_form.Form" in options  # the recipe's own, and ours
    assert dict(option_values(options))["--gpu-memory-utilization"] == "0.0920"  # 92 % of 8 GB of 80
    env = rehearse._environment(made, 8)
    assert env["PYTORCH_CUDA_ALLOC_CONF"] == "per_process_memory_fraction:0.1000"
    assert changes["prompts"]["count"] == 5 and changes["sampling"]["samples"] == 2


def test_the_makefile_rehearses_aime_unless_told_otherwise(command: Any) -> None:
    done = command("make", "-n", "rehearse", "GPU_GB=8")
    assert done.returncode == 0 and "-m experiments rehearse" in done.stdout
    assert (ROOT / "experiments" / "rehearse.py").is_file()
