"""What ThinkSwitch can do with each architecture, found out on tiny random models: the table of docs/models.md.

    .venv/bin/python -m experiments.models [--columns merge,train] [--results FILE] [--write docs/models.md] [NAME…]

A cell is `ok` only if the result equals a float64 computation and loads with no missing or unexpected key; else it is
the sentence that refuses the pair. Anything else (a traceback, other numbers, a key too few) is a failure and exit code 1.
What the columns of `experiments/model_stages.py` check is written there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from thinkswitch_plugin import files
from thinkswitch_plugin.demo.tokenizer import build_tokenizer
from thinkswitch_plugin.errors import ThinkSwitchError

Tensors = dict[str, torch.Tensor]
LAMBDA = 0.4
START, END = "<!-- table of `make models` -->", "<!-- end of the table -->"
PLAIN: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HYBRID: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    **ROUTED,
    "num_key_value_heads": 4,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 4,
    "image_size": 8,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
}
QWEN_MROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 0],
        "partial_rotary_factor": 0.5,
    }
}


@dataclass(frozen=True)
class Model:
    """One row of the table.

    Attributes:
        kind: transformers' class.
        config: beside `PLAIN`, where the config is not nested.
        text, vision: the nested configs of a vision-language model.
        extra: tensors that published checkpoints hold and transformers' class ignores, by which side has them.
        fused: which side stores its tensors as transformers loads them.
        write: how a side is written, where not by `save_pretrained`.
    """

    name: str
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] | None = None
    vision: dict[str, Any] | None = None
    extra: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fused: tuple[str, ...] = ()
    damage: str = ""


BOTH = ("instruct", "thinking")
MTP = "mtp.layers.0.self_attn.q_proj.weight"
MODELS = (
    Model("Qwen2.5", "Qwen2ForCausalLM"),
    Model("Qwen3", "Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    Model("Qwen3-MoE, stored per expert", "Qwen3MoeForCausalLM", EXPERTS),
    Model("Qwen3-MoE, stored fused", "Qwen3MoeForCausalLM", EXPERTS, fused=BOTH),
    Model("Qwen3-MoE, one of each", "Qwen3MoeForCausalLM", EXPERTS, fused=("thinking",)),
    Model(
        "Qwen3-Next, MTP head in one",
        "Qwen3NextForCausalLM",
        {**EXPERTS, **HYBRID, "shared_expert_intermediate_size": 16},
        extra={MTP: ("thinking",)},
    ),
    Model("Qwen3.5, text", "Qwen3_5ForCausalLM", HYBRID, extra={MTP: BOTH}),
    Model(
        "Qwen3.5, vision-language",
        "Qwen3_5ForConditionalGeneration",
        text={**HYBRID, **QWEN_MROPE},
        vision=QWEN_VISION,
        extra={MTP: ("instruct",)},
    ),
    Model(
        "Llama 3.1",
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    Model("Mistral", "MistralForCausalLM"),
    Model(
        "Mixtral, one stored fused",
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        fused=("instruct",),
    ),
    Model("Ministral 3, text", "Ministral3ForCausalLM"),
    Model(
        "Ministral 3, vision-language",
        "Mistral3ForConditionalGeneration",
        text={"model_type": "ministral3"},
        vision={**VISION, "model_type": "pixtral", "head_dim": 8},
    ),
    Model("Phi-3, Phi-4", "Phi3ForCausalLM"),
    Model("Gemma 3, text", "Gemma3ForCausalLM", {"sliding_window": 16}),
    Model(
        "Gemma 3, vision-language",
        "Gemma3ForConditionalGeneration",
        {"mm_tokens_per_image": 4},
        text={"sliding_window": 16},
        vision=VISION,
    ),
    Model(
        "Gemma 4, text",
        "Gemma4ForCausalLM",
        {
            "sliding_window": 16,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 96,
        },
    ),
    Model("GLM-4", "Glm4ForCausalLM"),
    Model(
        "GLM-4.5-MoE, MTP layer in one",
        "Glm4MoeForCausalLM",
        ROUTED,
        extra={"model.layers.4.eh_proj.weight": ("instruct",)},
    ),
    Model("SmolLM3", "SmolLM3ForCausalLM"),
    Model("Olmo 3", "Olmo3ForCausalLM"),
    Model("Granite", "GraniteForCausalLM"),
    Model("Seed-OSS", "SeedOssForCausalLM"),
    Model("LFM2", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    Model("gpt-oss, bfloat16", "GptOssForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Model("DeepSeek-V3", "DeepseekV3ForCausalLM", MLA),
    Model("DeepSeek-V3, FP8", "DeepseekV3ForCausalLM", MLA, damage="fp8"),
    Model("an architecture that transformers does not know", "Qwen3ForCausalLM", damage="unknown"),
)


def make_pair(model: Model, folder: Path) -> dict[str, Path]:
    """A pair of random checkpoints near each other, as `instruct` and `thinking` in a folder."""
    import transformers

    kind = getattr(transformers, model.kind)
    config = tiny_config(model, kind.config_class)
    roles = {}
    for seed, mode in enumerate(BOTH):
        torch.manual_seed(0)
        network = kind(config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        roles[mode] = write(model, network, folder / mode, mode)
    return roles


def tiny_config(model: Model, kind: Any) -> Any:
    """The tiny config of a row; sizes that an architecture does not know are left out."""
    if model.text is None:
        known = kind().to_dict()
        return kind(**{k: v for k, v in {**PLAIN, **model.config}.items() if k in known or k in model.config})
    return kind(text_config={**PLAIN, **model.text}, vision_config=model.vision, **model.config)


def write(model: Model, network: Any, folder: Path, mode: str) -> Path:
    """One checkpoint of a pair, in the layout and with the extra tensors of its row."""
    network.save_pretrained(folder)
    build_tokenizer("thinking" if mode == "thinking" else "instruct").save_pretrained(folder)
    weights = folder / "model.safetensors"
    tensors = load_file(str(weights))
    if mode in model.fused:
        tied = {
            n for n in network.state_dict() if n not in dict(network.named_parameters()) | dict(network.named_buffers())
        }
        tensors = {n: t.detach().clone() for n, t in network.state_dict().items() if n not in tied}
    generator = torch.Generator().manual_seed(len(mode))
    tensors |= {name: torch.randn(8, 8, generator=generator) for name, modes in model.extra.items() if mode in modes}
    config = files.read_json(folder / "config.json")
    if model.damage == "fp8":
        name = "model.layers.1.mlp.experts.0.up_proj.weight"
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        config["quantization_config"] = {"quant_method": "fp8"}
    if model.damage == "unknown":
        config |= {"model_type": "novel", "architectures": ["NovelForCausalLM"]}
    files.write_json(folder / "config.json", config)
    save_file(tensors, str(weights), metadata={"format": "pt"})
    return folder


def same_layout(roles: dict[str, Path]) -> bool:
    """Whether both checkpoints store the same tensors, but for those in only one that the model ignores."""
    return (
        len({frozenset(n for n in load_file(str(f / "model.safetensors")) if "expert" in n) for f in roles.values()})
        == 1
    )


def tensors_of(roles: dict[str, Path]) -> dict[str, Tensors]:
    """Both checkpoints' tensors, in the files' layout where they share one, else as transformers loads them."""
    if same_layout(roles):
        return {mode: load_file(str(folder / "model.safetensors")) for mode, folder in roles.items()}
    return {mode: loaded(folder).state_dict() for mode, folder in roles.items()}


def loaded(folder: Path) -> Any:
    """The model of a checkpoint. Raises `AssertionError` if a key is missing or unexpected."""
    import transformers

    kind = getattr(transformers, files.read_json(folder / "config.json")["architectures"][0])
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype="auto")
    wrong = {name: keys for name, keys in info.items() if keys and name != "error_msgs"}
    extra = {"unexpected_keys"} if all(is_mtp(key) for key in info["unexpected_keys"]) else set()
    assert not wrong.keys() - extra, f"{folder.name} loads with {wrong}"
    return model


def is_mtp(name: str) -> bool:
    """Whether a tensor belongs to a head that transformers leaves out."""
    return name.startswith("mtp.") or "eh_proj" in name


def interpolated(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The point at `LAMBDA` between two tensors on the sphere through both, in float64."""
    x, y = a.double().flatten(), b.double().flatten()
    cosine = float(x @ y / (x.norm() * y.norm())) if bool(x.norm()) and bool(y.norm()) else 1.0
    angle = float(torch.arccos(torch.tensor(cosine, dtype=torch.float64).clamp(-1, 1)))
    if angle < 1e-6:
        return a.double() * (1 - LAMBDA) + b.double() * LAMBDA
    shares = [float(torch.sin(torch.tensor(part * angle, dtype=torch.float64))) for part in (1 - LAMBDA, LAMBDA)]
    sine = float(torch.sin(torch.tensor(angle, dtype=torch.float64)))
    return (shares[0] / sine) * a.double() + (shares[1] / sine) * b.double()


