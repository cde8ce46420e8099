"""What the axolotl dataset types `answer_only`, `pre_thinking` and `post_thinking` share.

A file of pairs is used as it is. A `generations.jsonl` (vLLM's batch output, with the `requests.jsonl` it
answers beside it) is turned into the same pairs by the same function, as `thinkswitch.answers` of the recipe
says. Rendering and labels are axolotl's own `chat_template`: only the assistant's turn and its end token
carry a loss.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl.loaders import load_tokenizer
from axolotl.prompt_strategies.chat_template import load as load_chat_template
from axolotl.prompt_tokenizers import DatasetWrappingStrategy
from axolotl.utils.data.wrappers import wrap_dataset_for_tokenized_prompt  # 0.21 cannot import axolotl.datasets first
from axolotl.utils.dict import DictDefault
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import get_temporary_cache_files_directory

from thinkswitch_plugin import conventions
from thinkswitch_plugin.args import AnswerKeys
from thinkswitch_plugin.data import formats, pairs, traces
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.training.contract import require_contract
from thinkswitch_plugin.training.targets import FEATURE, WithTargets, require_targets

# The loss as axolotl names it: keys of a dataset, then those of the whole config.
TRAINED = {"roles_to_train": ["assistant"], "train_on_eos": "turn", "train_on_eot": "turn"}
TRAINED_OF_ALL = {"train_on_inputs": False}
TURNS = [{"role": Value("string"), "content": Value("string")}]


def require_template(values: dict[str, Any], checkpoint: str, system: str | None) -> None:
    """Prove the contract of `answer_only` for a recipe and the checkpoint that learns, before there is any pair.

    Args:
        values: the recipe's axolotl keys.
        system: the system turn of the requests, if any.

    Raises:
        ThinkSwitchError: the checkpoint has no chat template, or see `contract.require_contract`.
    """
    places = dict.fromkeys(("base_model", "base_model_config", "tokenizer_config"), checkpoint)
    cfg = DictDefault({**values, **places})
    tokenizer = load_tokenizer(cfg)
    if not tokenizer.chat_template and cfg.chat_template in (None, "tokenizer_default"):
        raise ThinkSwitchError(f"The tokenizer of {checkpoint} has no chat template; give it a `chat_template.jinja`.")
    datasets = values.get("datasets") or [{}]
    turns = [{"role": "user", "content": "What is 2+3?"}, {"role": "assistant", "content": "5"}]
    first = [{"role": "system", "content": system}] if system else []
    require_contract(strategy(tokenizer, cfg, datasets[0], form=None).chat_template, tokenizer, [*first, *turns], None)


def strategy(tokenizer: Any, cfg: Any, ds_cfg: Any, *, form: formats.Format | None) -> Completions:
    """The strategy that turns the rows of one dataset into token ids and labels.

    Args:
        tokenizer, cfg, ds_cfg: what axolotl gives to the `load` of a dataset type.
        form: how trace and answer are written; None leaves the trace away.

    Raises:
        ThinkSwitchError: the dataset asks for another loss.
    """
    options = dict(ds_cfg) if isinstance(ds_cfg, dict) else ds_cfg.model_dump()
    given = {key: cfg.get(key) for key in TRAINED_OF_ALL} | {key: options.get(key) for key in TRAINED}
    for key, value in (TRAINED | TRAINED_OF_ALL).items():
        if given[key] not in (None, value):
            raise ThinkSwitchError(
                f"{options.get('path')}: `{key}: {given[key]}` asks for another loss than this dataset type has, which is on "
                "the assistant's turn and its end token; leave the key out, or use axolotl's own `chat_template`."
            )
    options |= TRAINED
    if form:
        options["split_thinking"] = False  # it would hand the trace to the template, which may leave it away
    keys = cfg.get("thinkswitch") or {}
    selecting = AnswerKeys.model_validate(keys.get("answers") or {})
    trace = keys.get("trace") or "auto"
    if fault := conventions.fault(trace, "`thinkswitch.trace`"):
        raise ThinkSwitchError(f"{fault}.")
    if cfg.get("kd_trainer") and form:
        raise ThinkSwitchError(
            f"{options.get('path')}: {form}_thinking also trains the trace, which no distributions are kept of; "
            "leave out `kd_trainer`, or use answer_only."
        )
    chat_template = load_chat_template(tokenizer, cfg, options)
    temperature = float(cfg.get("kd_temperature") or 1.0) if cfg.get("kd_trainer") else None
    convention = conventions.from_key(trace)
    return Completions(chat_template, tokenizer, str(options.get("path")), selecting, convention, form, temperature)


@dataclass(eq=False)
class Completions(DatasetWrappingStrategy):  # type: ignore[misc]
    """Pairs, their completions written in one format, tokenized by axolotl's chat-template strategy.

    Args:
        temperature: of axolotl's KD trainer, which learns the `logprobs` of the pairs; None for any other trainer.
    """

    chat_template: Any
    tokenizer: Any
    path: str
    keys: AnswerKeys
    convention: conventions.Convention | None
    form: formats.Format | None
    temperature: float | None = None

    def wrap_dataset(
        self, dataset: Dataset, process_count: int | None = None, keep_in_memory: bool | None = False, **kwargs: Any
    ) -> Any:
        """Token ids and labels of every pair.

        Raises `ThinkSwitchError` where a row is no pair, a tag stands where it would be misread, a trace is
        needed and missing, or the chat template would train something else than is asked for; see `contract`.
        """
        columns = ["messages", *(["trace"] if self.form else ["logprobs"] if self.temperature else [])]
        if {"custom_id", "response"} <= set(dataset.column_names):
            dataset = self._from_generations()
        elif "messages" not in dataset.column_names:
            raise ThinkSwitchError(
                f"{self.path}: rows have neither `messages` ({'rationales' if self.form else 'pairs'}.jsonl) "
                "nor `custom_id` and `response` (generations.jsonl)."
            )
        elif self.form and "trace" not in dataset.column_names:
            raise ThinkSwitchError(
                f"{self.path}: rows have no `trace`, which {self.form}_thinking writes; "
                "use rationales.jsonl or generations.jsonl (pairs.jsonl has its traces removed)."
            )
        dataset = dataset.select_columns([name for name in columns if name in dataset.column_names])
        for number, row in enumerate(dataset, 1):
            self._check(row, f"{self.path}, pair {number}")
        if self.form:
            # Never from a cache: its key does not know the rules by which `formats` writes.
            dataset = dataset.map(
                self._render, remove_columns=["trace"], keep_in_memory=keep_in_memory, load_from_cache_file=False
            )
        if len(dataset):
            require_contract(self.chat_template, self.tokenizer, dataset[0]["messages"], self.form)
        tokenizing = WithTargets(self.chat_template, self.temperature) if self.temperature else self.chat_template
        return wrap_dataset_for_tokenized_prompt(
            tokenizing, dataset, process_count=process_count, keep_in_memory=keep_in_memory, **kwargs
        )

    def _check(self, row: dict[str, Any], where: str) -> None:
        """Raise `ThinkSwitchError` if a row is no pair, or holds a tag that would be misread."""
        _check_pair(row["messages"], where)
        answer = row["messages"][-1]["content"]
        if self.form:
            _check_trace(row["trace"], answer, where)
        elif tag := traces.wrapper_mark(answer):
            raise ThinkSwitchError(f"{where}: the answer holds {tag!r}, which is a tag around an answer; remove it.")
        if self.temperature:
            require_targets(row, self.tokenizer, where)

    def _render(self, row: dict[str, Any]) -> dict[str, Any]:
        assert self.form is not None
        *turns, last = row["messages"]
        return {"messages": [*turns, {**last, "content": formats.render(self.form, row["trace"], last["content"])}]}

    def _from_generations(self) -> Dataset:
        generations = Path(self.path)
        report = pairs.PairReport()
        more = {"trace": Value("string")} if self.form else {"logprobs": FEATURE} if self.temperature else {}
        features: dict[str, Any] = {"messages": TURNS, **more}

        def rows() -> Iterator[dict[str, Any]]:
            for row in pairs.build_pairs(
                generations.with_name("requests.jsonl"),
                generations,
                keys=self.keys,
                keep_trace=self.form is not None,
                convention=self.convention,
                report=report,
            ):
                yield {name: row.get(name) for name in features}

        try:
            # Through a file that lives as long as this process, so that no trace waits in memory; in a folder of
            # its own, since the key of a cache knows nothing of what is in `generations`.
            folder = tempfile.mkdtemp(dir=get_temporary_cache_files_directory())
            return Dataset.from_generator(rows, features=Features(features), cache_dir=folder)
        except DatasetGenerationError as error:
            raise (error.__cause__ if isinstance(error.__cause__, ThinkSwitchError) else error) from None
        except ValueError:
            if report.kept:
                raise
            raise ThinkSwitchError(
                f"{generations} holds no complete answer: {report.summary()}; raise `thinkswitch.sampling.max_tokens` in the recipe."
            ) from None


def _check_pair(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ThinkSwitchError(f"{where}: `messages` must be a list of messages; repair or delete the line.")
    for place, message in enumerate(messages):
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise ThinkSwitchError(
                    f"{where}: `messages[{place}].{name}` is missing or not text; repair or delete the line."
                )
        if message["role"] == "assistant" and (tag := traces.trace_mark(message["content"])):
            raise ThinkSwitchError(f"{where}: a trace tag is left in the answer, {tag!r}; build the pairs again.")
        if token := traces.control_token(message["content"]) or traces.end_mark(message["content"]):
            raise ThinkSwitchError(
                f"{where}: `messages[{place}]` holds {token!r}, which would end its turn; remove it."
            )
    if not messages or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise ThinkSwitchError(f"{where}: the last message must be an assistant's answer; repair or delete the line.")


def _check_trace(trace: Any, answer: str, where: str) -> None:
    if trace is not None and not isinstance(trace, str):
        raise ThinkSwitchError(f"{where}: `trace` is not text; repair or delete the line.")
    if problem := formats.fault(trace, answer):
        raise ThinkSwitchError(f"{where}: {problem}; repair or delete the line.")
    if token := traces.control_token(trace or ""):
        raise ThinkSwitchError(f"{where}: the trace holds {token!r}, which would end its turn; remove it.")
