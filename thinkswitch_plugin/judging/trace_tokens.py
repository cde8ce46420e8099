"""Trace tags that are special tokens, kept in the text where an engine would leave special tokens out.

lm-eval's `hf` backend decodes with `skip_special_tokens=True` and has no option for it. What it does take is a tokenizer:
one in which those tags are ordinary added tokens encodes a text to the same ids, and decodes it with its tags.
vLLM is sent `skip_special_tokens: false`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thinkswitch_plugin import files
from thinkswitch_plugin.conventions import NONE, Convention
from thinkswitch_plugin.data import traces
from thinkswitch_plugin.errors import ThinkSwitchError

SERVED = {"skip_special_tokens": False}  # what vLLM's requests carry


def special_tags(tokenizer: Any, convention: Convention | None = None) -> list[str]:
    """The special tokens with which a tokenizer's checkpoint writes its traces.

    Args:
        convention: how it writes them; None goes by its chat template.
    """
    written = convention or traces.convention_of(tokenizer) or NONE
    entries = written.opens + written.closes
    named = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token}
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [
        token
        for token in special
        if token not in named and (traces.has_tag(token) or any(token in entry for entry in entries))
    ]


def keep_tags(tokenizer: Any, folder: Path, convention: Convention | None = None) -> Path | None:
    """Write a tokenizer that keeps its trace tags when it decodes; None, and nothing written, if this one does.

    Raises `ThinkSwitchError` if the tags cannot be made ordinary tokens.
    """
    from transformers import AutoTokenizer

    tags = special_tags(tokenizer, convention)
    if not tags:
        return None
    tokenizer.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            files.write_json(folder / name, _ordinary(files.read_json(folder / name), set(tags)))
    kept = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids(tags)
    if kept.convert_tokens_to_ids(tags) != ids or any(
        tag not in kept.decode(ids, skip_special_tokens=True) for tag in tags
    ):
        raise ThinkSwitchError(
            f"lm-eval's hf backend leaves special tokens out of the answers, and in the tokenizer of "
            f"{tokenizer.name_or_path} the trace is written with such tokens ({', '.join(tags)}); "
            "set `thinkswitch.evaluation.backend: server`."
        )
    return folder


def keep_tags_of(checkpoint: str, folder: Path, convention: Convention | None = None) -> Path | None:
    """`keep_tags` of a checkpoint's tokenizer; its folder or hub id."""
    from transformers import AutoTokenizer

    return keep_tags(AutoTokenizer.from_pretrained(checkpoint), folder, convention)


def _ordinary(value: Any, tags: set[str]) -> Any:
    """The same JSON with added tokens of these contents not special, and in no list of special tokens."""
    if isinstance(value, list):
        return [_ordinary(inner, tags) for inner in value if not (isinstance(inner, str) and inner in tags)]
    if not isinstance(value, dict):
        return value
    if value.get("content") in tags and "special" in value:
        return {**value, "special": False}
    return {
        key: inner if key in ("model", "chat_template") else _ordinary(inner, tags)
        for key, inner in value.items()
        if not (isinstance(inner, str) and inner in tags)
    }
