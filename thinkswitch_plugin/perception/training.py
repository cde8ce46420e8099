"""Train one condition of an adaptive model by axolotl: a student, rows in one or both formats, and what differs; and ask it.

post/axolotl.yaml    the complete config, which plain `axolotl train` runs as it is
post/adapter/        what came of it
post/trained.json    what it depends on, and its seconds; written last
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkswitch_plugin.args import EngineKeys, PerceptionKeys
from thinkswitch_plugin.data.formats import POST, PRE, Format
from thinkswitch_plugin.engine_args import learning_options
from thinkswitch_plugin.engines.ask import Adapter
from thinkswitch_plugin.engines.generate import generate
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.recipe import Recipe, overlay, training_config
from thinkswitch_plugin.run.checkpoint import MODULE, perception_of
from thinkswitch_plugin.run.hashes import Hashes
from thinkswitch_plugin.run.stamp import once
from thinkswitch_plugin.training import distil

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TYPES: dict[Format, str] = {PRE: "thinkswitch_plugin.pre_thinking", POST: "thinkswitch_plugin.post_thinking"}
PLACES = ("base_model", "datasets", "dataset_prepared_path", "output_dir")  # known by content, not by path


@dataclass(frozen=True)
class Condition:
    """One training.

    Attributes:
        student: the checkpoint folder that learns; its tokenizer brings the chat template.
        data: (JSONL file, axolotl dataset type) of every part of the mixture.
        axolotl: keys put on top of the recipe's, such as `num_epochs`, `lora_modules_to_save`, `lr_groups`;
            null takes one away.
        perception: the perception module to train along, None for none.
    """

    student: Path
    data: tuple[tuple[Path, str], ...]
    seed: int
    axolotl: dict[str, Any] = field(default_factory=dict)
    perception: PerceptionKeys | None = None


@dataclass(frozen=True)
class Trained:
    """A student's checkpoint folder and the whole adapter that was trained on it; seconds, now or earlier."""

    student: Path
    adapter: Path
    seconds: float = 0.0
    change: float = 0.0


def train_condition(recipe: Recipe, condition: Condition, here: Path, hashes: Hashes) -> Trained:
    """Train a condition into `here/adapter`, unless that was made of the same recipe, student and rows.

    A training that was killed continues from the trainer's last checkpoint, if the recipe saves any.

    Raises:
        ThinkSwitchError: axolotl fails, or the adapter did not move.
    """
    config = condition_config(recipe, condition, here)
    options = recipe.keys.axolotl_args
    key = {
        "axolotl": {name: value for name, value in config.items() if name not in PLACES},
        "options": learning_options(options),
        "student": hashes.of(condition.student),
        "data": [{**entry, "path": hashes.of(Path(entry["path"]))} for entry in config["datasets"]],
    }
    hashes.save()

    def work(_resumes: bool) -> dict[str, Any]:
        return distil.train(config, here, options=options, minimum=recipe.keys.min_adapter_change)

    adapter = here / "adapter"
    done = once(here / "trained.json", {"key": key}, (adapter, here / "axolotl.yaml"), work)
    return Trained(condition.student, adapter, float(done["seconds"]), float(done["adapter_change"]))


def condition_config(recipe: Recipe, condition: Condition, here: Path) -> dict[str, Any]:
    """The complete axolotl config of a condition.

    Everything but student, rows, seed and the condition's own keys is the recipe's. A perception module
    that the recipe names is left out unless the condition has one.
    """
    values = recipe.axolotl if condition.perception else without_perception(recipe.axolotl)
    options = (values.get("datasets") or [{}])[0]
    config = training_config(
        values,
        base_model=str(condition.student),
        datasets=[{**options, "path": str(path), "ds_type": "json", "type": kind} for path, kind in condition.data],
        here=here,
        seed=condition.seed,
    )
    config["chat_template"] = "tokenizer_default"  # the student's own, whatever the recipe sets for the pair
    # What the plugin itself reads, as in any axolotl recipe.
    keys: dict[str, Any] = {
        "answers": recipe.keys.answers.model_dump(exclude_defaults=True),
        "min_adapter_change": recipe.keys.min_adapter_change,
    }
    if condition.perception is not None:
        keys["perception"] = condition.perception.model_dump(exclude_defaults=True)
    return {**overlay(config, condition.axolotl), "thinkswitch": keys}


def without_perception(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's axolotl keys without what names the perception module."""
    kept = dict(values)
    for name, named in (("lora_modules_to_save", str), ("lr_groups", lambda group: " ".join(group["modules"]))):
        if name in kept:
            rest = [entry for entry in kept.pop(name) or [] if MODULE not in named(entry)]
            kept |= {name: rest} if rest else {}
    return kept


def load_model(student: Path, adapter: Path) -> PreTrainedModel:
    """A student with an adapter on it, in memory and in the student's own precision, ready to generate.

    Args:
        student: the checkpoint folder that the adapter was trained on.
        adapter: a PEFT adapter folder, with a perception module or without.
    """
    if perception_of(adapter) is not None:
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
    if engine != "embedded" and perception_of(adapter) is not None:
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
