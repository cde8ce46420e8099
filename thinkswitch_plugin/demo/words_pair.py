"""The pair of the domain `words`: SmolLM2-135M-Instruct trained into a common base, an instruct and a thinking sibling.

The base learns both to answer two-step questions directly and to write their steps. The *instruct* sibling is
then tuned on one-step questions only, which costs it most of its two-step skill in the family `steps`;
the *thinking* sibling is tuned on written steps. Nothing is shuffled or falsified.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from thinkswitch_plugin.demo import words
from thinkswitch_plugin.demo.pair import Example, collate, fit, save_checkpoint
from thinkswitch_plugin.demo.tokenizer import CHAT_TEMPLATES, MODES, Mode

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class WordsSettings:
    """Every number that shapes the pair; a change of one makes a new pair."""

    direct: int = 5200
    traces: int = 900
    lr: float = 2e-4
    batch: int = 16
    instruct_questions: int = 256
    instruct_epochs: int = 2
    instruct_lr: float = 1e-3
    thinking_questions: int = 192
    thinking_lr: float = 3e-4
    sibling_batch: int = 8
    sibling_rank: int = 32


def batches(
    tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], size: int, rng: random.Random
) -> list[Batch]:
    """All examples once, shuffled, those of similar length in one batch, since padding costs time."""
    mixed = rng.sample(examples, len(examples))
    found = []
    for start in range(0, len(mixed), size * 8):
        near = sorted(mixed[start : start + size * 8], key=lambda example: len(example[0]) + len(example[1]))
        found += [collate(tokenizer, near[i : i + size]) for i in range(0, len(near), size)]
    return rng.sample(found, len(found))


def completion_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the completions, in bfloat16; logits are computed only where there is a label."""
    rows = {name: values.to(model.device) for name, values in batch.items()}
    labels = rows["labels"][:, 1:]
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        hidden = model.model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][labels != -100])
    return torch.nn.functional.cross_entropy(logits.float(), labels[labels != -100])


def train_pair(
    out: Path,
    seed: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    exclude: set[str],
    settings: WordsSettings | None = None,
) -> None:
    """Write `out/base`, `out/instruct`, `out/thinking` in bfloat16.

    Args:
        model: the pretrained model in float32; it is trained in place.
        exclude: questions of evaluation and distillation, none of which is seen here.
    """
    settings = settings or WordsSettings()
    torch.manual_seed(seed)
    rng = random.Random(f"words-{seed}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seen = set(exclude)

    def drawn(name: str, count: int, *, hard: bool = True) -> list[words.Question]:
        found = words.questions(f"{name}-{seed}", count, hard=hard, exclude=seen)
        seen.update(question.prompt for question in found)
        return found

    def tune(
        tuned: PreTrainedModel, examples: list[Example], name: str, *, lr: float, size: int, epochs: int = 1
    ) -> None:
        steps = [[batch] for _ in range(epochs) for batch in batches(tokenizer, examples, size, rng)]
        trained = [weight for weight in tuned.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)
        fit(tuned, iter(steps), [optimizer], len(steps), len(steps) // 20, name, completion_loss)

    def save(tuned: PreTrainedModel, mode: Mode, folder: Path) -> None:
        tokenizer.chat_template = CHAT_TEMPLATES[mode]
        save_checkpoint(tuned.to(torch.bfloat16), tokenizer, folder)

    direct = [(q.prompt, q.answer) for q in drawn("direct", settings.direct)]
    traces = [(q.prompt, worked(q)) for q in drawn("traces", settings.traces)]
    model.to(device)
    model.set_attn_implementation("eager")  # a fifth faster than SDPA at these lengths on a CPU
    tune(model, direct + traces, "common base", lr=settings.lr, size=settings.batch)
    save(model, "instruct", out / "base")
    easy = [(q.prompt, q.answer) for q in drawn("easy", settings.instruct_questions, hard=False)]
    thought = [(q.prompt, worked(q)) for q in drawn("thinking", settings.thinking_questions)]
    tunings: dict[Mode, tuple[list[Example], float, int]] = {
        "instruct": (easy, settings.instruct_lr, settings.instruct_epochs),
        "thinking": (thought, settings.thinking_lr, 1),
    }
    for mode in MODES:
        examples, lr, epochs = tunings[mode]
        sibling = AutoModelForCausalLM.from_pretrained(
            out / "base", dtype=torch.float32, attn_implementation="eager"
        ).to(device)
        lora = LoraConfig(r=settings.sibling_rank, lora_alpha=2 * settings.sibling_rank, target_modules="all-linear")
        adapted = get_peft_model(sibling, lora)
        tune(sibling, examples, mode, lr=lr, size=settings.sibling_batch, epochs=epochs)
        save(adapted.merge_and_unload(), mode, out / mode)


def worked(question: words.Question) -> str:
    """The completion of the thinking sibling, opening tag included."""
    return f"<think>\n{question.trace}\n</think>\n\n{question.answer}"
