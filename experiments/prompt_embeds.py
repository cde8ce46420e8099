"""Serve a checkpoint with a perception module by vLLM: it gets a plain view, and prompts as embeddings.

vLLM knows nothing of the module. It serves the language model alone, and the client, which
holds the whole model, computes the input embeddings of every prompt, soft prompt included.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from thinkswitch_plugin import files
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.data.batch import tokens_of
from thinkswitch_plugin.engines import servers
from thinkswitch_plugin.engines.ask import ask_in_order
from thinkswitch_plugin.engines.client import ServedModel
from thinkswitch_plugin.engines.replies import Unanswered
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run.checkpoint import MODEL_TYPE, MODULE, perception_of

INDEX = "model.safetensors.index.json"
PREFIX = f"{MODULE}."


class Completion(NamedTuple):
    """What the server wrote: its text, `stop` or `length`, and the number of tokens."""

    text: str
    finish_reason: str
    tokens: int


def write_plain_view(checkpoint: Path, out: Path) -> None:
    """Write the checkpoint without its perception module into the folder `out`, for engines that do not know it.

    Only the config, the index and shards that hold the module's tensors are written; everything
    else is a hard link where the file system has them, else a copy.

    Raises `ThinkSwitchError` if the checkpoint has no perception module.
    """
    if perception_of(checkpoint) is None:
        raise ThinkSwitchError(f"{checkpoint} has no perception module, so any engine serves it as it stands.")
    config = files.read_json(checkpoint / "config.json")
    architecture = str(config["model_type"]).removeprefix(MODEL_TYPE)
    config = {key: value for key, value in config.items() if key not in (MODULE, "auto_map")}
    plain = [name.removeprefix("ThinkSwitch") for name in config["architectures"]]
    config |= {"model_type": architecture, "architectures": plain}
    with files.atomic_folder(out) as building:
        files.write_json(building / "config.json", config)
        for file in checkpoint.iterdir():
            if file.suffix == ".py" or file.name == "config.json" or not file.is_file():
                continue
            if file.name == INDEX:
                index = files.read_json(file)
                places = {k: v for k, v in index["weight_map"].items() if not k.startswith(PREFIX)}
                files.write_json(building / INDEX, {**index, "weight_map": places})
            elif file.suffix != ".safetensors" or not _without_module(file, building / file.name):
                files.link(file, building / file.name)


def _without_module(shard: Path, target: Path) -> bool:
    """Write a shard without the module's tensors; False, and nothing written, where it holds none."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(str(shard), framework="pt") as handle:
        names = list(handle.keys())
        kept = [name for name in names if not name.startswith(PREFIX)]
        if len(kept) == len(names):
            return False
        if kept:
            save_file({name: handle.get_tensor(name) for name in kept}, str(target), metadata=handle.metadata())
    return True


@contextmanager
def serving(view: Path, keys: EngineKeys, log: Path, *, max_len: int | None = None) -> Iterator[servers.Server]:
    """vLLM with a plain view, taking prompts as embeddings; raises as `engines.serving` does."""
    options = keys.model_copy(update={"vllm_args": ["--enable-prompt-embeds", *keys.vllm_args]})
    with servers.serving("vllm", str(view), options, log, max_len=max_len) as server:
        yield server


def complete(
    server: servers.Server,
    model: str,
    prompts: Iterable[Tensor],
    keys: EngineKeys,
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
) -> list[Completion]:
    """Greedy completions of prompts given as embeddings, in their order.

    Args:
        server: one that `serving` started, or vLLM with `--enable-prompt-embeds`.
        model: the name under which it serves the plain view.
        prompts: (length, hidden) each, as `model.prompt_embeds` gives them.
        max_tokens: budget of a completion.
        stop: strings that end a completion; they are left out of its text.

    Raises:
        ThinkSwitchError: the server refuses a prompt, or stays away.
    """
    fields = {"prompt": None, "temperature": 0, "max_tokens": max_tokens, "stop": list(stop) or None}
    bodies = ({**fields, "prompt_embeds": encode(prompt)} for prompt in prompts)
    try:
        found = []
        for reply in ask_in_order(ServedModel(server, model, keys), bodies):
            if isinstance(reply, Unanswered):
                raise ThinkSwitchError(str(reply))
            choice = reply["choices"][0]
            tokens = tokens_of(reply)
            found.append(Completion(choice["message"]["content"], str(choice.get("finish_reason")), tokens))
    except ThinkSwitchError as error:
        raise ThinkSwitchError(
            f"The server at {server.base_url} gives no completion of a prompt sent as embeddings ({error}); it must "
            "be vLLM, started with --enable-prompt-embeds."
        ) from None
    return found


def encode(prompt: Tensor) -> str:
    """A tensor as vLLM reads it: `torch.save`, then base64."""
    buffer = io.BytesIO()
    torch.save(prompt.detach().cpu().contiguous(), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
