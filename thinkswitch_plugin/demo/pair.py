"""Train the tiny pair from scratch: one common base, then an instruct and a thinking checkpoint.

The base learns both to answer directly and to write a trace. A short fine-tuning
on two-operand questions makes the *instruct* checkpoint (and suppresses most of
its direct skill); another one on traces makes the *thinking* checkpoint. The two
stay close in weight space, as the Qwen3 pair is: that is what interpolation needs.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from thinkswitch_plugin.demo import task
from thinkswitch_plugin.demo.tokenizer import build_tokenizer
from thinkswitch_plugin.run.progress import Bar

Example = tuple[str, str]  # (question, completion)


@dataclass(frozen=True)
class PairSettings:
    """Every number that shapes the tiny pair; a change of one makes a new pair."""

    hidden: int = 128
    ffn: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    base_steps: int = 700
    base_traces: int = 24  # examples a step
    base_direct: int = 128
    base_warmup: int = 50
    muon_lr: float = 5e-3
    adamw_lr: float = 2e-3
    instruct_steps: int = 60
    instruct_lr: float = 1e-3
    thinking_steps: int = 110
    thinking_lr: float = 1.5e-3
    batch: int = 32


def new_model(settings: PairSettings, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 of about 0.8 M parameters in float32."""
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=settings.hidden,
        intermediate_size=settings.ffn,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def collate(tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids`, `attention_mask`, `labels`, each (examples, longest);
    only the completion and its end token carry a loss."""
    rows = []
    for question, completion in examples:
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        target_ids = tokenizer.encode(completion + "<|im_end|>", add_special_tokens=False)
        rows.append((prompt_ids, target_ids))
    width = max(len(p) + len(t) for p, t in rows)
    pad = tokenizer.pad_token_id
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, (prompt_ids, target_ids) in enumerate(rows):
        n = len(prompt_ids) + len(target_ids)
        ids[i, :n] = torch.tensor(prompt_ids + target_ids)
        labels[i, len(prompt_ids) : n] = torch.tensor(target_ids)
        mask[i, :n] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def fit(
    model: Qwen3ForCausalLM,
    batches: Iterator[list[dict[str, torch.Tensor]]],
    optimizers: list[torch.optim.Optimizer],
    steps: int,
    warmup: int,
    name: str,
) -> None:
    """Train for `steps`; the losses of a step's sub-batches are averaged.

    Learning rate: linear warm-up, then cosine down to a tenth; gradients clipped at 1.
    """
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    model.train()
    bar = Bar(steps, name, unit="step")
    for step, sub_batches in enumerate(itertools.islice(batches, steps)):
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
        scale = min(1.0, (step + 1) / max(1, warmup)) * (0.1 + 0.9 * cosine)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
            optimizer.zero_grad()
        total = 0.0
        for batch in sub_batches:
            loss = model(**batch).loss / len(sub_batches)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        bar.note(f"loss {total:.3f}")
        bar.update(1)
    bar.close()


def base_optimizers(model: Qwen3ForCausalLM, settings: PairSettings) -> list[torch.optim.Optimizer]:
    """Muon on the matrices inside the layers, AdamW on embeddings and norms."""
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(inner, lr=settings.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=settings.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def save_checkpoint(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A complete Hugging Face checkpoint; greedy decoding is its documented default."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_pair(out: Path, seed: int, exclude: set[str], settings: PairSettings | None = None) -> dict[str, Any]:
    """Write `out/base`, `out/instruct`, `out/thinking`; return the settings used.

    `exclude` holds every question of evaluation and distillation: none of them is seen here.
    """
    settings = settings or PairSettings()
    torch.manual_seed(seed)
    rng = random.Random(f"pair-{seed}")
    direct_tokenizer, thinking_tokenizer = build_tokenizer("instruct"), build_tokenizer("thinking")

    def examples(operand_choices: tuple[int, ...], complete: Callable[[str], str]) -> Iterator[Example]:
        for question in task.stream(rng, operand_choices, exclude):
            yield question, complete(question)

    def batch(source: Iterator[Example], size: int) -> dict[str, torch.Tensor]:
        return collate(direct_tokenizer, list(itertools.islice(source, size)))

    model = new_model(settings, direct_tokenizer)
    traces, direct = examples((2, 3, 4), task.trace), examples((2, 3, 4), task.answer)
    fit(
        model,
        ([batch(traces, settings.base_traces), batch(direct, settings.base_direct)] for _ in itertools.count()),
        base_optimizers(model, settings),
        settings.base_steps,
        settings.base_warmup,
        "common base",
    )
    save_checkpoint(model, direct_tokenizer, out / "base")

    stages = (
        ("instruct", direct_tokenizer, examples((2,), task.answer), settings.instruct_lr, settings.instruct_steps),
        (
            "thinking",
            thinking_tokenizer,
            examples((2, 3) * 6 + (4,), task.trace),
            settings.thinking_lr,
            settings.thinking_steps,
        ),
    )
    for name, tokenizer, source, rate, step_count in stages:
        tuned = Qwen3ForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
        fit(
            tuned,
            ([batch(source, settings.batch)] for _ in itertools.count()),
            [torch.optim.AdamW(tuned.parameters(), lr=rate, weight_decay=0.0)],
            step_count,
            0,
            name,
        )
        save_checkpoint(tuned, tokenizer, out / name)
    return asdict(settings)
