"""One trained condition of the adaptive experiment: its evaluations, the merged checkpoint, and vLLM's answers."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.adaptive_scoring import judge, read_columns
from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import PerceptionKeys
from thinkswitch_plugin.data.task_files import task_files
from thinkswitch_plugin.environment import has_cuda
from thinkswitch_plugin.judging.samples import read_rows, samples_file
from thinkswitch_plugin.loop.work import merge_adapter
from thinkswitch_plugin.perception.label_job import LabelJob
from thinkswitch_plugin.perception.labels import prepare_student
from thinkswitch_plugin.perception.training import load_model
from thinkswitch_plugin.run.hashes import Hashes
from thinkswitch_plugin.run.stamp import once

if TYPE_CHECKING:
    from torch import Tensor


def perception_keys(job: LabelJob) -> PerceptionKeys:
    """The module's keys: the recipe's, or their defaults."""
    return job.recipe.keys.perception or PerceptionKeys()  # type: ignore[call-arg]


class Evaluations:
    """Evaluations of one trained condition; the model is loaded once, and only if one of them is missing."""

    def __init__(self, job: LabelJob, here: Path, student: Path, adapter: Path, hashes: Hashes) -> None:
        self.job, self.here, self.student, self.adapter = job, here, student, adapter
        self.evaluation = job.recipe.keys.evaluation
        self.key = {
            "adapter": hashes.of(adapter),
            "student": hashes.of(student),
            "evaluation": self.evaluation.model_dump(),
            "task": {str(path): hashes.of(path) for path in task_files(self.evaluation.task)},
        }
        self.seconds = 0.0
        self.loaded: Any = None

    def model(self) -> tuple[Any, Any]:
        """The student with its adapter in full precision, and the tokenizer."""
        if self.loaded is None:
            model: Any = load_model(self.student, self.adapter).eval()
            self.loaded = model.to("cuda" if has_cuda() else "cpu")
        return self.loaded, self.tokenizer

    @cached_property
    def tokenizer(self) -> Any:
        """The student's."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.student, padding_side="left")

    def release(self) -> None:
        """Give the model's memory back, before axolotl or vLLM takes the GPU."""
        from thinkswitch_plugin.engines.embedded import free_memory

        self.loaded = None
        free_memory()

    def questions(self, name: str, *, prefix: str = "", swapped: bool = False) -> dict[str, Any]:
        """One evaluation, kept in the folder `name`: what became of every question, column by column.

        Args:
            prefix: what every answer is made to begin with.
            swapped: give every question the soft prompt of another one; `eval` has to be there.
        """
        out = self.here / name
        key = {**self.key, "prefix": prefix, "swapped": "drawn at random" if swapped else False}

        def work(_resume: bool) -> dict[str, Any]:
            model, tokenizer = self.model()
            within = None
            if swapped:
                from experiments.soft_prompts import prompts_of_others, replaced_prompts

                within = replaced_prompts(model, prompts_of_others(self.soft_prompts(), self.job.seed))
            log = self.here / "logs" / "lm_eval.log"
            judge(model, tokenizer, out, self.evaluation, log=log, prefix=prefix, within=within)
            return {}

        self.seconds += once(self.here / f"{name}.json", {"key": key}, (out,), work)["seconds"]
        return read_columns(out, self.evaluation, self.tokenizer, self.job.recipe.keys.answers.kind, prefix)

    def soft_prompts(self) -> Tensor:
        """The soft prompts of the held-out questions, (questions, tokens, hidden), as `eval` asked them."""
        import torch

        from experiments.soft_prompts import soft_prompts

        model, tokenizer = self.model()
        found = []
        for row in read_rows(samples_file(self.here / "eval", self.evaluation.task)):
            ids = tokenizer(row.sent, return_tensors="pt", add_special_tokens=False)["input_ids"]
            found.append(soft_prompts(model, ids.to(model.device)).float())
        return torch.cat(found)

    def prompts(self) -> dict[str, float]:
        """How much the soft prompts differ between the held-out questions, and how large they are."""

        def work(_resume: bool) -> dict[str, Any]:
            found, (model, _) = self.soft_prompts(), self.model()
            return {
                "prompt_std": float(found.std(dim=0).mean()),
                "prompt_rms": float(found.square().mean().sqrt()),
                "embedding_rms": float(model.get_input_embeddings().weight.float().square().mean().sqrt()),
            }

        done = once(self.here / "prompts.json", {"key": self.key}, (), work)
        return {name: done[name] for name in ("prompt_std", "prompt_rms", "embedding_rms")}


def merge_checkpoint(job: LabelJob, hashes: Hashes) -> None:
    """axolotl merges the adaptive adapter, perception module and all, in full precision: writes `checkpoint/`."""
    here, out = job.work / "conditions" / "adaptive", job.work / "checkpoint"
    student, _ = prepare_student(job, hashes, soft_tokens=perception_keys(job).tokens)

    def work(_resume: bool) -> dict[str, Any]:
        merge_adapter(here, str(student), out, on_cpu=job.recipe.keys.merge_on == "cpu")
        return {}

    key = {"adapter": hashes.of(here / "adapter"), "student": hashes.of(student)}
    once(out.with_suffix(".json"), {"key": key}, (out,), work)


def serve_checkpoint(job: LabelJob, hashes: Hashes) -> dict[str, int]:
    """Have vLLM answer the held-out questions, sent as embeddings, and compare with what lm-eval got.

    Returns:
        `questions`, and `equal`: those whose text is the same to the letter.
    """
    checkpoint, keys = job.work / "checkpoint", job.recipe.keys
    samples = samples_file(job.work / "conditions/adaptive/eval", keys.evaluation.task)

    def work(_resume: bool) -> dict[str, Any]:
        import torch
        from transformers import AutoTokenizer

        from experiments.prompt_embeds import complete, serving, write_plain_view
        from thinkswitch_plugin.perception.model import load, prompt_embeds

        console.say(f"[adaptive] seed {job.seed}: vLLM answers prompts sent as embeddings")
        rows = list(read_rows(samples))
        model, tokenizer = load(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
        ids = [tokenizer(row.sent, add_special_tokens=False)["input_ids"] for row in rows]
        with torch.inference_mode():
            prompts = [prompt_embeds(model, tokens) for tokens in ids]
        del model  # vLLM loads the weights again
        view, budget = job.work / "plain-view", rows[0].budget
        write_plain_view(checkpoint, view)
        longest = max(map(len, ids)) + budget
        with serving(view, keys.engine, job.work / "logs" / "vllm.log", max_len=longest) as server:
            found = complete(
                server, str(view), prompts, keys.engine, max_tokens=budget, stop=rows[0].settings.get("until") or ()
            )
        files.remove(view)
        equal = sum(one.text == row.texts[0] for one, row in zip(found, rows, strict=True))
        return {"questions": len(rows), "equal": equal}

    key = {"checkpoint": hashes.of(checkpoint), "samples": hashes.of(samples)}
    done = once(job.work / "served.json", {"key": key}, (), work)
    return {name: int(done[name]) for name in ("questions", "equal")}