def merge_config(roles: dict[str, Path]) -> dict[str, Any]:
    """A merge config for the pair."""
    return {
        "merge_method": "thinkswitch",
        "base_model": str(roles["thinking"]),
        "models": [{"model": str(roles[mode])} for mode in BOTH],
        "parameters": {"lambda": LAMBDA},
    }


def require_equal(found: Tensors, roles: dict[str, Path], extra: dict[str, tuple[str, ...]]) -> None:
    """Raise `AssertionError` if a tensor is not what float64 makes of the pair, or is missing."""
    both = tensors_of(roles)
    a, b = both["instruct"], both["thinking"]
    for name in a.keys() | b.keys() | extra.keys():
        if name in extra and len(extra[name]) == 1:
            expected = load_file(str(roles[extra[name][0]] / "model.safetensors"))[name].double()
        else:
            expected = interpolated(a[name], b[name])
        assert name in found, f"{name} is lost"
        error = float((found[name].double() - expected).abs().max() / expected.abs().max().clamp(min=1e-9))
        assert error < 1e-5, f"{name} is off by {error:.1g}"


def merge(model: Model, roles: dict[str, Path], folder: Path) -> None:
    """`thinkswitch merge` on disk."""
    from mergekit.options import MergeOptions

    from thinkswitch_plugin.merging.run import merge as merge_to_disk

    files.write_yaml(folder / "merge.yaml", merge_config(roles))
    out = folder / "merged"
    try:
        merge_to_disk(folder / "merge.yaml", out, MergeOptions(copy_tokenizer=False, quiet=True, device="cpu"))
    except ThinkSwitchError:
        assert not out.exists(), "a refused merge left a folder"
        raise
    found = loaded(out).state_dict() if not same_layout(roles) else {}
    require_equal(found | read(out), roles, model.extra)
    loaded(out)


