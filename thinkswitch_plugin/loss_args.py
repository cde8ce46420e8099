"""The keys under `thinkswitch.answers` and `thinkswitch.distribution`: which answers are learnt, and what of them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from thinkswitch_plugin.answer_kinds import KINDS
from thinkswitch_plugin.engine_args import EngineKeys, Keys, option_values

MOST_TOKENS = 20  # that vLLM, unless it is told otherwise, and hosted endpoints return for a token
KD_PLUGIN = "axolotl.integrations.kd.KDPlugin"


class AnswerKeys(Keys):
    """Which completions become training pairs."""

    selection: Literal["first", "all", "vote"] = Field(
        "first", description="First complete sample, all of them, or one that gives the majority answer."
    )
    min_agreement: float | None = Field(
        None,
        gt=0,
        le=1,
        description="With `vote`: drop a prompt if a smaller share of its complete samples gives the majority answer.",
    )
    kind: Literal[tuple(KINDS)] = Field(  # type: ignore[valid-type]
        "exact", description="How a final answer is read, for `vote` and for grading; see docs/grading.md."
    )
    unfinished: Literal["drop", "retry"] = Field(
        "drop", description="A completion cut by the token limit: drop it, or ask once more with `retry_max_tokens`."
    )
    retry_max_tokens: int | None = Field(None, gt=0, description="Budget of the second try (default: twice the first).")

    @model_validator(mode="after")
    def _agreement_is_of_a_vote(self) -> AnswerKeys:
        if self.min_agreement is not None and self.selection != "vote":
            raise ValueError("`min_agreement` needs `selection: vote`; set that, or remove `min_agreement`")
        return self

    def selecting(self) -> dict[str, Any]:
        """The keys that select pairs, as `build_pairs` takes them and stamps hold them; `min_agreement` only if it is set."""
        agreement = {} if self.min_agreement is None else {"min_agreement": self.min_agreement}
        return {"selection": self.selection, **agreement}


class DistributionKeys(Keys):
    """What `loss: distribution` asks for, and how axolotl's KD trainer learns it."""

    top_k: int = Field(
        MOST_TOKENS,
        gt=0,
        description="Most likely tokens that are kept for each token of an answer; see docs/recipes.md.",
    )
    temperature: float = Field(
        1.0, gt=0, description="Both distributions are softened by this; axolotl's `kd_temperature`."
    )
    beta: float = Field(
        0.0,
        ge=0,
        le=1,
        description="0 is KL(thinking ‖ instruct), 1 the reverse, between them a Jensen-Shannon divergence; axolotl's `kd_beta`.",
    )
    cross_entropy: float = Field(
        0.0, ge=0, lt=1, description="Share of the loss that is cross-entropy with the answer's own tokens."
    )

    def axolotl(self, plugins: list[str] | None) -> dict[str, Any]:
        """The keys of axolotl's config that have its KD plugin train, beside the plugins of the recipe."""
        return {
            "plugins": [*(name for name in plugins or [] if name != KD_PLUGIN), KD_PLUGIN],
            "kd_trainer": True,
            "kd_alpha": 1 - self.cross_entropy,
            "kd_ce_alpha": self.cross_entropy,
            "kd_temperature": self.temperature,
            "kd_beta": self.beta,
        }

    def fault(self, engine: EngineKeys) -> str | None:
        """Why an engine would not return these distributions, None if it would."""
        raised = [value for name, value in option_values(engine.vllm_args) if name == "--max-logprobs"]
        most = int(raised[-1]) if raised and raised[-1].lstrip("-").isdigit() else MOST_TOKENS
        if most != -1 and self.top_k > most:
            return (
                f"`distribution.top_k: {self.top_k}` is more than vLLM returns ({most}; hosted endpoints return at most "
                f'{MOST_TOKENS}); lower it, or set `engine.vllm_args: [--max-logprobs, "{self.top_k}"]`'
            )
        if engine.server.stream:
            return "`loss: distribution` needs whole completions; remove `engine.server.stream`"
        return None
