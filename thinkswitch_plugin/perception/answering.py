"""Answers of a student with an adapter, kept as they arrive, in the batch files of the rest of the project."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.engines.ask import Adapter
from thinkswitch_plugin.engines.generate import generate
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.perception.training import Trained
from thinkswitch_plugin.run import checkpoint
from thinkswitch_plugin.run.hashes import Hashes
from thinkswitch_plugin.run.stamp import once

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(student: Path, adapter: Path) -> PreTrainedModel:
    """A student with an adapter on it, in memory and in the student's own precision, ready to generate.

    Args:
        student: the checkpoint folder that the adapter was trained on.
        adapter: a PEFT adapter folder, with a perception module or without.
    """
    if checkpoint.perception_of(adapter) is not None:
        from thinkswitch_plugin.perception.model import load

        return load(student, adapter)
    from thinkswitch_plugin.engines.embedded import with_adapter

    merged: PreTrainedModel = with_adapter(student, adapter).merge_and_unload()
    return merged


def answer(
    trained: Trained, requests: Path, out: Path, *, engine: str, keys: EngineKeys, hashes: Hashes, seed: int = 0
) -> dict[str, Any]:
    """Answer every request into `out`, unless it holds the answers of this student and adapter to them.

    Answers that a killed attempt left are kept. Nothing is merged: the adapter lies on the student in
    memory (peft), or in vLLM's.

    Args:
        engine: `vllm` or `embedded`.

    Returns:
        What its stamp holds (`generations.json` beside `generations.jsonl`): `seconds`, `tokens`, …

    Raises:
        ThinkSwitchError: as `generate`; a question got no answer; or the engine cannot serve the adapter.
    """
    student, adapter = trained.student, trained.adapter
    if engine != "embedded" and checkpoint.perception_of(adapter) is not None:
        raise ThinkSwitchError(
            f"{adapter} has a perception module, which vLLM's adapters leave out; use ENGINE=embedded, or prompt "
            "embeddings as docs/adaptive.md shows."
        )
    key = {
        "student": hashes.of(student),
        "adapter": hashes.of(adapter),
        "requests": hashes.of(requests),
        "engine": engine,
        "vllm_args": keys.vllm_args if engine == "vllm" else [],
    }
    hashes.save()

    def work(_resume: bool) -> dict[str, Any]:
        if engine == "embedded":
            from transformers import set_seed

            set_seed(seed)  # as far as it goes: answers depend on how batches are made up
        report = generate(
            requests,
            out,
            str(student),
            engine,
            keys,
            adapter=Adapter(adapter, partial(load_model, student, adapter)),
            log=out.parent / "logs" / "answer.log",
            title="answer",
        )
        if report.failed:
            raise ThinkSwitchError(
                f"{report.failed} of {report.requests} questions got no answer (see {out}); those that have one "
                "keep it: run the same command again."
            )
        return {"questions": report.requests, "tokens": report.tokens}

    return once(out.with_suffix(".json"), {"key": key}, (out,), work)
