"""The papers' other pairs, as tiny checkpoints of the same form, through the whole loop, and what their tokenizers allow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open
from transformers import AutoTokenizer

from tests import paper_pairs
from tests.checkpoints import read
from tests.paper_pairs import require_method, whole_loop
from thinkswitch_plugin import files
from thinkswitch_plugin.engines import servers
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.export.template import combined_template
from thinkswitch_plugin.loop import check
from thinkswitch_plugin.merging.compatibility import align_compatible, require_compatible
from thinkswitch_plugin.recipe import load_recipe, overlay_path, recipe_path
from thinkswitch_plugin.search.pair import PairOptions, find_pair
from thinkswitch_plugin.search.sweep import parse_sampling, sweep

QUESTIONS = 3


@pytest.fixture(scope="module")
def llama_r1(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return paper_pairs.llama_r1(tmp_path_factory.mktemp("llama-r1"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Invented questions with the columns of the hub's sets."""
    folder = tmp_path_factory.mktemp("data")
    aime = [{"problem": f"Add {n} and {7 - n}.", "answer": "7"} for n in range(QUESTIONS)]
    wrong = {f"Incorrect Answer {n}": f"{n}" for n in (1, 2, 3)}
    gpqa = [{"Question": f"What is {n}+{7 - n}?", "Correct Answer": "7", **wrong} for n in range(QUESTIONS)]
    ifeval = [
        {
            "key": n,
            "prompt": f"Write 7 and neither hm nor a comma, {n} times.",
            "instruction_id_list": ["keywords:existence", "keywords:forbidden_words", "punctuation:no_comma"],
            "kwargs": [{"keywords": ["7"], "num_words": None}, {"forbidden_words": ["hm"]}, {}],
        }
        for n in range(QUESTIONS)
    ]
    for name, rows in (("aime_2026", aime), ("aime25", aime), ("gpqa_diamond", gpqa), ("ifeval", ifeval)):
        (folder / f"{name}.jsonl").write_bytes(b"".join(files.dumps_line(row) for row in rows))
    return folder


def overlay(folder: Path, pair: tuple[Path, Path]) -> Path:
    """What replaces checkpoints and data of the recipe for AIME, and nothing of the method."""
    prompts = folder / "prompts.jsonl"
    prompts.write_bytes(b"".join(files.dumps_line({"problem": f"What is {n}+{7 - n}?"}) for n in range(4)))
    keys = {
        "needs": {"gpu_gb": 0, "ram_gb": 1, "disk_gb": 1},
        "pair": dict(zip(("instruct", "thinking"), map(str, pair), strict=True)),
        "prompts": {"hub": None, "path": str(prompts), "count": 4},
        "sampling": {"max_tokens": 32, "samples": 1},
        "engine": {"vllm_args": []},
        "evaluation": {"backend": "hf", "max_tokens": 32},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"num_epochs": 2, "thinkswitch": keys}))
    return path


def adapted(run: Path) -> set[str]:
    """The parts of the names of the modules that the adapter changes."""
    with safe_open(run / "iter-1" / "adapter" / "adapter_model.safetensors", "pt") as handle:
        return {part for name in handle.keys() for part in name.split(".")}  # noqa: SIM118


