"""Evaluate a checkpoint with lm-eval."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thinkswitch_plugin import conventions, files
from thinkswitch_plugin.args import EngineKeys, EvaluationKeys
from thinkswitch_plugin.data.task_files import budget as task_budget
from thinkswitch_plugin.engines.generate import PROMPT_ROOM, context_length
from thinkswitch_plugin.engines.servers import lora_arguments, serving
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.judging.samples import samples_file
from thinkswitch_plugin.judging.trace_tokens import SERVED, keep_tags_of
from thinkswitch_plugin.run.hardware import has_cuda
from thinkswitch_plugin.run.processes import run_logged

LARGEST_BUDGET = 32_768  # tokens a server makes room for, if neither the recipe nor the task names a budget


def uses_server(keys: EvaluationKeys, engine: str) -> bool:
    """Whether lm-eval asks vLLM, started here for each checkpoint, rather than transformers in process."""
    return keys.backend == "server" or (keys.backend == "auto" and engine == "vllm")


def server_room(checkpoint: str, keys: EvaluationKeys) -> int:
    """The longest sequence that a server makes room for: the recipe's budget, else the task's, and a prompt."""
    budget = keys.max_tokens or task_budget(keys.task) or LARGEST_BUDGET
    return min(context_length(checkpoint), budget + PROMPT_ROOM)


def run_lm_eval(
    checkpoint: str,
    out: Path,
    keys: EvaluationKeys,
    engine: str,
    engine_keys: EngineKeys,
    *,
    logs: Path,
    title: str,
    convention: conventions.Convention | None = None,
    lora: Path | None = None,
) -> None:
    """Run `lm_eval` on one checkpoint and keep its results and samples files in `out`.

    Args:
        convention: how traces are written, as the recipe says; None goes by the chat template.
        lora: a PEFT adapter put on the checkpoint; its tokenizer and chat template count then.

    Raises:
        ThinkSwitchError: lm-eval fails (with the end of the log), or would misread a name.
    """
    if (
        "," in f"{checkpoint}{lora or ''}"
    ):  # what follows would be further options of lm-eval, `trust_remote_code=True` among them
        raise ThinkSwitchError(f"The checkpoint {checkpoint} has a comma in its name; rename the folder.")
    building = files.temporary_sibling(out)
    files.remove(building)
    common: list[str | Path] = [
        "--include_path",
        "lm_eval_tasks",
        "--tasks",
        keys.task,
        "--apply_chat_template",
        "--log_samples",
        "--output_path",
        building,
    ]
    if keys.limit is not None:
        common += ["--limit", str(keys.limit)]
    generation: dict[str, Any] = {} if keys.max_tokens is None else {"max_gen_toks": keys.max_tokens}
    lm_eval = [str(Path(sys.executable).with_name("lm_eval")), "run"]
    log = logs / f"{title}.log"
    if uses_server(keys, engine):
        room = server_room(checkpoint, keys)
        name = checkpoint
        if lora is not None:
            name = lora.name
            extra = [*lora_arguments({name: lora}), "--chat-template", str(lora / "chat_template.jinja")]
            engine_keys = engine_keys.model_copy(update={"vllm_args": [*engine_keys.vllm_args, *extra]})
        with serving("vllm", checkpoint, engine_keys, log, max_len=room) as server, server.explaining(log):
            model_args = (
                f"model={name},base_url={server.base_url}/chat/completions,"
                f"num_concurrent={engine_keys.concurrency},timeout={engine_keys.timeout:g},tokenizer_backend=none"
            )
            backend: list[str | Path] = ["--model", "local-chat-completions", "--model_args", model_args]
            backend += _gen_kwargs({**generation, **SERVED})
            run_logged([*lm_eval, *backend, *common], log, title="lm_eval")
    else:
        device = "cuda" if has_cuda() else "cpu"
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer = keep_tags_of(str(lora or checkpoint), Path(scratch), convention) or lora
            model_args = f"pretrained={checkpoint},dtype=auto" + (f",peft={lora}" if lora else "")
            model_args += f",tokenizer={tokenizer}" if tokenizer else ""
            backend = ["--model", "hf", "--model_args", model_args, "--device", device]
            backend += ["--batch_size", keys.batch_size, *_gen_kwargs(generation)]
            run_logged([*lm_eval, *backend, *common], log, title="lm_eval")
    samples_file(building, keys.task)
    files.put_in_place(building, out)


def _gen_kwargs(generation: Mapping[str, Any]) -> list[str | Path]:
    """Generation settings as an option of `lm_eval run`."""
    return ["--gen_kwargs", ",".join(f"{name}={value}" for name, value in generation.items())] if generation else []
