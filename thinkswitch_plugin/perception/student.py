"""The student: a checkpoint whose tokenizer knows the format tokens and whose template makes room for a soft prompt."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from thinkswitch_plugin import files
from thinkswitch_plugin.data import formats, traces
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run import checkpoint

SOFT = checkpoint.PLACEHOLDER  # a perception module overwrites it; `traces.control_token` keeps it out of prompts
TABLES = ("embed_tokens.weight", "lm_head.weight")
NEW_ROWS = "mean and spread of the trained ones"  # if the initialisation changes, students are made again
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

    The weights are hard links where the file system has them, else copies; only the shards with the
    embedding tables are written, where a token is new. The placeholders stand at the start of the last
    user turn; with none of them the chat template stays as it is.

    Raises:
        ThinkSwitchError: `base` is not a checkpoint with a chat template, its template opens the trace, or
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
    added = _add_tokens(tokenizer, files.read_json(folder / "config.json"), base)
    if soft_tokens:
        tokenizer.chat_template = _WITH_SOFT_PROMPT % (SOFT * soft_tokens) + tokenizer.chat_template
    with files.atomic_folder(out) as building:
        for pattern in CONFIGS:
            for file in folder.glob(pattern):
                shutil.copy2(file, building / file.name)
        for file in folder.glob("*.safetensors"):
            if not (added and _write_with_new_rows(file, building / file.name, added)):
                files.link(file, building / file.name)
        tokenizer.save_pretrained(building)


def _write_with_new_rows(shard: Path, target: Path, ids: list[int]) -> bool:
    """Write a shard with random rows for new tokens; False, and nothing written, if it holds no embedding table.

    New rows get the mean and the spread of the trained ones, which is how transformers enlarges a table. A row that
    no training has touched is too small for a low-rank adapter to make its token likely.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(str(shard), framework="pt") as handle:
        names, metadata = list(handle.keys()), handle.metadata()
        if not any(name.endswith(TABLES) for name in names):
            return False
        tensors = {name: handle.get_tensor(name) for name in names}
    for name in filter(lambda name: name.endswith(TABLES), names):
        old = tensors[name]
        trained = old[: min(ids)].float()
        drawn = torch.randn((len(ids), old.shape[1]), generator=torch.Generator().manual_seed(0))
        tensors[name] = old.clone()
        tensors[name][ids] = (trained.mean(dim=0) + drawn * trained.std(dim=0)).to(old.dtype)
    save_file(tensors, str(target), metadata=metadata)
    return True


def _add_tokens(tokenizer: Any, config: dict[str, Any], base: Path) -> list[int]:
    """Add what is missing, and return the new ids. Raises `ThinkSwitchError` if the table has no room."""
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
    return sorted(int(tokenizer.convert_tokens_to_ids(token)) for token in missing)
