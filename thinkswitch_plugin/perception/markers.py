"""Where the questions of a batch are, read from the token ids: after the placeholders, up to the end of the turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run.checkpoint import PLACEHOLDER


@dataclass(frozen=True)
class Markers:
    """The ids that bound a question: the placeholder's, and that of the token that ends a turn."""

    placeholder: int
    end: int


def find_markers(tokenizer: Any, tokens: int) -> Markers:
    """The markers of a tokenizer whose chat template renders `tokens` placeholders before a question.

    Raises `ThinkSwitchError` if there is no placeholder token, or the chat template renders
    another number of them, or does not end a user turn by a token of its own.
    """
    placeholder = tokenizer.get_added_vocab().get(PLACEHOLDER)
    if placeholder is None:
        raise ThinkSwitchError(
            f"The tokenizer has no token {PLACEHOLDER} for the soft prompt; train a student that "
            f"`thinkswitch_plugin.perception.student.make_student` made with `soft_tokens={tokens}`."
        )
    question = "1"
    rendered: str = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False)
    found = rendered.count(PLACEHOLDER)
    before, _, tail = rendered.partition(PLACEHOLDER * tokens + question)
    if found != tokens or PLACEHOLDER in before:
        raise ThinkSwitchError(
            f"The chat template puts {found} {PLACEHOLDER} before a question where `thinkswitch.perception.tokens` is "
            f"{tokens}; make them equal."
        )
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    if not ids or ids[0] not in {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}:
        raise ThinkSwitchError(
            "The chat template ends a user turn by ordinary text, so that a question's end cannot be seen; use one that "
            "ends turns by a special token, as chatml does."
        )
    return Markers(placeholder, ids[0])


def find_spans(ids: Tensor, markers: Markers, tokens: int) -> Tensor:
    """Where the questions of a batch are, packed rows included.

    Args:
        ids: (rows, length), padded on either side.
        tokens: placeholders a question.

    Returns:
        (questions, 3): row, first placeholder, and the token that ends the turn. The question
        lies between the last placeholder and that token.

    Raises:
        ThinkSwitchError: a group of placeholders has another length, or its turn does not end.
    """
    soft = ids == markers.placeholder
    first = soft.clone()
    first[:, 1:] &= ~soft[:, :-1]
    row, start = first.nonzero(as_tuple=True)
    last = start + tokens - 1
    length = ids.shape[1]
    group = start[:, None] + torch.arange(tokens, device=ids.device)
    whole = bool((last < length).all()) and bool(soft[row[:, None], group.clamp(max=length - 1)].all())
    if not whole or int(soft.sum()) != len(row) * tokens:
        raise ThinkSwitchError(
            f"A text holds {PLACEHOLDER} in groups that are not of {tokens}; render it by the checkpoint's own chat "
            "template, and keep the token out of questions."
        )
    places = torch.arange(length, device=ids.device).expand_as(ids)
    # For every place the nearest end of a turn from there on.
    ends = torch.where(ids == markers.end, places, length).flip(1).cummin(1).values.flip(1)
    end = ends[row, last]
    if bool((end == length).any()):
        raise ThinkSwitchError(
            f"A question after {PLACEHOLDER} has no end of turn, so that it was cut; give it whole, in one piece."
        )
    return torch.stack((row, start, end), dim=1)