def similarity(model: Model, roles: dict[str, Path], folder: Path) -> None:
    """`thinkswitch similarity`."""
    from thinkswitch_plugin.merging.compatibility import require_compatible
    from thinkswitch_plugin.merging.similarity import similarity as compare

    require_compatible(roles["instruct"], roles["thinking"])
    both = tensors_of(roles)
    shared = both["instruct"].keys() & both["thinking"].keys()
    distinct = {both["instruct"][name].data_ptr(): name for name in sorted(shared)}.values()
    pairs = [(both["instruct"][name].double(), both["thinking"][name].double()) for name in distinct]
    sigma = sum(float((a - b).abs().sum()) for a, b in pairs) / sum(
        float(a.abs().sum() + b.abs().sum()) for a, b in pairs
    )
    found = compare(roles["instruct"], roles["thinking"])["sigma"]
    assert abs(found - sigma) < 1e-5 * sigma, f"σ is {found}, not {sigma}"


def sweep_in_memory(model: Model, roles: dict[str, Path], folder: Path) -> None:
    """A point of a sweep, merged into a loaded model, which then computes."""
    from thinkswitch_plugin.merging.in_memory import load, merge_into

    network = load(roles["thinking"], {}, device="cpu")
    merge_into(network, merge_config(roles))
    merged = folder / "merged"
    expected = loaded(merged).state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), f"{name} differs from the merge on disk"
    with torch.no_grad():
        assert bool(torch.isfinite(network(torch.arange(3, 11)[None]).logits).all())


