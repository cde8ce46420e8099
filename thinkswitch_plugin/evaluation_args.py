"""The keys under `thinkswitch.evaluation` in a recipe: the task of the domain, and the guard tasks outside it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from thinkswitch_plugin.engine_args import Keys

OF_GUARD = {"guard", "guard_limit", "guard_margin"}
REFERENCE_SAMPLES = 8  # answers of the thinking checkpoint to a question without a gold answer


class EvaluationKeys(Keys):
    """How both checkpoints are evaluated."""

    task: str = Field(description="lm-eval task name.")
    limit: int | None = Field(None, gt=0, description="Use only the first N questions.")
    guard: list[str] = Field(
        [],
        description="Further lm-eval tasks, outside the domain, on which both checkpoints are compared with iteration 0; see docs/grading.md.",
    )
    guard_limit: int | None = Field(None, gt=0, description="Use only the first N questions of each guard task.")
    guard_margin: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Stop if a guard task falls by more than this: the whole 95 % interval of the difference is below −margin (0.05 is 5 points).",
    )
    batch_size: str = Field(
        "auto",
        description="How many questions are answered together in process: a number, or `auto` for `engine.concurrency`. What a GPU's memory does not hold is answered in halves.",
    )
    backend: Literal["auto", "hf", "server"] = Field(
        "auto", description="hf: in process by transformers; server: through vLLM; auto: server if the engine is vLLM."
    )
    max_tokens: int | None = Field(None, gt=0, description="Token budget of an answer (default: the task's own).")
    contamination_ngram: int = Field(
        13, gt=0, description="A training prompt must share no run of so many words with an evaluation question."
    )
    contamination_share: float = Field(
        0.2, gt=0, le=1, description="…unless the shared runs are less than this share of the shorter text."
    )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The task of the domain, then the guard tasks."""
        return self.task, *self.guard

    @model_validator(mode="after")
    def _guards_are_other_tasks(self) -> EvaluationKeys:
        if twice := next((name for name in self.guard if self.tasks.count(name) > 1), None):
            raise ValueError(f"`guard` names {twice}, which is evaluated already; name each task once")
        if not self.guard and (self.guard_limit is not None or self.guard_margin is not None):
            raise ValueError("`guard_limit` and `guard_margin` need `guard`, a list of lm-eval tasks")
        return self

    def changing_figures(self) -> dict[str, Any]:
        """The keys that may change what an evaluation of the domain's task finds; stamps remember them."""
        return self.model_dump(exclude={"contamination_ngram", "contamination_share", *OF_GUARD})

    def changing_guard(self) -> dict[str, Any]:
        """The same of the guard tasks, where there are any."""
        return {"guard": [self.guard, self.guard_limit]} if self.guard else {}