@pytest.mark.slow
@pytest.mark.usefixtures("forked_engines")
def test_llama_and_r1_go_through_the_whole_loop(
    llama_r1: tuple[Path, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = whole_loop("aime", f"llama-r1 {overlay(tmp_path, llama_r1)}", tmp_path, data)
    assert "<|reserved_special_token_5|> / <think> (269)" in capsys.readouterr().out
    require_method(run, right=1.0)
    assert files.read_yaml(run / "iter-1" / "axolotl.yaml")["eot_tokens"] == ["<|eot_id|>"]
    assert adapted(run) >= {"q_proj", "down_proj"}
    asked = AutoTokenizer.from_pretrained(run / "iter-1" / "thinking").apply_chat_template(
        [{"role": "user", "content": "x"}], add_generation_prompt=True, tokenize=False
    )
    assert asked.endswith("<｜Assistant｜><think>\n")


@pytest.mark.slow
@pytest.mark.usefixtures("forked_engines")
def test_qwen3_30b_goes_through_the_whole_loop_with_its_experts(data: Path, tmp_path: Path) -> None:
    pair = paper_pairs.qwen3_30b(tmp_path / "pair")
    run = whole_loop("aime", f"qwen3-30b {overlay(tmp_path, pair)}", tmp_path, data)
    require_method(run, right=1.0)
    before, after = read(pair[0]), read(run / "iter-1" / "instruct")
    experts = {name for name in before if ".mlp.experts." in name}
    assert any(name.endswith("layers.1.mlp.experts.3.down_proj.weight") for name in experts)  # as on the hub
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed & experts and not any(".mlp.gate." in name or "embed" in name for name in changed)
    assert "experts" in adapted(run)


def swept(pair: tuple[Path, Path], folder: Path, data: Path, engine: str, task: str = "") -> PairOptions:
    """Options of a sweep of two checkpoints by the recipe for AIME."""
    return PairOptions(
        domain="aime",
        runs=folder / "runs",
        seed=0,
        engine=engine,
        overlay=[str(overlay(folder, pair))],
        iteration=1,
        instruct=str(pair[0]),
        thinking=str(pair[1]),
        out=folder,
        limit=None,
        data=str(data),
        task=task,
    )


@pytest.mark.parametrize(
    ("name", "right"), [("thinkswitch_aime25", 1.0), ("thinkswitch_gpqa_diamond", 0.0), ("thinkswitch_ifeval", 1.0)]
)
def test_a_sweep_takes_the_benchmarks_of_model_interpolation(
    name: str, right: float, llama_r1: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """λ = 1 with Llama's template: only with R1's names of the tokens can its trace be seen, and removed before grading."""
    monkeypatch.setenv("THINKSWITCH_DATA", str(data))
    monkeypatch.setenv("LOCAL_RANK", "1")  # lm-eval downloads nothing for NLTK
    options = swept(llama_r1, tmp_path, data, "embedded", name)
    sweep(find_pair(options), [0.0, 1.0], parse_sampling("0.6/0.95", 2), "instruct")
    found = files.read_json(tmp_path / f"sweep-{name}" / "sweep.json")
    assert found["task"] == name
    zero, one = found["points"]
    assert (zero["think_ratio"], zero["mean@k"], zero["tokens"]) == (0.0, 0.0, 2.0)
    assert (one["think_ratio"], one["mean@k"], one["tokens"]) == (1.0, right, 5.0)
    assert (one["n"], one["k"], one["truncated"]) == (QUESTIONS, 2, 0.0)


@pytest.mark.slow
def test_a_vllm_that_ends_in_a_sweep_is_a_sentence_with_the_cause_and_not_its_log(
    llama_r1: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tmp_path / "bin" / "python"
    engine.parent.mkdir()
    engine.write_text(
        "#!/bin/sh\nseq -f '  File \"engine.py\", line %g' 230\necho 'RuntimeError: no memory for the cache'\nexit 1\n"
    )
    engine.chmod(0o755)
    monkeypatch.setattr(servers, "vllm_python", lambda: engine)
    monkeypatch.setenv("THINKSWITCH_DATA", str(data))
    options = swept(llama_r1, tmp_path, data, "vllm")
    path = Path(options.overlay[0])
    keys = files.read_yaml(path)
    keys["thinkswitch"]["evaluation"]["backend"] = "server"
    files.write_yaml(path, keys)
    with pytest.raises(ThinkSwitchError, match="ended while starting") as ended:
        sweep(find_pair(options), [1.0], parse_sampling("", None), "instruct")
    assert "(exit code 1): RuntimeError: no memory for the cache; its log is " in str(ended.value)
    assert len(str(ended.value).splitlines()) == 1
    assert not list(tmp_path.rglob("*.safetensors"))


def changed_token(pair: tuple[Path, Path], folder: Path, old: str, new: str) -> tuple[Path, Path]:
    """The pair with another text for one of the thinking checkpoint's added tokens."""
    thinking = folder / "changed"
    shutil.copytree(pair[1], thinking)
    for path in thinking.glob("tokenizer*.json"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(json.dumps(old, ensure_ascii=False), json.dumps(new, ensure_ascii=False)), "utf-8")
    return pair[0], thinking


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "<|start_header_id|>",
            "<｜Header｜>",
            r"token 262 is '<\|start_header_id\|>' in .*instruct and '<｜Header｜>' in",
        ),
        ("<think>", "<|python_tag|>", r"'<\|python_tag\|>' is token 266 of .*instruct and token 269 of"),
        ("Ċ", "ĊĊ", r"token \d+ is 'Ċ' in .*instruct and 'ĊĊ' in"),
    ],
)
def test_a_token_that_both_use_for_something_else_is_refused(
    old: str, new: str, message: str, llama_r1: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ThinkSwitchError, match=f"vocabularies differ: {message}"):
        require_compatible(*changed_token(llama_r1, tmp_path, old, new))


def test_make_check_compares_the_tokens_before_anything_is_downloaded(
    llama_r1: tuple[Path, Path], tmp_path: Path
) -> None:
    keys = load_recipe(recipe_path("aime"), (overlay_path("llama-r1"), overlay(tmp_path, llama_r1))).keys
    assert "; 7 special tokens are named differently: <|begin_of_text|> / <｜begin▁of▁sentence｜> (256)" in check.pair(
        keys
    )
    changed = changed_token(llama_r1, tmp_path, "<|start_header_id|>", "<｜Header｜>")
    keys = load_recipe(recipe_path("aime"), (overlay(tmp_path, changed),)).keys
    with pytest.raises(ThinkSwitchError, match=r"no compatible pair: token 262 is "):
        check.pair(keys)


def test_unused_slots_may_have_other_numbers(llama_r1: tuple[Path, Path], tmp_path: Path) -> None:
    pair = changed_token(llama_r1, tmp_path, "<|reserved_special_token_1|>", "<|reserved_special_token_3|>")
    assert align_compatible(pair) is not None


def test_a_token_that_only_one_has_is_refused(llama_r1: tuple[Path, Path], tmp_path: Path) -> None:
    instruct, thinking = changed_token(llama_r1, tmp_path, "<think>", "<think>")
    tokens = files.read_json(thinking / "tokenizer.json")
    tokens["added_tokens"].append({**tokens["added_tokens"][-1], "id": 272, "content": "<plan>"})
    files.write_json(thinking / "tokenizer.json", tokens)
    with pytest.raises(ThinkSwitchError, match=r"only .*changed has a token 272, '<plan>'"):
        require_compatible(instruct, thinking)


def test_one_server_for_both_is_refused_if_they_name_tokens_differently(llama_r1: tuple[Path, Path]) -> None:
    with pytest.raises(
        ThinkSwitchError, match=r"7 special tokens are named differently.* serve the two checkpoints one by one"
    ):
        combined_template(*llama_r1)
