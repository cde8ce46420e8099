"""One vLLM that answers for checkpoint after checkpoint, its weights changed in place where they fit it.

The two checkpoints of a pair differ in their weights, their chat template and their sampling defaults. The weights are
loaded into the running server (`engines/live.py`), and each request brings the other two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkswitch_plugin import files
from thinkswitch_plugin.args import EngineKeys

if TYPE_CHECKING:
    from thinkswitch_plugin.engines.ask import Arrived, Asker, Request
    from thinkswitch_plugin.engines.live import LiveVllm

# What vLLM takes from a generation_config.json where a request does not say it, and what it means to say nothing.
SAMPLING = {
    **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0},
    **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
}
IN_REQUESTS = "--trust-request-chat-template"


class Served:
    """The server, if there is one: started when it is first asked, and again for a checkpoint that it cannot hold."""

    def __init__(self, keys: EngineKeys) -> None:
        self.keys = keys.model_copy(update={"vllm_args": [*keys.vllm_args, IN_REQUESTS]})
        self.engine: LiveVllm | None = None

    def checkpoint(self, folder: Path, log: Path) -> Asker:
        """Have a checkpoint ready to answer.

        Args:
            log: of a server that is started for it.
        """
        from thinkswitch_plugin.engines.live import OF_FOLDER, LiveVllm

        if self.engine is None or not one_server_holds(self.engine.folder, folder):
            self.close()
            self.engine = LiveVllm(folder, self.keys, log)
        if folder == self.engine.folder and self.engine.wanted.id == OF_FOLDER:
            return self.engine
        self.engine.hold(folder)
        return Asked(self.engine, told_of(folder))

    def close(self) -> None:
        """End the server."""
        if self.engine is not None:
            self.engine.close()
        self.engine = None


@dataclass(frozen=True)
class Asked:
    """A server, as an `Asker` whose requests say what they do not say themselves in `fields`."""

    engine: LiveVllm
    fields: dict[str, Any]

    def ask(self, requests: Iterable[Request], arrived: Arrived) -> None:
        """As `Asker.ask`."""
        self.engine.ask(({**request, "body": self.fields | request["body"]} for request in requests), arrived)

    def close(self) -> None:
        """Nothing: the server answers for other checkpoints too."""


def told_of(folder: Path) -> dict[str, Any]:
    """What requests tell a server of a checkpoint beside its weights: its chat template and its sampling defaults."""
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(folder).chat_template
    defaults = {name: value for name, value in _generation(folder).items() if name in SAMPLING}
    return {**SAMPLING, **defaults, **({"chat_template": template} if template else {})}


def one_server_holds(first: Path, second: Path) -> bool:
    """Whether a vLLM that was started on one checkpoint can answer for another: only what `told_of` says may differ."""
    from transformers import AutoTokenizer

    from thinkswitch_plugin.merging.holding import same_model

    if first == second:
        return True
    if not (first.is_dir() and second.is_dir() and same_model(first, second)):
        return False  # a hub id is not a folder
    seen = []
    for folder in (first, second):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not isinstance(tokenizer.chat_template, str):
            return False
        rest = {name: value for name, value in _generation(folder).items() if name not in (*SAMPLING, "do_sample")}
        seen.append((backend.to_str(), tokenizer.eos_token_id, rest))
    return bool(seen[0] == seen[1])


def _generation(folder: Path) -> dict[str, Any]:
    """What a generation_config.json says; empty where there is none."""
    path = folder / "generation_config.json"
    values = files.read_json(path) if path.is_file() else {}
    return {name: value for name, value in values.items() if value is not None and name != "transformers_version"}
