"""lm-eval's model interface over a batch file: questions are written as requests, and answers stored as they arrive.

    eval/thinking/requests.jsonl       {"custom_id": "q00007-s0", "body": {"messages": […], "max_tokens": 64, …}}
    eval/thinking/generations.jsonl    {"custom_id": "q00007-s0", "response": {"body": {"choices": […]}}, …}

So whatever engine answers, an evaluation that was killed continues with the answers that are missing.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from lm_eval.api.model import LM

from thinkswitch_plugin import files
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.data import batch, messages
from thinkswitch_plugin.data.task_files import kind_of_task
from thinkswitch_plugin.engines.ask import Adapter, Asker
from thinkswitch_plugin.engines.embedded import EmbeddedEngine
from thinkswitch_plugin.engines.generate import generate
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.samples import GENERATIONS, LM_EVAL_BUDGET, REQUESTS, question_id
from thinkswitch_plugin.judging.verdict import Answered

SETTINGS = ("temperature", "top_p", "top_k", "max_tokens", "stop", "seed")  # that every engine knows


def _until(settings: dict[str, Any]) -> list[str]:
    """The stop strings of lm-eval's generation settings."""
    until = settings.get("until") or []
    return [until] if isinstance(until, str) else list(until)


class Prompt(str):
    """A rendered prompt, as lm-eval records it, with the chat that it was rendered from."""

    chat: list[dict[str, str]]


@dataclass(eq=False)
class ThinkSwitchLM(LM):  # type: ignore[misc]
    """A checkpoint that answers lm-eval's questions through `generate`.

    Attributes:
        folder: where questions and answers are kept.
        checkpoint: who answers, and its name in the requests.
        engine: `vllm`, `embedded`, the base URL of a running server, or a checkpoint that is ready to answer.
        tokenizer: its chat template renders the prompts as lm-eval records them.
        how: how it is asked and its completions are read.
        adapter: put on the checkpoint before it answers.
        guards: the guard tasks among those that are asked. What lm-eval grades of them is an answer without its trace,
            and the task's stop strings end the answer, not the trace.
        shown: standard output and error for the progress bar, whatever becomes of lm-eval's own.
    """

    folder: Path
    checkpoint: str
    engine: str | Asker
    keys: EngineKeys
    tokenizer: Any
    how: batch.Asked
    log: Path
    adapter: Adapter | None = None
    guards: Sequence[str] = ()
    shown: tuple[Any, Any] = field(default_factory=lambda: (sys.stdout, sys.stderr))

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def tokenizer_name(self) -> str:
        """The checkpoint's name; lm-eval wants one for its own cache, which is not used."""
        return self.checkpoint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The checkpoint's chat template, for lm-eval's records."""
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> Prompt:
        """Render a chat, which the prompt keeps. Without a generation prompt the last turn is to be continued."""
        prompt = Prompt(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self.how.arguments,
            )
        )
        prompt.chat = [{"role": turn["role"], "content": turn["content"]} for turn in chat_history]
        return prompt

    def generate_until(self, requests: Sequence[Any]) -> list[Answered]:
        """The answers to lm-eval's requests, in their order; the k samples of a question are requests of their own.

        Raises `ThinkSwitchError` as `generate`, and if a question has no answer. Answers so far are kept.
        """
        asked, answered = self.folder / REQUESTS, self.folder / GENERATIONS
        samples: Counter[tuple[str, int]] = Counter()
        rows: dict[str, dict[str, Any]] = {}
        stops: dict[str, list[str]] = {}  # of the requests whose answers are graded without their traces
        for request in requests:
            prompt, settings = request.args
            guard = request.task_name if request.task_name in self.guards else ""
            sample = samples[guard, request.doc_id]
            name = question_id(request.doc_id, sample, guard)
            if guard and kind_of_task(guard) is None:
                stops[name], settings = _until(settings), {**settings, "until": []}
            rows[name] = batch.request(name, self._body(prompt, settings, sample))
            samples[guard, request.doc_id] += 1
        lines = b"".join(map(files.dumps_line, rows.values()))
        if not asked.is_file() or asked.read_bytes() != lines:
            files.remove(answered)  # answers to other questions
            with files.atomic_file(asked) as handle:
                handle.write(lines)
        with redirect_stdout(self.shown[0]), redirect_stderr(self.shown[1]):
            generate(
                asked,
                answered,
                self.checkpoint,
                self.engine,
                self.keys,
                log=self.log,
                adapter=self.adapter,
                title=self.log.stem,
            )
        return self._read(answered, list(rows), stops)

    def _body(self, prompt: str, settings: dict[str, Any], sample: int) -> dict[str, Any]:
        """One request body, with sampling settings as lm-eval means them: greedy unless a temperature is set."""
        known = {name: value for name, value in settings.items() if value is not None and name != "until"}
        sampled, until = known.pop("do_sample", None), _until(settings)
        temperature = 0.0 if sampled is False else float(known.get("temperature", 1.0 if sampled else 0.0))
        known |= {"max_tokens": known.pop("max_gen_toks", LM_EVAL_BUDGET), "temperature": temperature}
        if temperature > 0:
            known["seed"] = known.get("seed", 0) + sample  # k equal seeds would give k equal samples
        else:
            known = {name: value for name, value in known.items() if name not in ("top_p", "top_k", "seed")}
        if until:
            known["stop"] = until
        unknown = sorted(known.keys() - set(SETTINGS))
        if unknown and (self.engine == "embedded" or isinstance(self.engine, EmbeddedEngine)):
            raise ThinkSwitchError(
                f"The task generates with `{unknown[0]}`, which is not supported in process; remove it from the task's "
                "`generation_kwargs`, or set `thinkswitch.evaluation.backend: server`."
            )
        chat = prompt.chat if isinstance(prompt, Prompt) else [{"role": "user", "content": prompt}]
        if chat[-1]["role"] == "assistant":
            known |= {"add_generation_prompt": False, "continue_final_message": True}
        return {"model": self.checkpoint, "messages": chat, **known, **self.how.fields()}

    def _read(self, answered: Path, names: Sequence[str], stops: dict[str, list[str]]) -> list[Answered]:
        found: dict[str, Answered] = {}
        problem = "it was not asked"
        for name, row in batch.read_stored(answered):
            body = batch.completion_body(row)
            if body is None:
                problem = (row.get("error") or {}).get("message", problem)
                continue
            done = batch.completion_of(row, self.how)
            text = messages.parts(body["choices"][0]["message"])[1]
            if name in stops:
                text = done.answer or ""
                for stop in filter(None, stops[name]):
                    text = text.partition(stop)[0]
            found[name] = Answered.of(text, done)
        missing = [name for name in names if name not in found]
        if missing:
            raise ThinkSwitchError(
                f"{len(missing)} of {len(names)} answers of {self.checkpoint} are missing, {missing[0]} among them: "
                f"{problem}. The others are kept; run the same command again to ask for them."
            )
        return [found[name] for name in names]

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Not for models that are asked by chat. Raises `ThinkSwitchError`."""
        raise ThinkSwitchError(
            "The task compares likelihoods, which a chat does not give; name a task with `output_type: generate_until`."
        )

    loglikelihood_rolling = loglikelihood
