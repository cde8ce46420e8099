"""The columns from which axolotl's KD trainer learns a distribution: its `target_token_ids`, `target_logprobs`, `target_mask`.

The trainer compares what the student predicts *at* a place with row `place` of these columns, without shifting them, so
that row t holds the distribution of token t + 1:

    place             0     1          2     3
    input_ids         user  assistant  5     <|im_end|>
    labels            -100  -100       5     <|im_end|>
    target_token_ids  []    [5, 6]     [<|im_end|>, 0]  []
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, ClassVar

from datasets import Value

from thinkswitch_plugin.data import distributions
from thinkswitch_plugin.data.distributions import Entry
from thinkswitch_plugin.errors import ThinkSwitchError

FEATURE = [
    {
        "token": Value("string"),
        "bytes": [Value("int64")],
        "top_logprobs": [{"token": Value("string"), "logprob": Value("float64")}],
    }
]


@dataclass(eq=False)
class WithTargets:
    """axolotl's chat-template strategy, whose rows also get the trainer's columns.

    Args:
        temperature: both distributions are softened by it; axolotl's `kd_temperature`.
    """

    chat_template: Any
    temperature: float
    supports_batched: ClassVar[bool] = False

    def tokenize_prompt(self, row: dict[str, Any]) -> dict[str, Any]:
        """Token ids and labels of a pair, and the columns for its `logprobs`."""
        found = dict(self.chat_template.tokenize_prompt({"messages": row["messages"]}))
        return found | targets(found["labels"], row["logprobs"], self.temperature)


def targets(labels: Sequence[int], entries: Sequence[Entry], temperature: float = 1.0) -> dict[str, Any]:
    """The three columns of one row: for every place as many values as tokens are known, none where nothing is learnt.

    A token of the answer that the teacher wrote as other tokens, or not at all (the student's end of the turn), has no
    distribution: it is learnt as itself, with probability 1.

    Args:
        labels: of the row, -100 where nothing is learnt.
        entries: of the tokens in which the teacher wrote the answer.
    """
    trained = [place for place, label in enumerate(labels) if label != -100]
    wrote = [distributions.token_id(one) for one in entries]
    # From the end, since what comes before the answer may be left of the trace, and say the same.
    ends = wrote[::-1], [labels[place] for place in reversed(trained)]
    same = SequenceMatcher(None, *ends, autojunk=False).get_matching_blocks()
    known = {trained[-1 - block.b - i]: entries[-1 - block.a - i] for block in same for i in range(block.size)}
    likely: list[dict[int, float]] = [{} for _ in labels]
    for place in trained:
        if place:
            likely[place - 1] = softened(known[place], temperature) if place in known else {labels[place]: 0.0}
    return {
        "target_token_ids": [list(row) for row in likely],
        "target_logprobs": [list(row.values()) for row in likely],
        "target_mask": [[1] * len(row) for row in likely],
    }


def softened(entry: Entry, temperature: float) -> dict[int, float]:
    """The log probabilities of the most likely tokens by id, at a temperature, and together 1."""
    found = {distributions.token_id(one): one["logprob"] / temperature for one in entry["top_logprobs"]}
    most = max(found.values())
    whole = most + math.log(sum(math.exp(value - most) for value in found.values()))
    return {token: value - whole for token, value in found.items()}


def require_targets(row: dict[str, Any], tokenizer: Any, where: str) -> None:
    """Raise `ThinkSwitchError` if a pair has no distributions, or they are about the tokens of another tokenizer."""
    answer, entries = row["messages"][-1]["content"], row.get("logprobs")
    if not entries:
        raise ThinkSwitchError(
            f"{where}: `logprobs` are missing, which axolotl's KD trainer learns from; generate with "
            f"`thinkswitch.loss: distribution`, {distributions.INSTEAD}."
        )
    try:
        ids = [distributions.token_id(one) for one in entries]
    except ValueError as problem:
        raise ThinkSwitchError(f"{where}: `logprobs` cannot be used: {problem}; build the pairs again.") from None
    # A model may write an id above those of its tokenizer, whose vocabulary it pads; no text belongs to it.
    text = tokenizer.decode([one for one in ids if one < len(tokenizer)], clean_up_tokenization_spaces=False)
    if answer not in text:
        raise ThinkSwitchError(
            f"{where}: the tokens of `logprobs` are {text[:60]!r} to the tokenizer that is trained, and not the answer "
            f"{answer[:40]!r}: the teacher has another tokenizer; use one with the same, {distributions.INSTEAD}."
        )
