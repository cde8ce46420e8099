"""The keys under `thinkswitch.engine`: how the thinking checkpoint, or a server of the user's own, is asked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError


def option_name(word: str) -> str:
    """The name of a command line's option as vLLM reads it, with hyphens and without a value: `--max-num-seqs`."""
    return word.partition("=")[0].replace("_", "-")


def addresses(engine: str) -> list[str]:
    """The base URLs that `ENGINE=` names, separated by commas; none for an engine that is started here."""
    return engine.split(",") if engine.startswith(("http://", "https://")) else []


def identity(engine: str) -> str:
    """What of `ENGINE=` a run remembers: a server may move, and the recipe names the model that answers."""
    return "server" if addresses(engine) else engine


def option_values(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The name of every option and the word that is its value, if it has one: `--name value` or `--name=value`."""
    for word, after in zip(words, [*words[1:], ""], strict=False):
        yield option_name(word), word.partition("=")[2] or after


# Options of vLLM that affect its speed, but not its answers.
MACHINE_OPTIONS = (
    "--gpu-memory-utilization",
    "--kv-cache-memory-bytes",
    "--tensor-parallel-size",
    "-tp",
    "--pipeline-parallel-size",
    "-pp",
    "--distributed-executor-backend",
    "--api-server-count",
    "-asc",
    "--nnodes",
    "-n",
    "--node-rank",
    "-r",
    "--master-addr",
    "--master-port",
    "--headless",
    "--max-num-seqs",
    "--max-num-batched-tokens",
    "--swap-space",
    "--cpu-offload-gb",
    "--enforce-eager",
)
DATA_PARALLEL = ("--data-parallel-", "-dp")  # how all of vLLM's options for data parallelism begin


# Options of torchrun, of `accelerate launch` and of `axolotl train` that say only where its processes run.
LAUNCH_OPTIONS = re.compile(
    r"--(launcher|nproc-per-node|nnodes|node-rank|master-(addr|port)|local-addr|rdzv-[a-z]+|max-restarts"
    r"|monitor-interval|standalone|run-path|log-dir|tee|redirects|start-method|num-processes|num-machines|machine-rank"
    r"|main-process-(ip|port)|multi-gpu|cpu|num-cpu-threads-per-process|same-network|gpu-ids)"
)


def _without(words: list[str], passed: Callable[[str], bool]) -> list[str]:
    """Options without those whose names are passed over, and their values."""
    kept: list[str] = []
    passing = False
    for word in words:
        if re.match(r"-+[A-Za-z]", word):  # not a value such as -1
            passing = passed(option_name(word))
        if not passing:
            kept.append(word)
    return kept


def learning_options(words: list[str]) -> list[str]:
    """The options of `axolotl train` without those that say only how the machines are used."""
    return [word for word in _without(words, lambda name: bool(LAUNCH_OPTIONS.fullmatch(name))) if word != "--"]


FORMER = {"labels": "answers", "answer": "kind", "embedded": "demo"}  # former names of keys


class Keys(BaseModel):
    """A section of a recipe: a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_no_former_name(cls, values: Any) -> Any:
        for former, now in FORMER.items():
            if isinstance(values, dict) and former in values and now in cls.model_fields:
                raise PydanticCustomError("renamed", f"the key `{former}` is called `{now}` now")
        return values


# The request fields that the loop may send beside `model` and `messages`.
SentField = Literal[
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "seed",
    "stop",
    "stream_options",
    "skip_special_tokens",
    "chat_template_kwargs",
]
_SET_BY = {
    **dict.fromkeys(("temperature", "top_p", "top_k", "max_tokens"), "set it under `thinkswitch.sampling`"),
    "model": "set `thinkswitch.engine.server.model`",
    "stream": "set `thinkswitch.engine.server.stream`",
    "messages": "the prompts are the messages",
    "n": "ask for more by `thinkswitch.sampling.samples`",
    "seed": "it follows from the seed of the run",
    "metadata": "it stays in requests.jsonl",
}


def _may_be_added(name: str) -> str:
    """Refuse a request field that the loop sets itself, or whose value must not be written into files."""
    if re.search(r"api[_-]?key|secret|password|authorization|(?:access|auth|bearer)[_-]?token", name, re.IGNORECASE):
        raise ValueError("a secret would be written into files; give the key as OPENAI_API_KEY in the environment")
    if name in _SET_BY:
        raise ValueError(f"this field cannot be added: {_SET_BY[name]}")
    return name


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Refuse values that a request cannot hold."""
    try:
        json.dumps(values, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("there is a value that JSON does not have; put it in quotes") from None
    return values


MODES = ("instruct", "thinking")
TEMPLATE_KEY = "chat_template_kwargs"  # of the pair, of axolotl's config and of a request to vLLM


class ModeArguments(Keys):
    """Arguments of the chat template in each mode, as in vLLM's requests and axolotl's key of the same name."""

    instruct: dict[str, Any] = Field({}, description="When the prompt is to be answered directly.")
    thinking: dict[str, Any] = Field({}, description="When a trace is to come first.")

    @field_validator("instruct", "thinking")
    @classmethod
    def _of_a_request(cls, values: dict[str, Any]) -> dict[str, Any]:
        if fixed := values.keys() & {"add_generation_prompt", "continue_final_message", "messages", "tokenize"}:
            raise ValueError(f"`{min(fixed)}` is set by the loop; remove it")
        return _as_json(values)


class ServerKeys(Keys):
    """How requests to the user's own server (`ENGINE=` is its address) differ from those to vLLM."""

    model: str | None = Field(
        None,
        min_length=1,
        description="Name under which the server serves the thinking checkpoint, or any other teacher, which then "
        "answers in every iteration (default: the checkpoint's own name).",
    )
    omit: list[SentField] = Field([], description="Request fields to leave out, such as those that the server refuses.")
    rename: dict[SentField, str] = Field(
        {}, description="Request fields to send under another name: `{max_tokens: max_completion_tokens}`."
    )
    add: dict[Annotated[str, AfterValidator(_may_be_added)], Any] = Field(
        {}, description="Request fields to send as well: `{reasoning_effort: high}`. No secrets."
    )
    stream: bool = Field(False, description="Request a stream, for servers that do not answer otherwise.")

    @model_validator(mode="after")
    def _one_value_a_field(self) -> ServerKeys:
        targets = [*self.rename.values(), *self.add]
        for name in targets:
            if targets.count(name) > 1 or name in ("model", "messages", "stream"):
                raise ValueError(f"`rename` and `add` would send `{name}` twice")
        _as_json(self.add)
        return self

    def changing_answers(self) -> dict[str, Any]:
        """The keys that were set and may change what is answered; a stamp remembers them."""
        return self.model_dump(exclude_defaults=True, exclude={"stream"})


class EngineKeys(Keys):
    """How the generation engine is run; which one is `ENGINE=` of the Makefile."""

    concurrency: int = Field(64, gt=0, description="Maximum number of concurrent requests.")
    timeout: float = Field(
        3600,
        gt=0,
        description="Seconds allowed for one answer; then it is requested once more, and after that recorded as failed.",
    )
    attempts: int = Field(
        3,
        gt=0,
        description="Rounds of requests for a prompt (each with three tries and growing pauses if the server refuses or "
        "fails) before it is recorded as failed, with the reason.",
    )
    outage: float = Field(
        600,
        ge=0,
        description="Seconds a server that has answered before may stay away, or answer 429, before the run stops "
        "with its answers kept.",
    )
    rows_per_file: int = Field(
        100_000,
        gt=0,
        description="With more requests than this, an iteration's answers are stored as generations/00000.jsonl, … with so "
        "many each; set it before the answers are generated.",
    )
    start_timeout: float = Field(900, gt=0, description="Seconds allowed for an engine to start.")
    port: int = Field(0, ge=0, le=65535, description="Port of an engine that ThinkSwitch starts; 0 selects a free one.")
    vllm_args: list[str] = Field([], description="Further options for vLLM's server, such as --quantization.")
    server: ServerKeys = ServerKeys()  # type: ignore[call-arg]

    @field_validator("vllm_args")
    @classmethod
    def _known_to_the_stamps(cls, words: list[str]) -> list[str]:
        """Refuse what would take traces out of the answers, or bring options that nobody looked at."""
        for word in words:
            name = option_name(word)
            if name.startswith("--reasoning-p"):
                raise ValueError(
                    "vLLM's reasoning parser would take the trace out of answers that are read whole; leave it out"
                )
            if name == "--config":
                raise ValueError("`--config` would bring options that no stamp sees; write them here one by one")
        return words

    def answering_options(self) -> list[str]:
        """vLLM's options without those that say only how it uses the machine."""
        return _without(self.vllm_args, lambda name: name in MACHINE_OPTIONS or name.startswith(DATA_PARALLEL))
