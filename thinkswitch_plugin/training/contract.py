"""What a chat template must do for training: the loss begins behind the prompt that is asked, and ends with the turn.

Proved on the first row of a dataset, with the ids and labels that axolotl trains on:

    <|im_start|>user\\n2+3<|im_end|>\\n<|im_start|>assistant\\n   no loss; the same ids as the generation prompt
    5<|im_end|>                                               loss on the answer and the token that ends the turn
    \\n                                                        what the template writes behind it
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from thinkswitch_plugin.data import formats, traces
from thinkswitch_plugin.data.switches import SWITCHES
from thinkswitch_plugin.errors import ThinkSwitchError


def require_contract(chat_template: Any, tokenizer: Any, messages: list[dict[str, Any]], form: str | None) -> None:
    """Check on one row that training with a chat template uses the same text as the prompts at inference.

    Args:
        chat_template: axolotl's strategy for the dataset, with its template, template arguments and `eot_tokens`.
        messages: a row's turns; the last one is the assistant's, written in `form`.
        form: how trace and answer are written; None if there is no trace.

    Raises:
        ThinkSwitchError: the row's context is not the generation prompt, the end of the turn has no loss, or a
            completion in `form` is not rendered as it is written; the sentence names the key that helps.
    """
    name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
    ids, labels, asked, before = rendered(chat_template, messages)
    opened = traces.template_opens_trace(tokenizer.decode(asked))
    if form and opened:
        raise ThinkSwitchError(
            f"The chat template of {name} opens the trace by itself, so {form}_thinking could not say first which "
            "format a completion has; use the template of an instruct checkpoint."
        )
    if form:
        end = turn_end(tokenizer, ids, before)
        written = tokenizer.decode([token for token in labels[before:end] if token != -100])
        if ids[:before] != asked or formats.parse(written) != formats.parse(messages[-1]["content"]):
            raise ThinkSwitchError(
                f"The chat template or the tokenizer of {name} does not leave a completion of {form}_thinking as it is "
                "written; use a template that prints the assistant's text unchanged, right behind the generation "
                "prompt, and a tokenizer that can write the tags."
            )
    elif ids[:before] != asked:
        raise ThinkSwitchError(
            f"With the chat template of {name} the answer would be trained behind {tokenizer.decode(ids[:before])[-40:]!r}, "
            f"but asked for behind {tokenizer.decode(asked)[-40:]!r}; {_remedy(chat_template, messages, opened)}."
        )
    if problem := untrained_end(tokenizer, ids, labels, before):
        raise ThinkSwitchError(f"With the chat template of {name} {problem}.")


def rendered(chat_template: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[int], list[int], int]:
    """The ids and labels of a row, the ids that a server would be given for the turns before its answer, and where
    the loss on the answer begins: behind all that the row and its generation prompt share.
    """
    row = chat_template.tokenize_prompt({"messages": messages})
    built = chat_template.prompter.build_prompt(messages[:-1], add_generation_prompt=True)
    ids, labels = list(row["input_ids"]), list(row["labels"])
    asked = list(built["input_ids"] if hasattr(built, "keys") else built)
    shared = next((i for i, (one, other) in enumerate(zip(ids, asked, strict=False)) if one != other), len(asked))
    return ids, labels, asked, next((i for i in range(shared, len(labels)) if labels[i] != -100), len(labels))


def turn_end(tokenizer: Any, ids: Sequence[int], before: int) -> int | None:
    """Where the turn of an answer that begins at `before` ends: at the next special token, whatever the eos is."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= {tokenizer.eos_token_id}
    special -= set(tokenizer.convert_tokens_to_ids([*formats.THINK, *formats.ANSWER]))
    return next((place for place in range(before, len(ids)) if ids[place] in special), None)


def untrained_end(tokenizer: Any, ids: Sequence[int], labels: Sequence[int], before: int) -> str | None:
    """Why a model would not learn to end its turn, and what helps; None if the end has a loss.

    Args:
        before: where the answer begins.
    """
    end = turn_end(tokenizer, ids, before)
    if end is None:
        return "nothing ends the assistant's turn; use one (`chat_template`) that ends it with a special token"
    between = [token for token, label in zip(ids[before:end], labels[before:end], strict=True) if label == -100]
    if text := tokenizer.decode(between).strip():
        return f"{text[:40]!r} is between the answer and the end of the turn; use a simpler template (`chat_template`)"
    if labels[end] == -100:
        token = tokenizer.convert_ids_to_tokens(ids[end])
        return f"{token} ends the turn, but would not be trained; set `eot_tokens: [{token!r}]` in the recipe"
    return None


def _remedy(chat_template: Any, messages: list[dict[str, Any]], opened: bool) -> str:
    """What to do about a context that is not the generation prompt: a switch of the template that mends it, if any."""
    prompter = chat_template.prompter
    before = prompter.chat_template_kwargs
    for name, values in SWITCHES.items():
        prompter.chat_template_kwargs = {**before, name: values["instruct"]}
        try:
            ids, _, asked, start = rendered(chat_template, messages)
        finally:
            prompter.chat_template_kwargs = before
        if ids[:start] == asked:
            return (
                f"set `chat_template_kwargs: {{{name}: {json.dumps(values['instruct'])}}}` in the recipe (for the loop as "
                "`thinkswitch.pair.chat_template_kwargs.instruct`), and have the trained checkpoint asked with the same "
                "argument"
            )
    if opened:
        return "use the template of an instruct checkpoint, which opens no trace"
    return "use one (`chat_template`) that prints the assistant's text right behind the generation prompt"
