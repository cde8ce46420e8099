"""The keys under `thinkswitch:` in a recipe, each with its meaning and default.

axolotl merges `ThinkSwitchArgs` into its own schema, so a plain `axolotl train RECIPE`
checks them too. λ is always the weight of the *thinking* checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, SerializeAsAny, field_validator, model_validator
from pydantic.fields import FieldInfo

from thinkswitch_plugin import conventions
from thinkswitch_plugin.engine_args import TEMPLATE_KEY, Keys, ModeArguments
from thinkswitch_plugin.engine_args import EngineKeys as EngineKeys
from thinkswitch_plugin.engine_args import option_name as option_name
from thinkswitch_plugin.evaluation_args import EvaluationKeys as EvaluationKeys
from thinkswitch_plugin.loss_args import AnswerKeys as AnswerKeys
from thinkswitch_plugin.loss_args import DistributionKeys


class PairKeys(Keys):
    """The compatible pair that a run starts from."""

    instruct: str = Field(description="Hub id or folder of the checkpoint that answers directly; `{seed}` is replaced.")
    thinking: str = Field(description="Hub id or folder of the checkpoint that writes a trace; `{seed}` is replaced.")
    base: str | None = Field(
        None, description="Their common ancestor: `./base` of merge configs; only baselines such as TIES need it."
    )
    revision_instruct: str | None = Field(None, description="Hub commit or tag to pin.")
    revision_thinking: str | None = Field(None, description="Hub commit or tag to pin.")
    demo: bool | str = Field(
        False,
        description="Make a demo pair at these two paths first: true is the tiny pair of digits; or a function "
        "`package.module:function`, called with these keys and the seed.",
    )
    chat_template_kwargs: ModeArguments = ModeArguments()  # type: ignore[call-arg]

    @property
    def hybrid(self) -> bool:
        """Whether one checkpoint has both modes."""
        return (self.instruct, self.revision_instruct) == (self.thinking, self.revision_thinking)

    def arguments(self, mode: str) -> dict[str, Any]:
        """The arguments of the chat template in a mode."""
        return dict(getattr(self.chat_template_kwargs, mode))

    def asked_with(self, mode: str) -> dict[str, Any]:
        """The same under the name of the key, as stamps hold them; nothing if there are none."""
        return {TEMPLATE_KEY: given} if (given := self.arguments(mode)) else {}

    @model_validator(mode="after")
    def _two_modes(self) -> PairKeys:
        given = self.chat_template_kwargs
        if self.hybrid and given.instruct and given.instruct == given.thinking:
            raise ValueError("`chat_template_kwargs` are the same for both modes; give each mode its own")
        return self


class PromptKeys(Keys):
    """Where the task prompts come from: the only human input of the method."""

    path: str | None = Field(None, description="JSONL, CSV or Parquet file, a row a prompt; `{seed}` is replaced.")
    hub: str | None = Field(None, description="Hub dataset id, instead of `path`.")
    config: str | None = Field(None, description="Configuration name of the hub dataset.")
    split: str = Field("train", description="Split of the hub dataset.")
    revision: str | None = Field(None, description="Hub commit or tag of the dataset to pin.")
    outside: str | None = Field(
        None,
        description="lm-eval task whose questions are left out of the prompts, by the same test as `contamination_ngram`.",
    )
    id: str = Field("id", description="Field with the id of a row; the row's number where it has none.")
    template: str = Field(
        "{{prompt}}",
        description="The user turn: a Jinja template over the fields of a row, like lm-eval's doc_to_text.",
    )
    system: str | None = Field(None, description="System turn, if any.")
    count: int = Field(15, gt=0, description="Prompts an iteration.")
    shuffle: bool = Field(False, description="Draw the prompts in an order given by the run's seed.")
    fresh: bool = Field(False, description="Take the next `count` prompts in every iteration instead of the same ones.")

    @model_validator(mode="after")
    def _one_source(self) -> PromptKeys:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either `path` (a file) or `hub` (a dataset id)")
        return self


class SamplingKeys(Keys):
    """How the thinking checkpoint is sampled."""

    samples: int = Field(1, gt=0, description="Completions a prompt (k).")
    temperature: float = Field(0.6, ge=0, description="0 is greedy.")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus sampling.")
    top_k: int = Field(20, description="-1 or 0: off.")
    max_tokens: int = Field(32768, gt=0, description="Token budget of one completion, trace included.")


class NeedKeys(Keys):
    """What a run takes at least; checked before anything is downloaded."""

    gpu_gb: float = Field(0, ge=0, description="Memory of one CUDA GPU; 0 runs on a CPU.")
    disk_gb: float = Field(1, ge=0, description="Free disk for the pair and two iterations.")
    ram_gb: float = Field(2, ge=0, description="Main memory, which a merge in full precision takes.")


class RebuildKeys(Keys):
    """How the new thinking checkpoint is interpolated."""

    config: str = Field(
        "merge_configs/slerp.yaml", description="mergekit YAML with models named `./instruct` and `./thinking`."
    )
    lambda_: float = Field(0.8, alias="lambda", description="Weight of the thinking checkpoint.")
    lambda_steps: list[float] = Field(
        [0.9, 0.95, 0.98],
        description="Tried in turn (those above λ) while the rebuilt checkpoint thinks too rarely; [] keeps λ fixed.",
    )
    anchor: Literal["original", "previous"] = Field(
        "original",
        description="Which thinking checkpoint is interpolated with: the one the run started from, or the last one.",
    )
    min_think_ratio: float = Field(
        0.98,
        ge=0,
        le=1,
        description="Share of the original's think ratio that a rebuilt checkpoint must keep; 0 accepts any.",
    )
    may_differ: dict[str, Literal["instruct", "thinking"]] = Field(
        {},
        description="Settings of config.json that may differ between the two, and whose value the rebuilt checkpoint has; see docs/models.md.",
    )
    check_prompts: int = Field(
        64, gt=0, description="Requests (at most) on which the rebuilt checkpoint's think ratio is measured."
    )


class PerceptionKeys(Keys):
    """The perception module: a soft prompt computed from the question; see docs/adaptive.md."""

    tokens: int = Field(4, gt=0, description="Soft-prompt tokens: as many placeholders as the chat template renders.")
    queries: int = Field(4, gt=0, description="Learnable queries over the question's token embeddings.")
    heads: int = Field(
        4, gt=0, description="Attention heads of the queries; they divide its width (hidden size, at most 256)."
    )
    features: list[Literal["words", "readability", "dependency_distance"]] = Field(
        ["words"], description="Further features of the question's text."
    )
    cross_attention: bool = Field(True, description="false: the queries are left out; only the features are read.")
    static: bool = Field(False, description="One learnt prompt for every question (a control).")

    @model_validator(mode="after")
    def _something_to_read(self) -> PerceptionKeys:
        if not (self.static or self.cross_attention or self.features):
            raise ValueError("nothing of the question is read; name `features`, or set `static: true`")
        return self


class AdaptiveKeys(Keys):
    """The adaptive model and its complexity labels; see docs/adaptive.md."""

    student: str | None = Field(
        None, description="Checkpoint that learns (default: `pair.instruct`); `{seed}` is replaced."
    )
    generations: str | None = Field(
        None, description="Rationales: a generations.jsonl (default: the run's iter-1); `{seed}` is replaced."
    )
    gold: str | None = Field(
        None, description="Prompt field with the right answer (default: the majority of the thinking checkpoint's)."
    )
    folds: int = Field(5, ge=2, description="Folds of the cross-validation behind the labels.")
    samples: int = Field(
        1, gt=0, description="Answers of a baseline to each question: 1 is greedy, more are drawn at temperature 1."
    )
    certainty: float = Field(
        0.5, gt=0, le=1, description="Share of a baseline's answers that must be right for it to count as right."
    )


class PluginKeys(Keys):
    """The keys that the plugin itself reads: all that a plain axolotl recipe needs."""

    answers: AnswerKeys = AnswerKeys()  # type: ignore[call-arg]
    trace: str | dict[str, str] = Field(
        "auto",
        description="How the thinking checkpoint writes its trace: `auto` (by its chat template, else any convention "
        "of the table in docs/how-it-works.md), a convention's name, `none` (it answers directly), or "
        "`{open: …, close: …}`.",
    )
    perception: PerceptionKeys | None = Field(None, description="Give the model a perception module.")
    min_adapter_change: float = Field(
        1e-4, ge=0, description="An adapter that moved less than this (median ‖s·B·A‖/‖A‖) learnt nothing: an error."
    )

    @field_validator("trace", mode="before")
    @classmethod
    def _is_a_convention(cls, value: Any) -> Any:
        if fault := conventions.fault(value, "the value"):
            raise ValueError(fault)
        return value

    @property
    def convention(self) -> conventions.Convention | None:
        """The convention that `trace` names, None for `auto`."""
        return conventions.from_key(self.trace)


class ThinkSwitchKeys(PluginKeys):
    """Everything under `thinkswitch:`."""

    domain: str = Field(min_length=1, description="Name of the domain, the same as the recipe's file name.")
    needs: NeedKeys = NeedKeys()  # type: ignore[call-arg]
    pair: PairKeys
    prompts: PromptKeys
    sampling: SamplingKeys = SamplingKeys()  # type: ignore[call-arg]
    engine: EngineKeys = EngineKeys()  # type: ignore[call-arg]
    rebuild: RebuildKeys = RebuildKeys()  # type: ignore[call-arg]
    evaluation: EvaluationKeys
    adaptive: AdaptiveKeys = AdaptiveKeys()  # type: ignore[call-arg]
    loss: Literal["answers", "distribution"] = Field(
        "answers", description="Learn the answers, or the thinking checkpoint's distribution over each of their tokens."
    )
    distribution: DistributionKeys = DistributionKeys()  # type: ignore[call-arg]
    axolotl_args: list[str] = Field([], description="Further options for `axolotl train`, such as its launcher's.")
    merge_on: Literal["auto", "cpu"] = Field(
        "auto", description="Device on which the adapter is merged; `cpu` uses no GPU memory."
    )

    @property
    def longest_answer(self) -> int:
        """The largest token budget that the recipe gives a completion, second tries included."""
        return max(self.evaluation.max_tokens or 0, self.sampling.max_tokens, self.retry_budget or 0)

    @property
    def retry_budget(self) -> int | None:
        """Token budget of the second try for a cut completion; None if there is none."""
        if self.answers.unfinished == "drop":
            return None
        return self.answers.retry_max_tokens or 2 * self.sampling.max_tokens

    @model_validator(mode="after")
    def _distributions_are_returned(self) -> ThinkSwitchKeys:
        if self.loss == "distribution" and (fault := self.distribution.fault(self.engine)):
            raise ValueError(fault)
        return self


class ThinkSwitchArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    thinkswitch: SerializeAsAny[PluginKeys] | None = Field(None, description="Keys of the ThinkSwitch loop.")

    @field_validator("thinkswitch", mode="before")
    @classmethod
    def _whose_keys(cls, value: Any) -> Any:
        """A recipe with keys of the loop describes a domain, and must then be complete."""
        loop = ThinkSwitchKeys.model_fields.keys() - PluginKeys.model_fields.keys()
        return ThinkSwitchKeys.model_validate(value) if isinstance(value, dict) and loop & value.keys() else value


def keys_of(field: FieldInfo) -> type[BaseModel] | None:
    """The keys inside a section; None for a key that holds a value."""
    kinds = get_args(field.annotation) or (field.annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def resolve_seed(path: str, seed: int) -> str:
    """Replace `{seed}` in a path or hub id of a recipe."""
    return path.replace("{seed}", str(seed))


def is_local(checkpoint: str) -> bool:
    """Whether a checkpoint name is a folder (existing, or written like a path), not a hub id."""
    return Path(checkpoint).is_dir() or checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") > 1
