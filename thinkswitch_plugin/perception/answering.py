"""Answers of a student with an adapter, kept as they arrive, in the batch files of the rest of the project."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import set_seed

from thinkswitch_plugin import files
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.data import batch
from thinkswitch_plugin.data.formats import STOP
from thinkswitch_plugin.engines import servers
from thinkswitch_plugin.engines.ask import Adapter
from thinkswitch_plugin.engines.generate import generate
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run import checkpoint
from thinkswitch_plugin.run.hardware import has_cuda
from thinkswitch_plugin.run.hashes import Hashes
from thinkswitch_plugin.run.stamp import once

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def choose_engine(engine: str) -> str:
    """What `ENGINE=` means for a student with an adapter: `vllm` or `embedded`.

    `auto` is vLLM if it is installed and there is a GPU: on a CPU its start, once an adapter, costs more
    than it saves. Raises `ThinkSwitchError` for a server of the user's own, which does not have the adapter.
    """
    if engine == "auto":
        return "vllm" if has_cuda() and servers.vllm_python() else "embedded"
    chosen = servers.choose(engine)
    if chosen not in ("vllm", "embedded"):
        raise ThinkSwitchError(
            f"ENGINE={engine}: a server of your own does not have the adapters that are trained here; "
            "use ENGINE=vllm or ENGINE=embedded."
        )
    return chosen


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


def write_questions(
    out: Path,
    questions: Iterable[tuple[str, list[dict[str, Any]]]],
    *,
    max_tokens: int,
    samples: int = 1,
    seed: int = 0,
) -> None:
    """Write `requests.jsonl`: each question once, greedily, or `samples` times at temperature 1.

    Args:
        questions: (prompt id, turns that ask it).
        max_tokens: budget of one completion, in tokens.
        seed: sample j is seeded with ``seed * samples + j``, if the engine supports seeds.
    """
    with files.atomic_file(out) as handle:
        for (prompt_id, turns), sample in itertools.product(questions, range(samples)):
            body = {
                "model": "student",
                "messages": turns,
                "temperature": 1.0 if samples > 1 else 0.0,
                "max_tokens": max_tokens,
                "stop": list(STOP),
                "seed": seed * samples + sample,
                "metadata": {"prompt_id": prompt_id},
            }
            custom_id = f"{prompt_id}-s{sample}" if samples > 1 else prompt_id
            handle.write(files.dumps_line(batch.request(custom_id, body)))


class Tuned(NamedTuple):
    """A student's checkpoint folder and the PEFT adapter that was trained on it, with a perception module or without."""

    student: Path
    adapter: Path


def answer(
    tuned: Tuned, requests: Path, out: Path, *, engine: str, keys: EngineKeys, hashes: Hashes, seed: int = 0
) -> dict[str, Any]:
    """Answer every request into `out`, unless it holds the answers of this student and adapter to them.

    Answers that a killed attempt left are kept. Nothing is merged: the adapter lies on the student in
    memory (peft), or in vLLM's.

    Args:
        engine: `vllm` or `embedded`; see `choose_engine`.

    Returns:
        What its stamp holds (`generations.json` beside `generations.jsonl`): `seconds`, `tokens`, …

    Raises:
        ThinkSwitchError: as `generate`; a question got no answer; or the engine cannot serve the adapter.
    """
    if engine != "embedded" and checkpoint.perception_of(tuned.adapter) is not None:
        raise ThinkSwitchError(
            f"{tuned.adapter} has a perception module, which vLLM's adapters leave out; use ENGINE=embedded, or prompt "
            "embeddings as docs/adaptive.md shows."
        )
    key = {
        "student": hashes.of(tuned.student),
        "adapter": hashes.of(tuned.adapter),
        "requests": hashes.of(requests),
        "engine": engine,
        "vllm_args": keys.vllm_args if engine == "vllm" else [],
    }
    hashes.save()

    def work(_resume: bool) -> dict[str, Any]:
        if engine == "embedded":
            set_seed(seed)  # as far as it goes: answers depend on how batches are made up
        report = generate(
            requests,
            out,
            str(tuned.student),
            engine,
            keys,
            adapter=Adapter(tuned.adapter, partial(load_model, *tuned)),
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
