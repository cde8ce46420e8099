"""A model with a perception module through real vLLM on the CPU: the same greedy answers as transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import prompt_embeds
from thinkswitch_plugin.args import EngineKeys, PerceptionKeys
from thinkswitch_plugin.data.formats import POST, PRE, STOP, parse, render
from thinkswitch_plugin.demo import mixed, task
from thinkswitch_plugin.demo.cache import ensure_pair
from thinkswitch_plugin.engines import servers
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.perception.model import attach, load
from thinkswitch_plugin.perception.model import prompt_embeds as embeds_of
from thinkswitch_plugin.perception.student import make_student

TOKENS, STEPS, BATCH = 4, 200, 32
QUESTIONS = mixed.held_out()[:80]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(servers.vllm_python() is None, reason="vLLM is not installed: make setup-vllm"),
]


def example(rng: random.Random, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its completion, with a trace first if the question is hard."""
    count = rng.choice(mixed.OPERANDS)
    question = mixed.draw(rng, count, easy=count >= 4 and rng.random() < 0.5)
    form = PRE if mixed.stratum(question) == "hard" else POST
    completion = render(form, "\n".join(task.steps(question)), task.answer(question)) + tokenizer.eos_token
    return prompt_of(tokenizer, question), tokenizer.encode(completion, add_special_tokens=False)


def prompt_of(tokenizer: Any, question: str) -> list[int]:
    turn = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adaptive model, trained for a minute in plain torch."""
    folder = tmp_path_factory.mktemp("adaptive")
    pair = Path(".cache/arithmetic/seed-0")
    ensure_pair(0, pair / "instruct", pair / "thinking")
    make_student(pair / "base", folder / "student", soft_tokens=TOKENS)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    torch.manual_seed(0)
    model, rng = AutoModelForCausalLM.from_pretrained(folder / "student"), random.Random(0)
    attach(model, PerceptionKeys.model_validate({"tokens": TOKENS}), tokenizer)
    ours = {id(weight) for weight in model.perception.parameters()}
    rest = {"params": [weight for weight in model.parameters() if id(weight) not in ours]}
    perception = {"params": list(model.perception.parameters()), "lr": 3e-3}
    optimizer = torch.optim.AdamW([rest, perception], lr=1e-3, weight_decay=0.0)
    model.train()
    for _ in range(STEPS):
        rows = [example(rng, tokenizer) for _ in range(BATCH)]
        padded = torch.nn.utils.rnn.pad_sequence
        ids = padded([torch.tensor(p + c) for p, c in rows], batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = padded([torch.tensor([-100] * len(p) + c) for p, c in rows], batch_first=True, padding_value=-100)
        mask = padded([torch.ones(len(p) + len(c)) for p, c in rows], batch_first=True)
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder / "adaptive")
    tokenizer.save_pretrained(folder / "adaptive")
    return folder / "adaptive"


@torch.inference_mode()
def greedy(model: Any, tokenizer: Any, prompt: list[int]) -> str:
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0, len(prompt) :]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).partition(STOP[0])[0]


def test_vllm_answers_as_transformers_does(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), load(checkpoint)
    prompts = [prompt_of(tokenizer, question) for question in QUESTIONS]
    expected = [greedy(model, tokenizer, prompt) for prompt in prompts]
    view = tmp_path / "view"
    prompt_embeds.write_plain_view(checkpoint, view)
    keys = EngineKeys.model_validate({"concurrency": 8})
    embeds = [embeds_of(model, prompt) for prompt in prompts]
    with prompt_embeds.serving(view, keys, tmp_path / "log", max_len=128) as server:
        found = prompt_embeds.complete(server, str(view), embeds, keys, max_tokens=64, stop=STOP)
        shuffled = [embeds_of(model, prompt_of(tokenizer, question[::-1])) for question in QUESTIONS[:8]]
        others = prompt_embeds.complete(server, str(view), shuffled, keys, max_tokens=64, stop=STOP)
        with pytest.raises(ThinkSwitchError, match="gives no completion of a prompt sent as embeddings"):
            prompt_embeds.complete(server, "another", embeds[:1], keys, max_tokens=1)
    texts = [completion.text for completion in found]
    equal = sum(one == other for one, other in zip(texts, expected, strict=True))
    right = sum(parse(text).answer == task.answer(q) for text, q in zip(texts, QUESTIONS, strict=True))
    with capsys.disabled():
        print(f"\n  equal outputs: {equal} of {len(QUESTIONS)}; right answers: {right}")
    assert texts == expected
    assert {parse(text).form for text in texts} == {PRE, POST} and right > len(QUESTIONS) / 2
    assert [completion.text for completion in others] != texts[:8]
    assert all(completion.finish_reason == "stop" and completion.tokens > 0 for completion in found)
