"""On-policy distillation: the student answers, and the teacher, which also reads its own trace, scores the student's tokens.

    student   prompt -> answer                 what it samples, anew at every step
    teacher   prompt, trace, the same answer   its distribution over each token of that answer
    loss      KL between the two over the answer's tokens

This is TRL's GKD trainer (arXiv 2306.13649) with one difference: the teacher reads another prompt than the student. Model,
NF4 and LoRA are loaded by axolotl from the config that its own training of the pairs would have, and the adapter is merged
like any other. Beside that config, in one folder:

    rationales.jsonl   the pairs with their traces, in `<think>` tags to the teacher
    on-policy.json     `teacher`, its checkpoint, and `arguments` of its chat template
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer.utils import pad

from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import ThinkSwitchKeys
from thinkswitch_plugin.data import formats
from thinkswitch_plugin.engine_args import TEMPLATE_KEY
from thinkswitch_plugin.environment import has_cuda, without_gpu_kernels
from thinkswitch_plugin.errors import ThinkSwitchError

CONFIG, RATIONALES, ABOUT = "axolotl.yaml", "rationales.jsonl", "on-policy.json"
LONGEST = 2  # times the tokens of the teacher's longest answer are what the student may write


class OnPolicyTrainer(GKDTrainer):  # type: ignore[misc]
    """TRL's GKD trainer whose teacher reads the prompts `teacher_prompts` of a batch, and the student `prompts`."""

    def __init__(self, *args: Any, softened: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.softened = softened  # the temperature of both distributions in the loss
        self.model_accepts_loss_kwargs = False  # the tokens of a batch are known only when the student has answered

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The divergence over the student's tokens, a mean over those of the batch."""
        start = inputs["prompts"].shape[1]
        answer, mask, labels = (inputs[name][:, start:] for name in ("input_ids", "attention_mask", "labels"))
        student = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        with torch.no_grad():
            teacher = self.teacher_model.eval()(
                input_ids=torch.cat([inputs["teacher_prompts"], answer], dim=1),
                attention_mask=torch.cat([inputs["teacher_attention_mask"], mask], dim=1),
            )
        before = slice(-answer.shape[1] - 1, -1)  # the logits at a place are of the token after it
        loss = self.softened**2 * self.generalized_jsd_loss(  # axolotl's KD loss is scaled so, which TRL's is not
            student.logits[:, before], teacher.logits[:, before], labels, beta=self.beta, temperature=self.softened
        )
        return (loss, student) if return_outputs else loss


def contexts(
    rows: Sequence[dict[str, Any]],
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    keys: ThinkSwitchKeys,
    arguments: dict[str, Any],
) -> Dataset:
    """What student and teacher read before an answer, as token ids: `prompt` and `teacher_prompt`.

    Args:
        rows: of `rationales.jsonl`.
        arguments: of the teacher's chat template.

    Raises `ThinkSwitchError` if the two have different tokenizers.
    """
    if student.get_vocab() != teacher.get_vocab():
        raise ThinkSwitchError(
            f"{teacher.name_or_path} has another tokenizer than {student.name_or_path}, so its distributions are about "
            "other tokens; use a pair with one tokenizer, or train on the answers."
        )
    found = []
    for row in rows:
        *turns, last = row["messages"]
        asked = student.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **keys.pair.arguments("instruct")
        )
        thinking = teacher.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **arguments)
        traced = formats.render(formats.PRE, row["trace"], last["content"]).removesuffix(last["content"].strip())
        if thinking.rstrip().endswith(formats.THINK[0]):  # the template has opened the trace
            thinking = thinking.rstrip().removesuffix(formats.THINK[0])
        found.append(
            {
                "prompt": student(asked, add_special_tokens=False)["input_ids"],
                "teacher_prompt": teacher(thinking + traced, add_special_tokens=False)["input_ids"],
            }
        )
    return Dataset.from_list(found)


