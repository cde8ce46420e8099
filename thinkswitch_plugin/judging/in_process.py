"""lm-eval on a model that is in this process's memory: its own evaluation, samples files and seeds, no start-up."""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkswitch_plugin import places
from thinkswitch_plugin.args import EvaluationKeys
from thinkswitch_plugin.conventions import Convention
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.trace_tokens import SERVED, keep_tags

SEEDS = {"random": 0, "numpy": 1234, "torch": 1234}  # lm_eval's own defaults


@dataclass(frozen=True)
class Sampling:
    """How a candidate's answers are drawn; None leaves a setting as the task has it."""

    temperature: float | None = None
    top_p: float | None = None
    samples: int | None = None  # k

    def __str__(self) -> str:
        parts = [f"T {self.temperature:g}" if self.temperature is not None else ""]
        parts += [f"top-p {self.top_p:g}" if self.top_p is not None else ""]
        parts += [f"k {self.samples}" if self.samples is not None else ""]
        return ", ".join(p for p in parts if p) or "the task's own"

    @property
    def slug(self) -> str:
        """For a folder's name: `-t0.6-p0.95-k8`; empty for the task's own settings."""
        named = (("t", self.temperature), ("p", self.top_p), ("k", self.samples))
        return "".join(f"-{letter}{value:g}" for letter, value in named if value is not None)


def evaluate(
    model: Any,
    keys: EvaluationKeys,
    sampling: Sampling,
    out: Path,
    *,
    name: str,
    prefix: str = "",
    stop: Sequence[str] = (),
    convention: Convention | None = None,
) -> None:
    """lm-eval on a model object, with the seeds and the files of its command line.

    Trace tags that are special tokens stay in the answers.

    Args:
        model: one of lm-eval's models.
        out: where its results and samples files go.
        name: how the results call the model.
        prefix: what every answer is made to begin with (lm-eval's `gen_prefix`); it is no part of the completions.
        stop: strings that end an answer beside the task's own.
        convention: how traces are written, as the recipe says; None goes by the chat template.

    `lm_eval.evaluate` is called and not `simple_evaluate`, which asks pip for the list of
    installed packages again for every candidate.
    """
    import numpy as np
    import torch
    from lm_eval.evaluator import evaluate as lm_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.api_models import TemplateAPI
    from transformers import AutoTokenizer

    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])
    tracker = EvaluationTracker(output_path=str(out))
    tracker.general_config_tracker.log_experiment_args(
        model_source="candidate",
        model_args={"pretrained": name},
        system_instruction=None,
        chat_template=model.chat_template(True) if hasattr(model, "chat_template") else None,
        fewshot_as_multiturn=True,
    )
    task = load_task(keys, sampling, prefix, stop)
    if isinstance(model, TemplateAPI):
        settings = {**task[keys.task].config.generation_kwargs, **SERVED}
        task[keys.task].set_config(key="generation_kwargs", value=settings)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            if folder := keep_tags(model.tokenizer, Path(scratch), convention):
                model.tokenizer = AutoTokenizer.from_pretrained(folder)
    results = lm_evaluate(
        lm=model,
        task_dict=task,
        limit=keys.limit,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        log_samples=True,
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name, rows in samples.items():
        tracker.save_results_samples(task_name=name, samples=rows)


def load_task(keys: EvaluationKeys, sampling: Sampling, prefix: str = "", stop: Sequence[str] = ()) -> dict[str, Any]:
    """A task as lm-eval loads it, with k, the sampling settings and further stop strings put in.

    Raises `ThinkSwitchError` if there is no such task, or k samples would all be the same.
    """
    from lm_eval.tasks import TaskManager, get_task_dict

    ours = (places.find(places.TASKS) / f"{keys.task}.yaml").is_file()
    manager = TaskManager(include_path=str(places.find(places.TASKS)), include_defaults=not ours)
    if keys.task not in manager.all_tasks:
        raise ThinkSwitchError(f"lm-eval knows no task {keys.task}; `lm_eval ls tasks` lists them.")
    changes: dict[str, Any] = {"task": keys.task}
    if sampling.samples is not None:
        keep_all = {"function": "take_first_k", "k": sampling.samples}
        changes |= {"repeats": sampling.samples, "filter_list": [{"name": "samples", "filter": [keep_all]}]}
    loaded = get_task_dict([changes], manager)
    task = loaded[keys.task]
    generation = dict(task.config.generation_kwargs or {})
    if sampling.temperature is not None:
        for key in ("temperature", "top_p", "top_k", "do_sample"):
            if sampling.temperature == 0:
                generation.pop(key, None)
        generation |= (
            {"do_sample": False}
            if sampling.temperature == 0
            else {
                "do_sample": True,
                "temperature": sampling.temperature,
            }
        )
    if sampling.top_p is not None and sampling.temperature != 0:
        generation["top_p"] = sampling.top_p
    if keys.max_tokens is not None:
        generation["max_gen_toks"] = keys.max_tokens
    if (sampling.samples or 1) > 1 and not generation.get("do_sample"):
        raise ThinkSwitchError(
            f"{keys.task} decodes greedily, so K={sampling.samples} samples would be {sampling.samples} times the same "
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
    return dict(loaded)


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Keep lm-eval's own output in a log file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with log.open("a", encoding="utf-8") as handle, redirect_stdout(handle), redirect_stderr(handle):
        yield