def read(folder: Path) -> Tensors:
    """Every tensor of a checkpoint folder."""
    return {name: t for shard in sorted(folder.glob("*.safetensors")) for name, t in load_file(str(shard)).items()}


# A column of the table: what it does with a pair in a folder of its own. It raises `ThinkSwitchError` to refuse.
Check = Callable[[Model, dict[str, Path], Path], None]
COLUMNS: dict[str, Check] = {
    "merge": merge,
    "similarity": similarity,
    "sweep in memory": sweep_in_memory,
}


ENGINES = ("train", "merge-lora", "export", "loop")


def checks(names: Iterable[str]) -> dict[str, Check]:
    """The columns of these names, and how each is tried."""
    from experiments import model_stages as stages

    by_engines = (stages.train, stages.merge_lora, stages.export, stages.loop)
    every = COLUMNS | dict(zip(ENGINES, by_engines, strict=True))
    return {name: every[name] for name in names}


def try_all(model: Model, folder: Path, columns: Mapping[str, Check] = COLUMNS) -> dict[str, str]:
    """`ok`, the sentence of a refusal, or `FAILED: …` for every column."""
    try:
        roles = make_pair(model, folder)
    except Exception as error:
        traceback.print_exc()
        return dict.fromkeys(columns, f"FAILED: no tiny model: {error}")
    found = {}
    for name, check in columns.items():
        try:
            check(model, roles, folder)
            found[name] = "ok"
        except ThinkSwitchError as error:
            found[name] = str(error).replace(f"{folder}/", "")
        except Exception as error:
            traceback.print_exc()
            found[name] = f"FAILED: {type(error).__name__}: {error}"
    return found


def table(rows: dict[str, dict[str, str]]) -> str:
    """The rows as Markdown, with every column; sentences stand below, each once."""
    notes: list[str] = []
    columns = (*COLUMNS, *ENGINES)
    lines = ["| architecture | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, cells in rows.items():
        shown = []
        for column in columns:
            cell = cells.get(column, "not run")
            if cell not in ("ok", "not run", *notes):
                notes.append(cell)
            word = "FAILED" if cell.startswith("FAILED") else "refused"
            shown.append(f"{word} ({notes.index(cell) + 1})" if cell in notes else cell)
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]).rstrip() + "\n"


def main() -> int:
    """Print the table, and write it into a document if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="Markdown file whose table is replaced.")
    parser.add_argument("--columns", default=",".join((*COLUMNS, *ENGINES)), help="Columns to try, between commas.")
    parser.add_argument(
        "--results", type=Path, help="JSON file that keeps the cells, for columns and rows tried by other calls."
    )
    parser.add_argument("names", nargs="*", help="Rows whose name holds one of these words (default: all).")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    columns = checks(options.columns.split(","))
    kept = files.read_json(options.results) if options.results and options.results.is_file() else {}
    rows = {model.name: kept.get(model.name, {}) for model in MODELS}
    for model in MODELS:
        if options.names and not any(word.lower() in model.name.lower() for word in options.names):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = try_all(model, Path(folder), columns)
        rows[model.name] = {**rows[model.name], **found}
        print(f"{model.name}: {', '.join(found.values())}", file=sys.stderr)
        if options.results:
            files.write_json(options.results, rows)
    rows = {name: cells for name, cells in rows.items() if cells}
    text = table(rows)
    if options.write:
        document = options.write.read_text(encoding="utf-8")
        before, _, rest = document.partition(START)
        options.write.write_text(f"{before}{START}\n\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    failed = [name for name, cells in rows.items() if any(cell.startswith("FAILED") for cell in cells.values())]
    print(text)
    print(json.dumps({"architectures": len(rows), "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
