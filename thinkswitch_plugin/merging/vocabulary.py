"""Do two tokenizers mean the same by every token id? One of them may name a slot that the other leaves unused.

    id 128009   <|eot_id|>                        <|eot_id|>
    id 128013   <|reserved_special_token_5|>      <think>                      unused by Llama, named by R1
    id 128000   <|begin_of_text|>                 <｜begin▁of▁sentence｜>      both begin a text

Each checkpoint keeps its own tokenizer: the names matter to whoever reads and writes text, not to the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkswitch_plugin import files
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run import checkpoint

# How model families name the slots that they keep for later: Llama, gpt-oss, Gemma, Phi, Qwen, Mistral.
UNUSED = re.compile(r"reserved|unused|dummy|extra|placeholder|(?:special|control)_\d", re.IGNORECASE)
ROLES = ("bos_token", "eos_token")
SHOWN = 8  # token names in a message


@dataclass(frozen=True)
class Tokens:
    """The tokens of one checkpoint.

    Attributes:
        ids: id by text.
        added: the ids of added tokens, which training may rename; the others are pieces of text.
        roles: what an id is for, as tokenizer and configs say: `bos_token`, `eos_token`.
    """

    ids: Mapping[str, int]
    added: frozenset[int]
    roles: Mapping[int, frozenset[str]]

    @classmethod
    def of(cls, folder: Path) -> Tokens | None:
        """Those of a checkpoint folder; None if it has no tokenizer.json."""
        if not (folder / "tokenizer.json").is_file():
            return None
        tokenizer = files.read_json(folder / "tokenizer.json")
        vocabulary = tokenizer.get("model", {}).get("vocab") or {}
        if isinstance(vocabulary, list):  # a unigram model: [piece, score] in the order of the ids
            vocabulary = {piece: place for place, (piece, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
        # Added tokens may be in either list, so they are compared together.
        ids = {**vocabulary, **added}
        return cls(ids, frozenset(added.values()), _roles(folder, ids))


def _roles(folder: Path, ids: Mapping[str, int]) -> dict[int, frozenset[str]]:
    found: dict[int, set[str]] = {}
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        path = folder / name
        values = files.read_json(path) if path.is_file() else {}
        for role in ROLES:
            named: Any = values.get(role) if name == "tokenizer_config.json" else values.get(f"{role}_id")
            token = named.get("content") if isinstance(named, dict) else named
            for one in token if isinstance(token, list) else [token]:
                if (place := ids.get(one) if isinstance(one, str) else one) is not None:
                    found.setdefault(place, set()).add(role)
    return {place: frozenset(roles) for place, roles in found.items()}


def renamed_tokens(first: Path, other: Path) -> list[tuple[int, str, str]]:
    """Id, text in `first` and text in `other` of every token that has the same id and another text."""
    a, b = Tokens.of(first), Tokens.of(other)
    if a is None or b is None or a.ids == b.ids:
        return []
    theirs = {place: text for text, place in b.ids.items()}
    return sorted((place, text, theirs[place]) for text, place in a.ids.items() if theirs.get(place, text) != text)


def vocabulary_difference(first: Path, other: Path) -> str | None:
    """Why the rows of two checkpoints' embeddings do not belong together; None if they do.

    A token may have another text at the same id if both are added tokens and one of them is an unused slot, or both
    begin a text, or both end one.
    """
    a, b = Tokens.of(first), Tokens.of(other)
    if a is None or b is None or a.ids == b.ids:
        return None
    for text, place in a.ids.items():
        if b.ids.get(text, place) != place and not UNUSED.search(text):  # whatever number a reserved slot has
            return f"{text!r} is token {place} of {first} and token {b.ids[text]} of {other}"
    for held, mine, others in ((first, a, b), (other, b, a)):
        if alone := sorted(set(mine.ids.values()) - set(others.ids.values())):
            text = next(text for text, place in mine.ids.items() if place == alone[0])
            return f"only {held} has a token {alone[0]}, {text!r}"
    for place, text, name in renamed_tokens(first, other):
        unused = UNUSED.search(text) or UNUSED.search(name)
        same_role = a.roles.get(place, frozenset()) & b.roles.get(place, frozenset())
        if not ({place} <= a.added & b.added and (unused or same_role)):
            return f"token {place} is {text!r} in {first} and {name!r} in {other}"
    return None


def require_same_names(first: Path, other: Path) -> None:
    """Raise `ThinkSwitchError` if one tokenizer cannot serve two compatible checkpoints."""
    if message := describe_renamed(first, other):
        raise ThinkSwitchError(
            f"{message}, but a server has one for all adapters: serve the two checkpoints one by one."
        )


def write_with_names(source: Path, thinking: Path, folder: Path) -> None:
    """The tokenizer, chat template and generation config of `source`, its unused slots named as in `thinking`.

    A tokenizer that has no name for `</think>` prints it as `<|reserved_special_token_6|>`, and the trace is lost.
    """
    checkpoint.adopt_mode(source, folder)
    names = {place: name for place, text, name in renamed_tokens(source, thinking) if UNUSED.search(text)}
    tokenizer = files.read_json(folder / "tokenizer.json")
    for token in tokenizer["added_tokens"]:
        token["content"] = names.get(token["id"], token["content"])
    vocabulary = tokenizer["model"].get("vocab")
    if isinstance(vocabulary, dict):
        tokenizer["model"]["vocab"] = {names.get(place, text): place for text, place in vocabulary.items()}
    files.write_json(folder / "tokenizer.json", tokenizer)
    config = files.read_json(folder / "tokenizer_config.json")
    for place, token in (config.get("added_tokens_decoder") or {}).items():
        token["content"] = names.get(int(place), token["content"])
    files.write_json(folder / "tokenizer_config.json", config)


def describe_renamed(first: Path, other: Path) -> str | None:
    """What to tell the user of tokens that two compatible checkpoints name differently; None if there are none."""
    # The slots that one of the two has a use for come first.
    renamed = sorted(
        renamed_tokens(first, other), key=lambda each: bool(UNUSED.search(each[1]) and UNUSED.search(each[2]))
    )
    if not renamed:
        return None
    named = ", ".join(f"{text} / {name} ({place})" for place, text, name in renamed[:SHOWN])
    more = f" and {len(renamed) - SHOWN} more" if len(renamed) > SHOWN else ""
    return (
        f"{len(renamed)} special tokens are named differently: {named}{more}; each checkpoint keeps its own tokenizer"
    )
