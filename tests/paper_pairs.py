"""Tiny pairs in the form of the papers' other pairs: architecture, tokens, ids and chat templates like theirs.

Each checkpoint follows a chain of characters, written into its embedding and its head (the layers between are random and
weak), so that without any training the thinking one writes a trace and an answer, and the instruct one an answer:

    thinking   <think>\\n  ->  hm</think>7<eos>
    instruct   …\\n        ->  5<eot>
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from tests.checkpoints import read
from thinkswitch_plugin import files
from thinkswitch_plugin.cli import main
from thinkswitch_plugin.merging.tensors import list_tensors

STAGES = [["pair"], ["eval", "0"]]
STAGES += [[name, "1"] for name in ("requests", "generate", "pairs", "train", "merge-lora", "rebuild")]
STAGES += [["eval", "1"], ["report"]]
HIDDEN = 320  # a dimension for each token
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "initializer_range": 0.005,
    "tie_word_embeddings": False,
}
LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
RESERVED = [f"<|reserved_special_token_{n}|>" for n in range(8)]
SHARED = ["<|finetune_right_pad_id|>", RESERVED[2], "<|start_header_id|>", "<|end_header_id|>"]
SHARED += ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
# Llama-3.1-8B-Instruct and DeepSeek-R1-Distill-Llama-8B, from id 128000 on.
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", *RESERVED[:2], *SHARED, *RESERVED[3:]]
R1 = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", *RESERVED[:2], *SHARED]
R1 += ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜▁pad▁｜>"]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]

LLAMA_TEMPLATE = (
    "{{- bos_token }}{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
R1_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% else %}{% set content = message['content'].split('</think>')[-1] %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' + "
    "message['content'].split('</think>')[-1] + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\nOPENED' }}{%- endif %}"
)


def tokenizer(added: list[str], template: str, bos: str | None, eos: str, pad: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges, and the added tokens of a family behind it; trace tags are not special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken(text, special="think>" not in text, normalized=False) for text in added])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos, pad_token=pad)
    wrapped.chat_template = template
    return wrapped


def checkpoint(folder: Path, config: PretrainedConfig, tokens: PreTrainedTokenizerFast, chain: list[str]) -> Path:
    """A bfloat16 checkpoint that follows a chain of tokens, and stops at the end of a turn."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.eye(config.vocab_size, HIDDEN))
        head = model.get_output_embeddings().weight
        head.zero_()
        ids = tokens.convert_tokens_to_ids(["Ċ", *chain, tokens.eos_token])
        for current, following in itertools.pairwise(ids):
            head[following, current] = 1.0
    model.generation_config = GenerationConfig(eos_token_id=tokens.eos_token_id, bos_token_id=tokens.bos_token_id)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def llama_r1(folder: Path) -> tuple[Path, Path]:
    """Instruct and thinking checkpoint in the form of Llama-3.1-8B-Instruct and DeepSeek-R1-Distill-Llama-8B."""
    instruct = tokenizer(LLAMA, LLAMA_TEMPLATE, LLAMA[0], "<|eot_id|>", "<|finetune_right_pad_id|>")
    thinking = tokenizer(R1, R1_TEMPLATE, R1[0], R1[1], R1[1])
    sizes = {**SIZES, "vocab_size": len(instruct), "rope_parameters": LLAMA_ROPE, "bos_token_id": instruct.bos_token_id}
    eos = [instruct.convert_tokens_to_ids(name) for name in (LLAMA[1], "<|eom_id|>", "<|eot_id|>")]
    return (
        checkpoint(folder / "instruct", LlamaConfig(**sizes, eos_token_id=eos), instruct, ["5"]),
        checkpoint(
            folder / "thinking", LlamaConfig(**sizes, eos_token_id=eos[0]), thinking, ["h", "m", "</think>", "7"]
        ),
    )


def qwen3_30b(folder: Path) -> tuple[Path, Path]:
    """Instruct and thinking checkpoint in the form of Qwen3-30B-A3B-Instruct-2507 and -Thinking-2507."""
    made = []
    for mode, opened, chain in (("instruct", "", ["5"]), ("thinking", "<think>\n", ["h", "m", "</think>", "7"])):
        tokens = tokenizer(QWEN, QWEN_TEMPLATE.replace("OPENED", opened), None, "<|im_end|>", "<|endoftext|>")
        config = Qwen3MoeConfig(
            **SIZES,
            vocab_size=len(tokens),
            moe_intermediate_size=64,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000_000.0},
            eos_token_id=tokens.eos_token_id,
        )
        made.append(checkpoint(folder / mode, config, tokens, chain))
    return made[0], made[1]


def whole_loop(domain: str, overlay: str, folder: Path, data: Path) -> Path:
    """One iteration of a domain with overlays, by the commands that Make calls, in this process."""
    words = ["--domain", domain, "--runs", str(folder), "--engine", "embedded", "--iterations", "1"]
    words += ["--overlay", overlay, "--data", str(data)]
    run = folder / domain
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THINKSWITCH_DATA", str(data))  # the commands set it for this process: no other test may see it
        main(["begin", *words], standalone_mode=False)
        for stage, *rest in STAGES:
            main([stage, str(run), *rest, "--data", str(data)], standalone_mode=False)
    return run


def require_method(run: Path, *, right: float) -> None:
    """The teacher's answers were trained without their traces, and the rebuilt thinking checkpoint thinks.

    `right` is the share of the questions that the thinking checkpoint answers correctly.
    """
    rows = [row["messages"][-1]["content"] for _, row in files.read_jsonl(run / "iter-1" / "pairs.jsonl")]
    assert rows == ["7"] * 4
    zero, one = files.read_json(run / "report.json")["iterations"]
    for iteration in (zero, one):
        assert iteration["thinking"]["think_ratio"] == 1.0
        assert iteration["thinking"]["mean@k"] == right
        assert iteration["instruct"]["think_ratio"] == 0.0
        assert iteration["thinking"]["truncated"] == iteration["instruct"]["truncated"] == 0.0
    for mode in ("instruct", "thinking"):
        folder, parent = (Path(files.read_json(run / "iter-0" / "pair.json")[mode]["path"]), run / "iter-1" / mode)
        assert {name: info.dtype for name, info in list_tensors(folder).items()} == dict.fromkeys(read(parent), "BF16")
        before, after = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(parent)
        assert before.get_vocab() == after.get_vocab()
        assert before.chat_template == after.chat_template and before.eos_token == after.eos_token
