"""Train the tiny pair from scratch: one common base, then an instruct and a thinking checkpoint.

The base learns both to answer directly and to write a trace. A short fine-tuning
on two-operand questions makes the *instruct* checkpoint (and suppresses most of
its direct skill); another one on traces makes the *thinking* checkpoint. The two
stay close in weight space, as the Qwen3 pair is: that is what interpolation needs.

The *hybrid* is the same base with one fine-tuning on both kinds of rows, told apart by its chat template.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from thinkswitch_plugin.demo import task
from thinkswitch_plugin.demo.tokenizer import EMPTY_TRACE, Mode, build_tokenizer
from thinkswitch_plugin.run.progress import Bar

Example = tuple[str, str]  # (question, completion)
HYBRID_STEPS = 40


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


def collate(
    tokenizer: PreTrainedTokenizerFast, examples: Iterable[Example], opening: str = ""
) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids`, `attention_mask`, `labels`, each (examples, longest);
    only the completion and its end token carry a loss, `opening` ends the prompt."""
    columns: dict[str, list[torch.Tensor]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for question, completion in examples:
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{opening}"
        prompt_ids, target_ids = (
            tokenizer.encode(text, add_special_tokens=False) for text in (prompt, completion + "<|im_end|>")
        )
        columns["input_ids"].append(torch.tensor(prompt_ids + target_ids))
        columns["attention_mask"].append(torch.ones(len(prompt_ids + target_ids), dtype=torch.long))
        columns["labels"].append(torch.tensor([-100] * len(prompt_ids) + target_ids))
    fill = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
    pad = torch.nn.utils.rnn.pad_sequence
    return {name: pad(rows, batch_first=True, padding_value=fill[name]) for name, rows in columns.items()}


def whole_loss(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's own loss."""
    loss: torch.Tensor = model(**batch).loss
    return loss


def fit(
    model: PreTrainedModel,
    batches: Iterator[list[dict[str, torch.Tensor]]],
    optimizers: list[torch.optim.Optimizer],
    steps: int,
    warmup: int,
    name: str,
    loss_of: Callable[[PreTrainedModel, dict[str, torch.Tensor]], torch.Tensor] = whole_loss,
) -> None:
    """Train for `steps`; the losses of a step's batches are averaged.

    Learning rate: linear warm-up, then cosine down to a tenth; gradients clipped at 1.
    """

    def scale(step: int) -> float:
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
        return min(1.0, (step + 1) / max(1, warmup)) * (0.1 + 0.9 * cosine)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, scale) for optimizer in optimizers]
    model.train()
    with Bar(steps, name, unit="step") as bar:
        for step in itertools.islice(batches, steps):
            model.zero_grad()
            total = 0.0
            for batch in step:
                loss = loss_of(model, batch) / len(step)
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            bar.note(f"loss {total:.3f}")
            bar.update(1)


def base_optimizers(model: Qwen3ForCausalLM, settings: PairSettings) -> list[torch.optim.Optimizer]:
    """Muon on the matrices inside the layers, AdamW on embeddings and norms."""
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(inner, lr=settings.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=settings.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A complete Hugging Face checkpoint; greedy decoding is its documented default."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def examples(rng: random.Random, operands: tuple[int, ...], thinks: bool, exclude: set[str]) -> Iterator[Example]:
    """Endless random chains outside `exclude` with their traces, or their bare answers."""
    complete = task.trace if thinks else task.answer
    return ((question, complete(question)) for question in task.stream(rng, operands, exclude))


def tune(
    base: Path, sources: dict[str, Iterator[Example]], tokenizer: PreTrainedTokenizerFast, rate: float, steps: int
) -> Qwen3ForCausalLM:
    """The base after a short fine-tuning.

    Args:
        sources: by the opening behind which its completions are written; each gives a batch a step.
    """
    tuned = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=rate, weight_decay=0.0)
    batch = PairSettings.batch

    def batches() -> Iterator[list[dict[str, torch.Tensor]]]:
        while True:
            yield [collate(tokenizer, itertools.islice(rows, batch), opening) for opening, rows in sources.items()]

    fit(tuned, batches(), [optimizer], steps, 0, "fine-tuning")
    return tuned


def train_pair(out: Path, seed: int, exclude: set[str]) -> None:
    """Write `out/base`, `out/instruct`, `out/thinking`.

    `exclude` holds every question of evaluation and distillation: none of them is seen here.
    """
    settings = PairSettings()
    torch.manual_seed(seed)
    rng = random.Random(f"pair-{seed}")
    tokenizer = build_tokenizer("instruct")
    model = new_model(settings, tokenizer)
    sources = [
        (examples(rng, (2, 3, 4), True, exclude), settings.base_traces),
        (examples(rng, (2, 3, 4), False, exclude), settings.base_direct),
    ]

    def batches() -> Iterator[list[dict[str, torch.Tensor]]]:
        while True:
            yield [collate(tokenizer, itertools.islice(source, size)) for source, size in sources]

    fit(model, batches(), base_optimizers(model, settings), settings.base_steps, settings.base_warmup, "common base")
    save_checkpoint(model, tokenizer, out / "base")

    tunings: tuple[tuple[Mode, Iterator[Example], float, int], ...] = (
        ("instruct", examples(rng, (2,), False, exclude), settings.instruct_lr, settings.instruct_steps),
        ("thinking", examples(rng, (2, 3) * 6 + (4,), True, exclude), settings.thinking_lr, settings.thinking_steps),
    )
    for mode, source, rate, steps in tunings:
        tokenizer = build_tokenizer(mode)
        save_checkpoint(tune(out / "base", {"": source}, tokenizer, rate, steps), tokenizer, out / mode)


def train_hybrid(out: Path, seed: int, base: Path, exclude: set[str]) -> None:
    """Write one checkpoint that answers behind an empty trace, and else writes one; from a pair's `base`."""
    settings, rng, tokenizer = PairSettings(), random.Random(f"hybrid-{seed}"), build_tokenizer("hybrid")
    torch.manual_seed(seed)
    sources = {
        EMPTY_TRACE: examples(rng, (2,), False, exclude),
        "": examples(rng, (2, 3) * 6 + (4,), True, exclude),
    }
    save_checkpoint(tune(base, sources, tokenizer, settings.instruct_lr, HYBRID_STEPS), tokenizer, out)
