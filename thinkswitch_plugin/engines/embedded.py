"""The engine for machines without vLLM: transformers' own `generate`, in process, in batches.

`make bench-engines` compares it with `transformers serve` and lm-eval's hf backend (docs/how-it-works.md). Sampled
answers depend on how a batch was made up: greedy decoding repeats exactly, seeds are vLLM's promise alone.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, PreTrainedModel

from thinkswitch_plugin.data import distributions
from thinkswitch_plugin.engines.ask import Arrived, Request
from thinkswitch_plugin.environment import without_gpu_kernels


def with_adapter(checkpoint: str | Path, adapter: Path) -> PreTrainedModel:
    """A checkpoint with a PEFT adapter on it, in memory and in the checkpoint's own precision."""
    from peft import PeftModel

    return PeftModel.from_pretrained(_load(checkpoint), str(adapter))


def _load(checkpoint: str | Path) -> PreTrainedModel:
    without_gpu_kernels()
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", use_safetensors=True)


class EmbeddedEngine:
    """One checkpoint in memory that answers OpenAI chat requests."""

    def __init__(self, checkpoint: str | Path, model: PreTrainedModel | None = None, batch: int = 1) -> None:
        """Load a checkpoint.

        Args:
            model: what answers, if it is more than the folder's weights, such as a checkpoint with an adapter.
            batch: requests that `ask` answers together.
        """
        self.name, self.batch = str(checkpoint), batch
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
        self.model = (model or _load(checkpoint)).eval()
        if torch.cuda.is_available():
            self.model = self.model.cuda()
        ends = self.model.generation_config.eos_token_id
        self.ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id} - {None}
        self.pad = self.tokenizer.pad_token_id
        if self.pad is None:
            self.pad = self.tokenizer.eos_token_id
            self.tokenizer.pad_token_id = self.pad

    def ask(self, requests: Iterable[Request], arrived: Arrived) -> None:
        """As `Asker.ask`, a batch at a time."""
        for request, body in self.stream(requests, self.batch):
            if again := arrived(request, body):
                arrived(again, self.answer([again["body"]])[0])

    def close(self) -> None:
        """Free the model's memory, on the GPU too."""
        del self.model
        free_memory()

    def stream(self, rows: Iterable[dict[str, Any]], batch: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yield (request, chat completion body) for requests of one batch file.

        Consecutive requests with the same sampling settings are answered together.
        """
        for _, alike in itertools.groupby(rows, key=lambda row: _settings(row["body"])):
            while group := list(itertools.islice(alike, batch)):
                yield from zip(group, self._answer_in_memory([row["body"] for row in group]), strict=True)

    def _answer_in_memory(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """`answer`, in halves where the GPU's memory does not hold all of them at once."""
        try:
            return self.answer(bodies)
        except torch.OutOfMemoryError:
            if len(bodies) == 1:
                raise
        free_memory()  # outside the handler, whose traceback holds on to the failed attempt's tensors
        half = len(bodies) // 2
        return self._answer_in_memory(bodies[:half]) + self._answer_in_memory(bodies[half:])

    @torch.inference_mode()
    def answer(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Chat completion bodies for requests that share their sampling settings and stop strings.

        The raw text, tags and all, is in `message.content`, without the stop string that ended it;
        `finish_reason` is exact: an end of turn is read from the generated ids and not from the text.
        """
        prompts = [
            self.tokenizer.apply_chat_template(body["messages"], tokenize=False, **_rendering(body)) for body in bodies
        ]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = {k: v.to(self.model.device) for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
        # What ends the turn anyway need not be looked for in the text.
        stop = tuple(s for s in _stop_strings(bodies[0]) if self.tokenizer.convert_tokens_to_ids(s) not in self.ends)
        config = self._generation_config(bodies[0], stop)
        likely = TopTokens(bodies[0].get("top_logprobs", 0)) if distributions.requested(bodies[0]) else None
        output = self.model.generate(
            **inputs, generation_config=config, tokenizer=self.tokenizer, logits_processor=[likely] if likely else []
        )
        width = inputs["input_ids"].shape[1]
        answers = [
            self._body(ids.tolist(), int(mask.sum()), stop)
            for ids, mask in zip(output[:, width:], inputs["attention_mask"], strict=True)
        ]
        if likely:
            for row, body in enumerate(answers):
                used = output[row, width : width + body["usage"]["completion_tokens"]]
                body["choices"][0]["logprobs"] = {"content": likely.of_row(row, used.tolist(), self.tokenizer)}
        return answers

    def _generation_config(self, body: dict[str, Any], stop: tuple[str, ...]) -> GenerationConfig:
        values: dict[str, Any] = {
            "max_new_tokens": body["max_tokens"],
            "eos_token_id": sorted(self.ends),
            "pad_token_id": self.pad,
            "stop_strings": list(stop) or None,
        }
        if temperature := body.get("temperature"):
            values |= {
                "temperature": temperature,
                "top_p": body.get("top_p", 1.0),
                "top_k": max(0, body.get("top_k", 0)),
            }
        return GenerationConfig(do_sample=bool(temperature), **values)

    def _body(self, ids: list[int], prompt_tokens: int, stop: tuple[str, ...]) -> dict[str, Any]:
        end = next((i for i, token in enumerate(ids) if token in self.ends), None)
        # Special tokens stay: where a model's trace tags are special, skipping them would hide its trace. Nothing but
        # the end of the turn is taken off, as by vLLM.
        text = str(self.tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        used = len(ids) if end is None else end + 1
        if found := [place for string in stop if (place := text.find(string)) >= 0]:
            # The others of the batch went on; what follows a row's stop string is padding.
            text, end = text[: min(found)], next((i for i, token in enumerate(ids) if token == self.pad), len(ids))
            used = end
        message, finish = {"role": "assistant", "content": text}, "length" if end is None else "stop"
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": used, "total_tokens": prompt_tokens + used}
        return {
            "id": f"chatcmpl-{time.time_ns():x}",
            "object": "chat.completion",
            "model": self.name,
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": usage,
        }


class TopTokens(LogitsProcessor):  # type: ignore[misc]
    """Keeps the k most likely tokens of every step as the model gives them, before temperature and the like."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.steps: list[tuple[list[list[float]], list[list[int]]]] = []  # log probabilities and ids, of every row

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Look at the logits (rows, vocabulary) of one step, and leave them as they are."""
        found = scores.float().log_softmax(-1).topk(min(self.k, scores.shape[-1]))
        self.steps.append((found.values.tolist(), found.indices.tolist()))
        return scores

    def of_row(self, row: int, ids: list[int], tokenizer: Any) -> list[distributions.Entry]:
        """The entries of the tokens that a row of the batch was answered with."""
        return [
            distributions.entry(token, tokenizer.decode([token]), list(zip(places[row], values[row], strict=True)))
            for token, (values, places) in zip(ids, self.steps, strict=False)
        ]


def free_memory() -> None:
    """Give back what an engine that nobody refers to any more held, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _settings(body: dict[str, Any]) -> tuple[Any, ...]:
    names = ("temperature", "top_p", "top_k", "max_tokens", *distributions.FIELDS)
    return (*(body.get(key) for key in names), _stop_strings(body))


def _rendering(body: dict[str, Any]) -> dict[str, Any]:
    """How the chat template is applied: the last turn may be one of the assistant's to continue, as vLLM takes it."""
    continues = bool(body.get("continue_final_message"))
    return {
        "add_generation_prompt": not continues,
        "continue_final_message": continues,
        **(body.get("chat_template_kwargs") or {}),
    }


def _stop_strings(body: dict[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop") or ()
    return (stop,) if isinstance(stop, str) else tuple(stop)
