"""Both modes as LoRAs of one base: mergekit's extraction, what is lost, one template for two modes, refusals."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteConfig, Lfm2Config, Qwen3MoeConfig, SmolLM3Config

from experiments.model_pairs import EXPERTS, Model, make_pair
from tests.checkpoints import qwen3, read, write
from tests.conftest import BIN, ROOT
from thinkswitch_plugin import files
from thinkswitch_plugin.demo.tokenizer import build_tokenizer
from thinkswitch_plugin.engines.servers import adapter_rank, lora_arguments
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.export.extract import (
    CONFIG,
    OUTSIDE_LAYERS,
    WEIGHTS,
    cut,
    extract,
    losses,
    require_extractable,
)
from thinkswitch_plugin.export.job import Base, export, parse_ranks
from thinkswitch_plugin.export.serve import both_modes, recipe_to_serve
from thinkswitch_plugin.export.table import keeps
from thinkswitch_plugin.export.template import PROBES, SWITCH, combine, combined_template
from thinkswitch_plugin.judging.samples import graded
from thinkswitch_plugin.merging.mergekit_private import extracted_tensors
from thinkswitch_plugin.recipe import load_recipe, overlay_path, recipe_of, recipe_path
from thinkswitch_plugin.search.pair import Pair

RANKS = (4, 32)


@pytest.fixture(scope="module")
def extracted(forking: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two near Qwen3, `a` and `b`, and mergekit's own LoRA of b at every one of RANKS."""
    folder = tmp_path_factory.mktemp("extracted")
    write(folder / "a", qwen3(0))
    write(folder / "b", qwen3(1), shards=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", f"{forking}/bin/python")
        for rank in RANKS:
            extract(folder / "a", folder / "b", folder / f"rank-{rank}", rank, folder / "log")
    return folder


@pytest.mark.slow
def test_the_leading_part_of_a_larger_lora_is_mergekits_smaller_one(extracted: Path, tmp_path: Path) -> None:
    small, large = RANKS
    cut(extracted / f"rank-{large}", tmp_path / "cut", small, base="org/base", revision="abc")
    ours, theirs = (load_file(str(f / WEIGHTS)) for f in (tmp_path / "cut", extracted / f"rank-{small}"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    config, reference = (files.read_json(f / CONFIG) for f in (tmp_path / "cut", extracted / f"rank-{small}"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "abc")
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "peft_type", "task_type", "modules_to_save"):
        assert config[key] == reference[key], key
    assert config["target_modules"] == sorted(reference["target_modules"])


@pytest.mark.slow
def test_nothing_in_an_adapter_that_vllm_would_refuse(extracted: Path) -> None:
    adapter = extracted / f"rank-{RANKS[0]}"
    assert files.read_json(adapter / CONFIG)["modules_to_save"] == []
    names = {name.split(".")[-3] for name in load_file(str(adapter / WEIGHTS))}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("fused", [("instruct",), ("thinking",), ("instruct", "thinking")])
def test_fused_experts_are_refused_with_their_share(fused: tuple[str, ...], tmp_path: Path) -> None:
    roles = make_pair(Model("", "Qwen3MoeForCausalLM", EXPERTS, fused=fused), tmp_path)
    with pytest.raises(ThinkSwitchError, match=r"would leave out \d\d % of its parameters, such as .*mlp\.experts"):
        require_extractable(roles["instruct"], roles["thinking"])


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            Qwen3MoeConfig,
            {"num_experts": 4},
            r"would leave out \d\d % of its parameters, such as .*experts\.0\.down_proj",
        ),
        (SmolLM3Config, {"pad_token_id": 0}, "mergekit, which extracts the adapters, does not know SmolLM3ForCausalLM"),
        (
            GraniteConfig,
            {},
            r"it would take model\.layers\.0\.mlp\.down_proj\.bias apart, which is not in the checkpoint",
        ),
        (
            Lfm2Config,
            {"layer_types": ["conv", "full_attention"], "pad_token_id": 0},
            r"it would take model\.layers\.0\.conv\.conv\.weight apart, which has 3 dimensions",
        ),
    ],
)
def test_what_mergekit_cannot_carry_is_refused_before_any_work(
    kind: Any, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    for name in ("a", "b"):
        AutoModelForCausalLM.from_config(kind(**sizes, **heads, **settings)).save_pretrained(tmp_path / name)
    keys = load_recipe(ROOT / "recipes" / "arithmetic.yaml").keys
    roles = {"instruct": tmp_path / "a", "thinking": tmp_path / "b"}
    pair = Pair(keys, roles, 0, "embedded", tmp_path / "out", tmp_path / "home", None, of_run=False)
    with pytest.raises(ThinkSwitchError, match=f"{message}.*; serve the two checkpoints one by one"):
        export(pair, Base("a", tmp_path / "a", None), [4])
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_of_a_dense_checkpoint_every_matrix_can_be_exported(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", qwen3(0)), write(tmp_path / "b", qwen3(1), shards=3)
    require_extractable(a, b)
    assert extracted_tensors(a, b, OUTSIDE_LAYERS) == {name for name in qwen3(1) if "_proj." in name}


@pytest.mark.slow
def test_errors_are_those_of_numpy(extracted: Path) -> None:
    a, b = read(extracted / "a"), read(extracted / "b")
    difference = {name: (b[name].double() - a[name].double()).numpy() for name in a}
    inside = {name for name in a if "_proj" in name}
    squares = {name: float((d**2).sum()) for name, d in difference.items()}
    whole = sum(squares.values())
    adapters = [extracted / f"rank-{rank}" for rank in RANKS]
    for rank, found in zip(RANKS, losses(extracted / "a", extracted / "b", adapters), strict=True):
        tail = sum(
            float((np.linalg.svd(difference[name], compute_uv=False)[rank:] ** 2).sum()) for name in inside
        )  # Eckart and Young: what the best approximation of a rank misses
        outside = sum(s for name, s in squares.items() if name not in inside)
        assert found["error"] == pytest.approx(((tail + outside) / whole) ** 0.5, rel=1e-5)
        assert found["left_out"] == pytest.approx(outside / whole, rel=1e-6)
        expected = (tail / (whole - outside)) ** 0.5
        assert found["error_in_matrices"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert found["tensors_left_out"] == len(a) - len(inside)
    assert expected == 0.0  # the last rank is every matrix's full one, so only norms and embeddings were lost


def test_a_checkpoint_that_is_its_base_loses_nothing(tmp_path: Path) -> None:
    a = write(tmp_path / "a", qwen3(0))
    zero = {
        f"base_model.model.model.layers.0.mlp.up_proj.lora_{n}.weight": torch.zeros(s)
        for n, s in (("A", (2, 32)), ("B", (64, 2)))
    }
    (tmp_path / "lora").mkdir()
    save_file(zero, str(tmp_path / "lora" / WEIGHTS))
    found = losses(a, a, [tmp_path / "lora"])[0]
    assert found == {"error": 0.0, "error_in_matrices": 0.0, "left_out": 0.0, "tensors_left_out": 0}


def test_losses_do_not_depend_on_how_experts_are_stored(tmp_path: Path) -> None:
    zero = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{n}.weight": torch.zeros(64, 64) for n in "AB"}
    (tmp_path / "lora").mkdir()
    save_file(zero, str(tmp_path / "lora" / WEIGHTS))
    found = []
    for fused in ((), ("instruct",), ("instruct", "thinking")):
        roles = make_pair(Model("", "Qwen3MoeForCausalLM", EXPERTS, fused=fused), tmp_path / str(len(fused)))
        found += losses(roles["instruct"], roles["thinking"], [tmp_path / "lora"])
    for other in found[1:]:
        assert {k: v for k, v in other.items() if k != "tensors_left_out"} == pytest.approx(
            {k: v for k, v in found[0].items() if k != "tensors_left_out"}
        )


def fake_adapter(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    prefix = "base_model.model.model.layers.0.self_attn."
    save_file({prefix + name.replace("__", "."): t for name, t in tensors.items()}, str(folder / WEIGHTS))
    files.write_json(folder / CONFIG, {"r": 8, "peft_type": "LORA", "modules_to_save": []})
    return folder


def test_biases_are_left_out_and_narrow_matrices_keep_their_own_rank(tmp_path: Path) -> None:
    adapter = fake_adapter(
        tmp_path / "wide",
        q_proj__lora_A__weight=torch.ones(8, 16),
        q_proj__lora_B__weight=torch.ones(16, 8),
        k_proj__lora_A__weight=torch.ones(2, 16),
        k_proj__lora_B__weight=torch.ones(2, 2),
        q_proj__lora_B__bias=torch.ones(16),
    )
    cut(adapter, tmp_path / "cut", 4, base="x", revision=None)
    shapes = {name.split(".", 6)[-1]: tuple(t.shape) for name, t in load_file(str(tmp_path / "cut" / WEIGHTS)).items()}
    assert shapes == {
        "q_proj.lora_A.weight": (4, 16),
        "q_proj.lora_B.weight": (16, 4),
        "k_proj.lora_A.weight": (2, 16),
        "k_proj.lora_B.weight": (2, 2),
    }
    config = files.read_json(tmp_path / "cut" / CONFIG)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"model.layers.0.self_attn.k_proj": 2}
    assert config["r"] == config["lora_alpha"] == adapter_rank(tmp_path / "cut") == 4


def test_vllm_is_given_a_rank_it_knows(tmp_path: Path) -> None:
    adapter = fake_adapter(tmp_path / "a")
    for rank, room in ((1, "1"), (8, "8"), (9, "16"), (300, "320"), (512, "512")):
        files.write_json(adapter / CONFIG, {"r": 1, "rank_pattern": {"x": rank}})
        words = lora_arguments({"instruct": adapter, "thinking": adapter})
        assert words[words.index("--max-lora-rank") + 1] == room and words[words.index("--max-loras") + 1] == "2"
    files.write_json(adapter / CONFIG, {"r": 513})
    with pytest.raises(ThinkSwitchError, match="rank 513; vLLM serves up to 512"):
        lora_arguments({"instruct": adapter})
    files.write_json(adapter / CONFIG, {})
    with pytest.raises(ThinkSwitchError, match="has no rank"):
        lora_arguments({"instruct": adapter})


def test_the_ranks_offered_are_those_of_the_installed_vllm() -> None:
    from thinkswitch_plugin.engines.servers import MAX_LORA_RANKS, vllm_python

    python = vllm_python()
    if python is None:
        pytest.skip("vLLM is not installed: make setup-vllm")
    found = next(python.parent.parent.glob("lib/python*/site-packages/vllm/config/lora.py")).read_text()
    assert f"MaxLoRARanks = Literal[{', '.join(map(str, MAX_LORA_RANKS))}]" in found


def test_ranks_are_read_as_people_write_them() -> None:
    assert parse_ranks("64") == [64] and parse_ranks("32, 8 16 8") == [8, 16, 32]
    for text in ("", "0", "513", "-1", "8 x", "1.5", "²"):
        with pytest.raises(ThinkSwitchError, match="RANK="):
            parse_ranks(text)


def test_nan_in_a_checkpoint_is_found(tmp_path: Path) -> None:
    adapter = fake_adapter(tmp_path / "a", q_proj__lora_A__weight=torch.full((8, 16), torch.nan))
    with pytest.raises(ThinkSwitchError, match="holds NaN or infinity"):
        cut(adapter, tmp_path / "cut", 4, base="x", revision=None)


def test_a_base_that_does_not_fit_and_names_that_engines_take_apart(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", qwen3(0)), write(tmp_path / "b", qwen3(1, layers=2), num_hidden_layers=2)
    with pytest.raises(ThinkSwitchError, match="not a compatible pair: `num_hidden_layers` is 3 and 2"):
        extract(a, b, tmp_path / "out", 4, tmp_path / "log")
    for name in ("a+b", "a@b", "a,b"):
        with pytest.raises(ThinkSwitchError, match="in its name; rename it"):
            extract(a, tmp_path / name, tmp_path / "out", 4, tmp_path / "log")
    assert not (tmp_path / "out").exists() and not (tmp_path / "log").exists()


BLOCK = "{%- for m in messages %}{{ m.role }}: {{ m.content }}\n{%- endfor %}"
TEMPLATES = [
    "plain\n\n",
    "  {% if true %}\n  text\n  {% endif %}\n   ",
    "\n\n" + BLOCK + "\n",
    "{%- macro say(x) -%}<{{ x }}>{%- endmacro %}" + BLOCK + "{{ say(messages[0].content) }}",
    "{% macro say(x) %}[{{ x }}]{% endmacro %}\n{{ say(1) }}{% set opening = 'a' %}{{ opening }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }} ",
    "{{ opening is defined }}{{ ns is defined }}{{ say is defined }}",
    "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}{% set enable_thinking = 3 %}{{ enable_thinking }}",
    "{# only a comment #}",
    "",
]


@pytest.mark.parametrize("thinking", TEMPLATES)
@pytest.mark.parametrize("instruct", TEMPLATES)
def test_either_branch_renders_as_the_template_alone(instruct: str, thinking: str) -> None:
    tokenizer = build_tokenizer("instruct")

    def render(template: str, conversation: list[dict[str, str]], **switch: bool) -> Any:
        return tokenizer.apply_chat_template(conversation, chat_template=template, tokenize=False, **switch)

    for conversation in PROBES:
        both = combine(instruct, thinking)
        assert render(both, conversation) == render(instruct, conversation)
        assert render(both, conversation, enable_thinking=False) == render(
            instruct, conversation, enable_thinking=False
        )
        assert render(both, conversation, enable_thinking=True) == render(thinking, conversation, enable_thinking=True)


def tokenizer_folder(folder: Path, template: str | None) -> Path:
    tokenizer = build_tokenizer("instruct")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def test_templates_that_do_not_fit_into_one_are_refused(tmp_path: Path) -> None:
    plain = tokenizer_folder(tmp_path / "plain", "{{ messages[0].content }}")
    assert SWITCH in combined_template(plain, plain)
    refusing = tokenizer_folder(
        tmp_path / "refusing", "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}x"
    )
    assert combined_template(plain, refusing)  # a conversation that a template refuses does not count
    blocks = [tokenizer_folder(tmp_path / n, "{% block body %}" + n + "{% endblock %}") for n in "ab"]
    with pytest.raises(ThinkSwitchError, match="cannot be combined"):
        combined_template(*blocks)
    bare = tokenizer_folder(tmp_path / "bare", None)
    with pytest.raises(ThinkSwitchError, match="no single chat template"):
        combined_template(plain, bare)


@pytest.mark.parametrize(
    ("mode", "ratio", "interval", "kept"),
    [
        ("thinking", 1.0, (0.8, 0.95), True),
        ("thinking", 0.97, (0.8, 0.95), False),
        ("thinking", 1.0, (0.7, 0.85), False),
        ("instruct", 0.0, (0.95, 1.0), True),
        ("instruct", 0.03, (0.8, 0.95), False),
    ],
)
def test_what_keeps_a_mode_and_its_score(mode: str, ratio: float, interval: tuple[float, float], kept: bool) -> None:
    full = {"n": 400, "k": 1, "mean@k": 0.9, "think_ratio": 1.0 if mode == "thinking" else 0.0}
    assert keeps(full, {"think_ratio": ratio, "ci95": list(interval)}, mode) is kept


def test_serving_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ThinkSwitchError, match="contains no export; run `make export-loras` first"):
        both_modes(tmp_path, None)
    base = write(tmp_path / "base", qwen3(0))
    adapter = fake_adapter(tmp_path / "lora")
    (tmp_path / "chat_template.jinja").write_text("x")
    row = {"rank": 8, "thinking": {"path": str(adapter)}}
    files.write_json(tmp_path / "export.json", {"base": {"path": str(base)}, "rank": 8, "ranks": [row]})
    folder, words = both_modes(tmp_path, None)
    assert folder == str(base)
    assert words[:2] == ["--served-model-name", "instruct"]  # that mode is the base itself
    assert f"thinking={adapter}" in words
    with pytest.raises(ThinkSwitchError, match="has no rank 16; it has 8"):
        both_modes(tmp_path, 16)
    shutil.rmtree(adapter)
    with pytest.raises(ThinkSwitchError, match="is missing; run `make export-loras` again"):
        both_modes(tmp_path, None)


def test_a_server_has_room_for_a_second_try_of_a_cut_answer(tmp_path: Path) -> None:
    files.write_yaml(tmp_path / "retry.yaml", {"thinkswitch": {"answers": {"unfinished": "retry"}}})
    keys = recipe_of("aime", [str(tmp_path / "retry.yaml")]).keys
    assert (keys.sampling.max_tokens, keys.retry_budget, keys.longest_answer) == (8192, 16384, 16384)
    keys.answers.retry_max_tokens = 12000
    assert keys.longest_answer == 12000


def test_a_checkpoint_of_a_run_is_served_by_the_recipe_of_its_run(tmp_path: Path) -> None:
    checkpoint = tmp_path / "aime" / "iter-1" / "instruct"
    checkpoint.mkdir(parents=True)
    assert recipe_to_serve(str(checkpoint), "arithmetic", ()).path.stem == "arithmetic"
    begun = {"domain": "aime", "recipe": str(recipe_path("aime")), "overlays": [str(overlay_path("24gb"))]}
    files.write_json(tmp_path / "aime" / "run.json", {**begun, "seed": 0, "engine": "auto", "iterations": 1})
    assert recipe_to_serve(str(checkpoint), "arithmetic", ()).keys.longest_answer == 32768
    assert recipe_to_serve(str(checkpoint), "arithmetic", ["cpu"]).keys.longest_answer == 8192
    assert recipe_to_serve("owner/name", "arithmetic", ()).path.stem == "arithmetic"


@pytest.mark.slow
def test_both_modes_are_judged_beside_the_full_checkpoints(exported: Path, finished_run: Path) -> None:
    result = files.read_json(exported / "export.json")
    report = files.read_json(finished_run / "report.json")["iterations"][1]
    for mode in ("instruct", "thinking"):
        assert result["full"][mode] == report[mode]
    small, large = result["ranks"]
    assert (small["rank"], large["rank"], large["instruct"]["largest_rank"]) == (8, 128, 128)
    for mode, ratio in (("instruct", 0.0), ("thinking", 1.0)):
        assert large[mode]["figures"]["think_ratio"] == ratio
        assert large[mode]["figures"]["mean@k"] == pytest.approx(result["full"][mode]["mean@k"], abs=0.03)
        assert large[mode]["error"] < small[mode]["error"] < 1
        assert large[mode]["error_in_matrices"] < 1e-3
        folder = exported / "rank-128" / "eval" / mode
        how, _ = graded(folder, "thinkswitch_arithmetic", str(exported / "rank-128" / mode), "digit")
        assert how.opened is (mode == "thinking"), "by the adapter's chat template, not the base's"
    assert large["instruct"]["error"] < 1e-3  # QLoRA leaves norms and embeddings alone
    assert large["thinking"]["left_out"] > 0  # full fine-tuning does not
    assert result["kept"] and result["base"]["name"].endswith("instruct")
    assert "| full | thinking |" in (exported / "export.md").read_text()


@pytest.mark.slow
def test_an_adapter_in_peft_is_the_checkpoint_but_for_what_it_leaves_out(exported: Path, finished_run: Path) -> None:
    from peft import PeftModel

    base = Path(files.read_json(exported / "export.json")["base"]["path"])
    for mode in ("instruct", "thinking"):
        adapter, whole = exported / "rank-128" / mode, finished_run / "iter-1" / mode
        tokenizer, own = AutoTokenizer.from_pretrained(adapter), AutoTokenizer.from_pretrained(whole)
        assert tokenizer.chat_template == own.chat_template
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": "7*3+4*2"}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        reference = AutoModelForCausalLM.from_pretrained(whole)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
        with torch.no_grad():
            expected = reference(ids).logits
            before = (model(ids).logits - expected).norm() / expected.norm()
            # Add by hand what the adapter leaves out; then there must be no difference.
            left_out = {n: t for n, t in reference.state_dict().items() if "_proj" not in n}
            loaded = model.merge_and_unload()
            loaded.load_state_dict(left_out, strict=False)
            after = (loaded(ids).logits - expected).norm() / expected.norm()
        assert after < 1e-4
        assert before < 1e-4 if mode == "instruct" else after < before < 0.5


@pytest.mark.slow
def test_a_second_export_makes_nothing_again_and_another_base_does(
    exported: Path, own_run: Path, forked: Any, tmp_path: Path
) -> None:
    out = tmp_path / "iter-1"
    shutil.copytree(exported, out / "export")
    words = ["export-loras", "--domain", "arithmetic", "--runs", own_run.parent, "--out", out, "--rank", "8"]

    def weights() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in out.rglob(WEIGHTS)}

    before = weights()
    done = forked(BIN / "thinkswitch", *words)
    assert done.returncode == 0 and weights() == before and "lm_eval" not in done.stdout
    one = forked(BIN / "thinkswitch", *words, "--base", "instruct", "--limit", "40")
    assert one.returncode == 0, one.stdout[-2000:] + one.stderr[-2000:]
    result = files.read_json(out / "export" / "export.json")
    assert "instruct" not in result["ranks"][0] and result["base"]["path"].endswith("iter-1/instruct")
    assert result["full"]["thinking"]["n"] == 40
    after = weights()
    changed = {p.relative_to(out / "export") for p in after if after[p] != before[p]}
    assert changed == {Path("rank-8/thinking") / WEIGHTS}


@pytest.mark.slow
def test_refusals_are_one_sentence_and_write_nothing(own_run: Path, forked: Any, tmp_path: Path) -> None:
    words = ["export-loras", "--domain", "arithmetic", "--runs", own_run.parent]
    start = files.read_json(own_run / "iter-0" / "pair.json")["instruct"]["path"]
    other = write(tmp_path / "other", qwen3(0))
    before = set(own_run.rglob("*"))
    for extra, says in (
        (["--instruct", start], "Give both checkpoints"),
        (["--rank", "1000"], "from 1 to 512"),
        (["--base", tmp_path / "none"], "is not a checkpoint folder"),
        (["--base", other], "not a compatible pair"),
        (["--iteration", "2"], "no instruct checkpoint of iteration 2"),
        (["--overlay", "24gb"], "was begun with --overlay ''"),
        (["--instruct", start, "--thinking", start, "--out", tmp_path / "out"], "nothing between them"),
    ):
        done = forked(BIN / "thinkswitch", *words, *extra)
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert set(own_run.rglob("*")) == before
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_make_passes_ranks_on_by_another_name(command: Any) -> None:
    # torch's and accelerate's RANK is the number of a process.
    shown = command("make", "--eval", "show: ; @env", "show", "RANK=8 16", RANK="3").stdout.splitlines()
    assert "THINKSWITCH_RANK=8 16" in shown and not [line for line in shown if line.startswith("RANK=")]
    shown = command("make", "--eval", "show: ; @env", "show", RANK="3", BASE="x").stdout.splitlines()
    assert "THINKSWITCH_RANK=" in shown and "THINKSWITCH_BASE=" in shown