def collator(padding: int) -> Any:
    """Batches as the trainer takes them, padded on the left: what is generated then begins at one place."""

    def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = {}
        for name, ids, mask in (
            ("prompt", "prompts", "prompt_attention_mask"),
            ("teacher_prompt", "teacher_prompts", "teacher_attention_mask"),
        ):
            each = [torch.tensor(row[name]) for row in rows]
            batch[ids] = pad(each, padding_value=padding, padding_side="left")
            batch[mask] = pad([torch.ones_like(one) for one in each], padding_value=0, padding_side="left")
        return batch

    return collate


def settings(cfg: Any, keys: ThinkSwitchKeys, out: Path, longest: int) -> GKDConfig:
    """The arguments of the trainer, from those of axolotl's training."""
    return GKDConfig(
        output_dir=str(out),
        lmbda=1.0,  # every batch is the student's
        temperature=1.0,  # of the student's answers
        beta=keys.distribution.beta,
        max_new_tokens=longest,
        max_steps=cfg.max_steps or -1,
        num_train_epochs=cfg.num_epochs,
        per_device_train_batch_size=cfg.micro_batch_size,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        gradient_checkpointing=bool(cfg.gradient_checkpointing),
        learning_rate=cfg.learning_rate,
        lr_scheduler_type=str(getattr(cfg.lr_scheduler, "value", cfg.lr_scheduler)),
        warmup_steps=cfg.warmup_steps or 0,
        weight_decay=cfg.weight_decay or 0.0,
        optim=str(getattr(cfg.optimizer, "value", cfg.optimizer)),
        max_grad_norm=cfg.max_grad_norm or 1.0,
        bf16=bool(cfg.bf16),
        fp16=bool(cfg.fp16),
        use_cpu=not has_cuda(),
        seed=cfg.seed,
        logging_steps=cfg.logging_steps or 1,
        save_strategy="no",
        report_to="none",
        dataloader_num_workers=0,
    )


def trainer_of(here: Path) -> OnPolicyTrainer:
    """The trainer that the files in `here` describe. Raises `ThinkSwitchError` as `contexts`.

    Its student answers in training mode: on a CPU, bitsandbytes repacks the weights of a model in evaluation mode, which
    then learns nothing more.
    """
    console.fetch_no_code()
    without_gpu_kernels()
    from axolotl.cli.config import load_cfg
    from axolotl.train import setup_model_and_tokenizer

    about = files.read_json(here / ABOUT)
    cfg = load_cfg(str(here / CONFIG))
    keys = ThinkSwitchKeys.model_validate(files.read_yaml(here / CONFIG)["thinkswitch"])
    set_seed(cfg.seed)
    student, tokenizer, _, _ = setup_model_and_tokenizer(cfg)
    student.train()
    teacher = AutoModelForCausalLM.from_pretrained(about["teacher"], dtype="auto", use_safetensors=True)
    reader = AutoTokenizer.from_pretrained(about["teacher"])
    rows = [row for _, row in files.read_jsonl(here / RATIONALES)]
    answers = (tokenizer(row["messages"][-1]["content"], add_special_tokens=False)["input_ids"] for row in rows)
    longest = LONGEST * (1 + max(map(len, answers)))  # with the end of the turn
    return OnPolicyTrainer(
        model=student,
        teacher_model=teacher,
        args=settings(cfg, keys, here / "trainer", longest),
        data_collator=collator(tokenizer.pad_token_id),
        train_dataset=contexts(rows, tokenizer, reader, keys, about[TEMPLATE_KEY]),
        processing_class=tokenizer,
        softened=keys.distribution.temperature,
    )


def train(trainer: OnPolicyTrainer, adapter: Path) -> list[float]:
    """Train one adapter, which is then whole or not there; the losses as they were logged."""
    trainer.train()
    with files.atomic_folder(adapter) as folder:
        trainer.save_model(str(folder))
    files.remove(Path(trainer.args.output_dir))
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    train(trainer_of(Path(sys.argv[1])), Path(sys.argv[1]) / "adapter")
