"""The rows of docs/models.md: architectures, and tiny random pairs of them as published checkpoints store them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from thinkswitch_plugin import files
from thinkswitch_plugin.demo.tokenizer import build_tokenizer

PLAIN: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # the smallest that vLLM computes with on a CPU
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
    "head_dim": 8,  # what is rotated
    **ROUTED,
    "num_key_value_heads": 2,
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
    "out_hidden_size": 64,
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
        damage: what is wrong with the pair; see `write`.
        processor: the preprocessor_config.json of a vision-language model.
        tokens: its tokenizer's special tokens for images.
    """

    name: str
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] | None = None
    vision: dict[str, Any] | None = None
    extra: dict[str, tuple[str, ...]] = field(default_factory=dict)
    fused: tuple[str, ...] = ()
    damage: str = ""
    processor: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)


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
        processor={"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor"},
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
        processor={
            "image_processor_type": "PixtralImageProcessor",
            "processor_class": "PixtralProcessor",
            "patch_size": 4,
            "size": {"longest_edge": 8},
        },
    ),
    Model("Phi-3, Phi-4", "Phi3ForCausalLM"),
    Model("Gemma 3, text", "Gemma3ForCausalLM", {"sliding_window": 16}),
    Model(
        "Gemma 3, vision-language",
        "Gemma3ForConditionalGeneration",
        {"mm_tokens_per_image": 4},
        text={"sliding_window": 16},
        vision=VISION,
        processor={
            "image_processor_type": "Gemma3ImageProcessor",
            "processor_class": "Gemma3Processor",
            "size": {"height": 8, "width": 8},
        },
        tokens={"image_token": "<image>", "boi_token": "<image_start>", "eoi_token": "<image_end>"},
    ),
    Model(
        "Gemma 4, text",
        "Gemma4ForCausalLM",
        {
            "sliding_window": 16,
            "global_head_dim": 32,
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
    Model(
        "gpt-oss, unquantised",
        "GptOssForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
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
    tokenizer = build_tokenizer("thinking" if mode == "thinking" else "instruct")
    tokenizer.add_special_tokens({"additional_special_tokens": [*model.tokens.values()]})
    tokenizer.save_pretrained(folder)
    if model.processor:
        files.write_json(folder / "preprocessor_config.json", model.processor)
        about = files.read_json(folder / "tokenizer_config.json")
        files.write_json(folder / "tokenizer_config.json", {**about, "extra_special_tokens": model.tokens})
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
