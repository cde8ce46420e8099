"""The axolotl dataset type `thinkswitch_plugin.answer_only`.

In a recipe:

    datasets:
      - path: runs/arithmetic/iter-1/pairs.jsonl     # or .../generations.jsonl
        ds_type: json
        type: thinkswitch_plugin.answer_only

A `pairs.jsonl` is used as it is. A `generations.jsonl` (vLLM's batch output, with the
`requests.jsonl` it answers beside it) is turned into the same pairs by the same
function, traces removed, as `thinkswitch.labels` of the recipe says. Rendering and labels are axolotl's own `chat_template`:
only the assistant's answer and its end token carry a loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.datasets import wrap_dataset_for_tokenized_prompt
from axolotl.prompt_strategies.chat_template import load as load_chat_template
from axolotl.prompt_tokenizers import DatasetWrappingStrategy
from datasets import Dataset

from thinkswitch_plugin import pairs, traces
from thinkswitch_plugin.args import LabelKeys
from thinkswitch_plugin.errors import ThinkSwitchError


def load(tokenizer: Any, cfg: Any, ds_cfg: Any = None) -> AnswerOnly:
    """axolotl's entry: the strategy that turns the rows of one dataset into token ids and labels."""
    options = ds_cfg if isinstance(ds_cfg, dict) else ds_cfg.model_dump()
    options = {**options, "roles_to_train": ["assistant"], "train_on_eos": "turn"}
    labels = LabelKeys.model_validate((cfg.get("thinkswitch") or {}).get("labels") or {})
    return AnswerOnly(load_chat_template(tokenizer, cfg, options), str(options.get("path")), labels)


class AnswerOnly(DatasetWrappingStrategy):  # type: ignore[misc]
    """Answer-only pairs, tokenized by axolotl's chat-template strategy."""

    def __init__(self, chat_template: Any, path: str, labels: LabelKeys) -> None:
        self.chat_template = chat_template
        self.path = path
        self.labels = labels

    def wrap_dataset(
        self, dataset: Dataset, process_count: int | None = None, keep_in_memory: bool | None = False, **kwargs: Any
    ) -> Any:
        """Token ids and labels of every pair.

        Raises `ThinkSwitchError` where a row is no pair, or a trace tag is left in an answer.
        """
        if "custom_id" in dataset.column_names and "response" in dataset.column_names:
            dataset = self._from_generations()
        elif "messages" not in dataset.column_names:
            raise ThinkSwitchError(
                f"{self.path}: rows have neither `messages` (pairs.jsonl) "
                "nor `custom_id` and `response` (generations.jsonl)."
            )
        dataset = dataset.select_columns(["messages"])
        for number, row in enumerate(dataset, 1):
            _check_pair(row["messages"], f"{self.path}, pair {number}")
        return wrap_dataset_for_tokenized_prompt(
            self.chat_template, dataset, process_count=process_count, keep_in_memory=keep_in_memory, **kwargs
        )

    def _from_generations(self) -> Dataset:
        generations = Path(self.path)
        rows, report = [], pairs.PairReport()
        for row in pairs.build_pairs(
            generations.with_name("requests.jsonl"),
            generations,
            selection=self.labels.selection,
            answer_kind=self.labels.answer,
            report=report,
        ):
            rows.append({"messages": row["messages"]})
        if not rows:
            raise ThinkSwitchError(
                f"{generations} holds no complete answer: {report.summary()}; raise `thinkswitch.sampling.max_tokens` in the recipe."
            )
        return Dataset.from_list(rows)


def _check_pair(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ThinkSwitchError(f"{where}: `messages` must be a list of messages; repair or delete the line.")
    for place, message in enumerate(messages):
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise ThinkSwitchError(
                    f"{where}: `messages[{place}].{name}` is missing or not text; repair or delete the line."
                )
        if token := traces.control_token(message["content"]):
            raise ThinkSwitchError(
                f"{where}: `messages[{place}]` holds {token!r}, which would end its turn; take it out."
            )
    if not messages or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise ThinkSwitchError(f"{where}: the last message must be an assistant's answer; repair or delete the line.")
    if any(m["role"] == "assistant" and traces.has_tag(m["content"]) for m in messages):
        raise ThinkSwitchError(f"{where}: a trace tag is left in the answer; build the pairs again.")
