"""The student: a checkpoint whose tokenizer knows the format tokens and whose template makes room for a soft prompt."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from thinkswitch_plugin import checkpoint, files, traces
from thinkswitch_plugin.adaptive import formats
from thinkswitch_plugin.errors import ThinkSwitchError

SOFT = checkpoint.PLACEHOLDER  # a perception module overwrites it; `traces.control_token` keeps it out of prompts
CONFIGS = ("config.json", "generation_config.json", "*.safetensors.index.json")

# Put before a chat template: it takes another list of messages, and prints the same.
_WITH_SOFT_PROMPT = (
    "{%%- set seen = namespace(turn=-1, turns=[]) %%}"
    "{%%- for message in messages if message.role == 'user' and message.content is string %%}"
    "{%%- set seen.turn = seen.turn + 1 %%}"
    "{%%- endfor %%}"
    "{%%- for message in messages %%}"
    "{%%- if message.role == 'user' and message.content is string %%}"
    "{%%- if seen.turn == 0 %%}{%%- set message = dict(message, content='%s' + message.content) %%}{%%- endif %%}"
    "{%%- set seen.turn = seen.turn - 1 %%}"
    "{%%- endif %%}"
    "{%%- set seen.turns = seen.turns + [message] %%}"
    "{%%- endfor %%}"
    "{%%- set messages = seen.turns %%}"
)


def make_student(base: Path, out: Path, *, soft_tokens: int) -> None:
    """Write the checkpoint `out`: the weights of `base`, the format tokens, and `soft_tokens` placeholders.

    The weights are hard links where the file system has them, else copies. The placeholders stand
    at the start of the last user turn; with none of them the chat template stays as it is.

    Raises:
        ThinkSwitchError: `base` is no checkpoint with a chat template, its template opens the trace, or
            its embedding table has no room for the tokens that are missing.
    """
    from transformers import AutoTokenizer

    folder, _ = checkpoint.resolve(str(base), None, "student's base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not isinstance(tokenizer.chat_template, str):
        raise ThinkSwitchError(f"{base} has no chat template (or several); a student needs the one it is asked with.")
    if traces.opens_trace(tokenizer):
        raise ThinkSwitchError(
            f"The chat template of {base} opens the trace by itself, and a student chooses whether to think; "
            "take the instruct checkpoint or the base."
        )
    _add_tokens(tokenizer, files.read_json(folder / "config.json"), base)
    if soft_tokens:
        tokenizer.chat_template = _WITH_SOFT_PROMPT % (SOFT * soft_tokens) + tokenizer.chat_template
    with files.atomic_folder(out) as building:
        for pattern in CONFIGS:
            for file in folder.glob(pattern):
                shutil.copy2(file, building / file.name)
        for file in folder.glob("*.safetensors"):
            files.link(file, building / file.name)
        tokenizer.save_pretrained(building)


def _add_tokens(tokenizer: Any, config: dict[str, Any], base: Path) -> None:
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    missing = [token for token in (*formats.THINK, *formats.ANSWER, SOFT) if token not in known]
    # Tags are ordinary tokens, so that decoding keeps them.
    tokenizer.add_tokens([AddedToken(token, special=token == SOFT, normalized=False) for token in missing])
    rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size") or 0
    if len(tokenizer) > rows:
        raise ThinkSwitchError(
            f"{base}: its embedding table has {rows} rows, and with {', '.join(missing)} its tokenizer would need "
            f"{len(tokenizer)}; enlarge the table first (transformers' `resize_token_embeddings`)."
        )
