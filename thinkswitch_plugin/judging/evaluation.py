"""Evaluate a checkpoint with lm-eval: its tasks, metrics and files, and our model class for the answers.

`model.py` gets the answers, `verdict.py` decides about one completion (cut, thinks, correct), `samples.py` reads lm-eval's
files again with the tokens of each answer, `figures.py` sums them up, and `paired.py` compares two evaluations.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkswitch_plugin import files
from thinkswitch_plugin.args import EngineKeys, EvaluationKeys, ThinkSwitchKeys
from thinkswitch_plugin.data import task_files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.verdict import how_read

if TYPE_CHECKING:
    from thinkswitch_plugin.judging.model import ThinkSwitchLM
    from thinkswitch_plugin.judging.served import Served
    from thinkswitch_plugin.run.checkpoint import Subject

SEEDS = {"random_seed": 0, "numpy_seed": 1234, "torch_seed": 1234}  # lm_eval's own defaults


def uses_server(keys: EvaluationKeys, engine: str) -> bool:
    """Whether vLLM answers, started here for each checkpoint, rather than transformers in process."""
    return keys.backend == "server" or (keys.backend == "auto" and engine == "vllm")


def batch_size(keys: EvaluationKeys, engine: EngineKeys) -> int:
    """How many questions are answered together in process. Raises `ThinkSwitchError` if it is not a number or `auto`."""
    if keys.batch_size.startswith("auto"):
        return engine.concurrency
    if not keys.batch_size.isdecimal() or not int(keys.batch_size):
        raise ThinkSwitchError(
            f"`thinkswitch.evaluation.batch_size` is {keys.batch_size!r}; use a whole number above 0, or auto."
        )
    return int(keys.batch_size)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; None leaves a setting as the task has it."""

    temperature: float | None = None
    top_p: float | None = None
    samples: int | None = None  # k

    def __str__(self) -> str:
        return ", ".join(self._named("T ", "top-p ", "k ")) or "the task's own"

    @property
    def slug(self) -> str:
        """For a folder's name: `-t0.6-p0.95-k8`; empty for the task's own settings."""
        return "".join(self._named("-t", "-p", "-k"))

    def _named(self, *names: str) -> list[str]:
        values = (self.temperature, self.top_p, self.samples)
        return [f"{name}{value:g}" for name, value in zip(names, values, strict=True) if value is not None]

    def applied(self, generation: dict[str, Any]) -> dict[str, Any]:
        """A task's generation settings with these in their place."""
        if self.temperature == 0:
            kept = {k: v for k, v in generation.items() if k not in ("temperature", "top_p", "top_k")}
            return {**kept, "do_sample": False}
        changes: dict[str, Any] = {} if self.top_p is None else {"top_p": self.top_p}
        if self.temperature is not None:
            changes |= {"do_sample": True, "temperature": self.temperature}
        return {**generation, **changes}


def evaluate_checkpoint(
    subject: Subject,
    out: Path,
    keys: ThinkSwitchKeys,
    engine: str,
    *,
    log: Path,
    resume: bool = False,
    served: Served | None = None,
) -> None:
    """Evaluate one checkpoint on the recipe's task; lm-eval's files and the stored answers go to `out`, whole or not at all.

    Args:
        log: what lm-eval, and a vLLM that is started here, print.
        resume: continue with the answers that a killed attempt left beside `out`, or with `out` if it is whole; they
            are of the same checkpoint.
        served: the vLLM that answers for several checkpoints; None starts one for this checkpoint, if vLLM is to answer.

    Raises:
        ThinkSwitchError: there is no such task, or a question has no answer.
    """
    from transformers import AutoTokenizer

    from thinkswitch_plugin.engines.ask import Adapter, Asker
    from thinkswitch_plugin.engines.embedded import EmbeddedEngine, with_adapter
    from thinkswitch_plugin.judging.model import ThinkSwitchLM

    checkpoint, lora, building = subject.name, subject.lora, files.temporary_sibling(out)
    if not resume:
        files.remove(building)
    elif out.is_dir():
        return
    tokenizer = AutoTokenizer.from_pretrained(lora or checkpoint)
    adapter = Adapter(lora, partial(with_adapter, checkpoint, lora)) if lora else None
    answering: str | Asker = "vllm"
    asked = keys.engine
    if not uses_server(keys.evaluation, engine):
        with quiet(log):
            model = adapter.load() if adapter else None
            answering = EmbeddedEngine(lora or checkpoint, model, batch_size(keys.evaluation, keys.engine))
    elif lora:
        template = ["--chat-template", str(lora / "chat_template.jinja")]
        asked = asked.model_copy(update={"vllm_args": [*asked.vllm_args, *template]})
    elif served is not None:
        answering = served.checkpoint(Path(checkpoint), log)
    how = how_read(tokenizer, keys.convention, subject.arguments)
    lm = ThinkSwitchLM(building, checkpoint, answering, asked, tokenizer, how, log, adapter, subject.guards)
    try:
        evaluate(lm, keys.evaluation, name=str(lora or checkpoint))
    finally:
        if isinstance(answering, EmbeddedEngine):
            answering.close()
    files.put_in_place(building, out)


