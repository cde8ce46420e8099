"""On-policy distillation: what student and teacher read, which tokens count, and that the student comes nearer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import checkpoints
from tests.conftest import ROOT
from thinkswitch_plugin import files
from thinkswitch_plugin.demo import task
from thinkswitch_plugin.demo.tokenizer import build_tokenizer
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.recipe import iteration_config, load_recipe

pytestmark = pytest.mark.slow
STEPS = 16
QUESTIONS = ("7*3+4*2", "1+2+3", "9-4*2", "5*5-1")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to train in: a pair of random weights, and four questions with their traces."""
    here = tmp_path_factory.mktemp("on-policy")
    for seed, mode in enumerate(("instruct", "thinking")):
        folder = checkpoints.write(here / mode, checkpoints.qwen3(seed))
        build_tokenizer(mode).save_pretrained(folder)
    rows = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": task.answer(question)},
            ],
            "trace": "\n".join(task.steps(question)),
        }
        for question in QUESTIONS
    ]
    files.write_jsonl(here / "rationales.jsonl", rows)
    files.write_json(here / "on-policy.json", {"teacher": str(here / "thinking"), "chat_template_kwargs": {}})
    loaded = load_recipe(ROOT / "recipes" / "arithmetic.yaml")
    few = {"max_steps": STEPS, "logging_steps": 1, "micro_batch_size": 4}
    recipe = replace(loaded, axolotl=loaded.axolotl | few)
    start = {"base_model": str(here / "instruct"), "pairs": here / "rationales.jsonl", "here": here}
    files.write_yaml(here / "axolotl.yaml", iteration_config(recipe, **start, seed=0))
    return here


def test_the_loss_is_the_kl_over_the_students_tokens_given_the_teachers_trace_and_falls(here: Path) -> None:
    from experiments.on_policy import train, trainer_of

    trainer = trainer_of(here)
    tokenizer = trainer.processing_class
    rows = [trainer.train_dataset[place] for place in range(len(QUESTIONS))]
    for row, question in zip(rows, QUESTIONS, strict=True):
        asked, traced = (tokenizer.decode(row[name]) for name in ("prompt", "teacher_prompt"))
        assert "<think>" not in asked and task.steps(question)[0] not in asked
        assert traced.count("<think>") == 1 and traced.endswith("\n".join([*task.steps(question), "</think>\n\n"]))
    batch = trainer.data_collator(rows)
    config = trainer.generation_config
    ids, mask, labels = trainer.generate_on_policy_outputs(trainer.model, batch, config)
    batch |= {"input_ids": ids, "attention_mask": mask, "labels": labels}
    kl, tokens = torch.zeros(()), 0
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
        for row, written, kept in zip(rows, ids, labels, strict=True):  # without padding, one by one
            answer = written[kept != -100].tolist()
            of = [
                model(input_ids=torch.tensor([row[name] + answer])).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
                for model, name in ((trainer.model, "prompt"), (trainer.teacher_model, "teacher_prompt"))
            ]
            kl += (of[1].exp() * (of[1] - of[0])).sum()
            tokens += len(answer)
    assert float(loss) == pytest.approx(float(kl) / tokens, rel=1e-3)

    losses = train(trainer, here / "adapter")
    assert len(losses) == STEPS and sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert files.read_json(here / "adapter" / "adapter_config.json")["r"] == 32
    assert not (here / "trainer").exists()


def test_a_teacher_with_another_tokenizer_is_refused(here: Path) -> None:
    from experiments.on_policy import contexts

    keys = load_recipe(ROOT / "recipes" / "arithmetic.yaml").keys
    other = build_tokenizer("thinking")
    other.add_tokens(["more"])
    with pytest.raises(ThinkSwitchError, match="has another tokenizer than"):
        contexts([], build_tokenizer("instruct"), other, keys, {})