def evaluate(
    lm: ThinkSwitchLM,
    keys: EvaluationKeys,
    sampling: Sampling | None = None,
    *,
    name: str,
    prefix: str = "",
    stop: Sequence[str] = (),
) -> None:
    """lm-eval on our model class, with the seeds of its command line; its files go to the folder of the answers.

    The guard tasks of the model class are asked as well, with the recipe's token budget and a limit of their own.

    Args:
        name: how the results call the model.
        prefix: what every answer is made to begin with (lm-eval's `gen_prefix`); it is no part of the completions.
        stop: strings that end an answer beside the task's own.

    `lm_eval.evaluate` is called and not `simple_evaluate`, which asks pip for the list of installed packages each
    time: seconds, where a point of a sweep in memory takes two.
    """
    import lm_eval
    import numpy as np
    import torch
    from lm_eval.loggers import EvaluationTracker

    random.seed(SEEDS["random_seed"])
    np.random.seed(SEEDS["numpy_seed"])
    torch.manual_seed(SEEDS["torch_seed"])
    tracker = EvaluationTracker(output_path=str(lm.folder))
    tracker.general_config_tracker.log_experiment_args(
        model_source="thinkswitch",
        model_args={"pretrained": name},
        system_instruction=None,
        chat_template=lm.chat_template(True),
        fewshot_as_multiturn=True,
    )
    with quiet(lm.log):
        tasks = load_task(keys, sampling or Sampling(), prefix, stop)
        for guard in lm.guards:
            tasks |= load_task(keys.model_copy(update={"task": guard}), Sampling())
        limits = {name: keys.guard_limit if name in lm.guards else keys.limit for name in tasks}
        chosen = {
            name: range(min(limits[name] or len(task.eval_docs), len(task.eval_docs))) for name, task in tasks.items()
        }
        results = lm_eval.evaluate(
            lm=lm,
            task_dict=tasks,
            **({"samples": chosen} if lm.guards else {"limit": keys.limit}),
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            log_samples=True,
        )
        samples = results.pop("samples")
        results["config"] = {"model": "thinkswitch", "model_args": {"pretrained": name}, "limit": keys.limit, **SEEDS}
        tracker.save_results_aggregated(results=results, samples=samples)
        for task, rows in samples.items():
            tracker.save_results_samples(task_name=task, samples=rows)


def load_task(keys: EvaluationKeys, sampling: Sampling, prefix: str = "", stop: Sequence[str] = ()) -> dict[str, Any]:
    """A task as lm-eval loads it, with k, the sampling settings and further stop strings put in.

    Raises `ThinkSwitchError` if there is no such task, or k samples would all be the same.
    """
    changes: dict[str, Any] = {}
    if sampling.samples is not None:
        changes["repeats"] = sampling.samples
        if task_files.is_ours(keys.task):  # other tasks grade one sample; we grade all of them afterwards
            keep_all = {"function": "take_first_k", "k": sampling.samples}
            changes["filter_list"] = [{"name": "samples", "filter": [keep_all]}]
    loaded = task_files.load(keys.task, changes)
    if keys.task not in loaded:
        raise ThinkSwitchError(f"{keys.task} is a group of lm-eval tasks; name one task of it.")
    task = loaded[keys.task]
    generation = sampling.applied(dict(task.config.generation_kwargs or {}))
    if keys.max_tokens is not None:
        generation["max_gen_toks"] = keys.max_tokens
    if (sampling.samples or 1) > 1 and not generation.get("do_sample"):
        raise ThinkSwitchError(
            f"{keys.task} decodes greedily, so SAMPLES={sampling.samples} would give {sampling.samples} times the same "
            "answer; give a temperature too, such as SAMPLING=0.6/0.95."
        )
    if stop:
        until = generation.get("until") or []
        named = [until] if isinstance(until, str) else list(until)
        generation["until"] = [*named, *(string for string in stop if string not in named)]
    task.set_config(key="generation_kwargs", value=generation)
    if prefix:
        task.set_config(key="gen_prefix", value=prefix)
    task.set_config(key="num_fewshot", value=task.config.num_fewshot or 0)
    return loaded


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Keep lm-eval's own output in a log file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as handle, redirect_stdout(handle), redirect_stderr(handle):
        yield
