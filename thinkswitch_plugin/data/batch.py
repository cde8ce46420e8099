"""OpenAI batch files, read and checked: the requests of a run, and one server's completion of each.

{"custom_id": "p00007-s0", "method": "POST", "url": "/v1/chat/completions",
 "body": {"model": "…", "messages": [{"role": "user", "content": "7*3+4*2"}], "max_tokens": 64}}
{"id": "…", "custom_id": "p00007-s0", "response": {"status_code": 200, "body": {"choices": […]}}, "error": null}
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thinkswitch_plugin import conventions, files
from thinkswitch_plugin.conventions import NONE, Convention
from thinkswitch_plugin.data import messages, traces
from thinkswitch_plugin.errors import ThinkSwitchError

TRACES = ("inline", "opened", "none")


def request(custom_id: str, body: dict[str, Any]) -> dict[str, Any]:
    """One line of a batch file."""
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


@dataclass(frozen=True)
class Asked:
    """How a checkpoint is asked, and how its completions are read.

    Args:
        opened: the chat template opens the trace.
        convention: how the trace is written; None for any of the table, `NONE` for a checkpoint that answers directly.
        ends: further strings that end this tokenizer's turns.
        arguments: of the chat template.
    """

    opened: bool = False
    convention: Convention | None = None
    ends: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def thinks(self) -> bool:
        """Whether a trace is expected; a completion without one is then not an answer."""
        return self.convention is not NONE

    def split(self, message: dict[str, Any], finish_reason: str | None) -> traces.Completion:
        """Split the message of a chat completion. Raises `ValueError` as `messages.texts`."""
        if self.ends:
            found = messages.texts(message)
            message = {**found, "content": _without(found.get("content", ""), self.ends)}
        return traces.split_message(
            message, opened=self.opened, finish_reason=finish_reason, convention=self.convention
        )

    def of(self, body: dict[str, Any]) -> traces.Completion:
        """The split completion of a chat completion body."""
        choice = body["choices"][0]
        return self.split(choice["message"], choice.get("finish_reason"))

    def fields(self, **metadata: Any) -> dict[str, Any]:
        """What the body of a request holds of it: the template's arguments, which vLLM takes, and its metadata."""
        arguments = {"chat_template_kwargs": dict(self.arguments)} if self.arguments else {}
        return {**arguments, "metadata": {**metadata, **self.metadata()}}

    def metadata(self) -> dict[str, Any]:
        """What a request keeps of it, in its `metadata`."""
        trace = "opened" if self.opened else "inline" if self.thinks else "none"
        return {
            "trace": trace,
            **conventions.as_metadata(self.convention),
            **({"ends": list(self.ends)} if self.ends else {}),
        }


def asked_of(tokenizer: Any, key: Convention | None = None, arguments: Mapping[str, Any] | None = None) -> Asked:
    """How a checkpoint's completions are read, from its tokenizer, its chat template and the recipe's convention.

    Args:
        arguments: with which its chat template is rendered.

    Raises `ThinkSwitchError` if the recipe says that it writes no trace, and its template opens one.
    """
    opened = traces.opens_trace(tokenizer, None if key is NONE else key, arguments)
    if opened and key is NONE:
        raise ThinkSwitchError(
            f"`thinkswitch.trace` is none, but the chat template of {getattr(tokenizer, 'name_or_path', '') or 'the checkpoint'} "
            "opens a trace; remove the key, or name the convention."
        )
    known = (getattr(tokenizer, "eos_token", None), getattr(tokenizer, "eot_token", None))
    ends = tuple(dict.fromkeys(end for end in known if isinstance(end, str) and traces.without_end(end)))
    return Asked(opened, key or traces.convention_of(tokenizer, arguments), ends, arguments or {})


def read_requests(path: Path, limit: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, request) of a batch file, each one checked; memory grows with the ids only.

    Raises `ThinkSwitchError` naming file, line and field of what is wrong, or an id that occurs twice.
    """
    lines: dict[str, int] = {}
    for number, row in itertools.islice(files.read_jsonl(path), limit):
        where = f"{path}, line {number}"
        if fault := _fault_of_request(row):
            raise ThinkSwitchError(f"{where}: {fault}.")
        first = lines.setdefault(row["custom_id"], number)
        if first != number:
            raise ThinkSwitchError(
                f"{where}: the `custom_id` {row['custom_id']!r} is that of line {first} already; give each its own."
            )
        yield number, row


def _fault_of_request(row: dict[str, Any]) -> str | None:
    if not isinstance(row.get("custom_id"), str) or not row["custom_id"]:
        return "`custom_id` is missing or not text"
    body = row.get("body")
    if not isinstance(body, dict):
        return "`body` is missing or not an object"
    if not isinstance(body.get("messages"), list) or not body["messages"]:
        return "`body.messages` is missing or empty"
    for place, message in enumerate(body["messages"]):
        if not isinstance(message, dict):
            return f"`body.messages[{place}]` is not an object"
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                return f"`body.messages[{place}].{name}` is missing or not text"
    budget = body.get("max_tokens", 1)
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        return f"`body.max_tokens` is {budget!r}; use a whole number above 0"
    if not isinstance(body.get("chat_template_kwargs", {}), dict):
        return "`body.chat_template_kwargs` is not an object"
    metadata = body.get("metadata", {})
    if not isinstance(metadata, dict):
        return "`body.metadata` is not an object"
    if not isinstance(metadata.get("prompt_id", ""), str):
        return "`body.metadata.prompt_id` is not text"
    if metadata.get("trace", "inline") not in TRACES:
        return f"`body.metadata.trace` is {metadata['trace']!r}; use {' or '.join(TRACES)}"
    ends = metadata.get("ends", [])
    if not isinstance(ends, list) or not all(isinstance(end, str) and end for end in ends):
        return "`body.metadata.ends` is not a list of texts"
    return conventions.fault(metadata.get("convention", "auto"), "`body.metadata.convention`")


def prompt_id(request: dict[str, Any]) -> str:
    """Whose sample a request is."""
    return str(request["body"].get("metadata", {}).get("prompt_id", request["custom_id"]))


def asked(request: dict[str, Any], key: Convention | None = None) -> Asked:
    """How the completion of a request is read: as `key`, the recipe's convention, else as its metadata says.

    So a key that is set when the answers are there already needs none of them asked again. A template that opened the
    trace is a fact, whatever the key.
    """
    metadata = request["body"].get("metadata", {})
    opened = metadata.get("trace") == "opened"
    convention = None if key is NONE and opened else key
    if convention is None and metadata.get("trace") == "none":
        convention = NONE
    if convention is None and "convention" in metadata:
        convention = conventions.from_key(metadata["convention"])
    return Asked(opened, convention, tuple(metadata.get("ends", ())))


def stored_id(row: dict[str, Any], where: files.Line) -> str:
    """The id of one line of a batch output. Raises `ThinkSwitchError` if it has none."""
    if not isinstance(row.get("custom_id"), str):
        raise ThinkSwitchError(f"{where}: `custom_id` is missing or not text; repair or delete the line.")
    return str(row["custom_id"])


def read_stored(path: Path, *, torn_end: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (id, line) of a batch output. Raises `ThinkSwitchError` as `files.read_jsonl` and `stored_id`."""
    for number, row in files.read_jsonl(path, torn_end=torn_end):
        yield stored_id(row, files.Line(path, number)), row


def fault_of_completion(body: object) -> str | None:
    """What keeps a value from being a chat completion with text, None if it is one."""
    if not isinstance(body, dict):
        return "it is not a JSON object"
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        return "it has no `choices`"
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        return "its first choice has no `message`"
    if wrong := messages.fault(message):
        return wrong
    if not isinstance(choice.get("finish_reason"), str | None):
        return "`finish_reason` is not text"
    usage = body.get("usage")
    if not isinstance(usage, dict | None):
        return "`usage` is not an object"
    tokens = (usage or {}).get("completion_tokens")
    if not isinstance(tokens, int | None) and not (isinstance(tokens, float) and tokens.is_integer()):
        return "`usage.completion_tokens` is not a whole number"
    return None


def completion_body(row: dict[str, Any]) -> dict[str, Any] | None:
    """The chat completion that one line of a batch output holds, None for a failure or anything else."""
    response = row.get("response")
    body = response.get("body") if isinstance(response, dict) else None
    return None if row.get("error") or fault_of_completion(body) else body


def tokens_of(body: dict[str, Any]) -> int:
    """The tokens that the engine counted in a chat completion, 0 if it does not say."""
    return int((body.get("usage") or {}).get("completion_tokens") or 0)


def completion_of(row: dict[str, Any], how: Asked) -> traces.Completion:
    """The split completion of one line of a batch output file."""
    body = completion_body(row)
    if body is None:
        return traces.Completion(None, None, traces.Outcome.FAILED)
    return how.of(body)


def _without(text: str, ends: tuple[str, ...]) -> str:
    """A text without the strings of `ends` that it ends with."""
    text = text.rstrip()
    while found := next((end for end in ends if text.endswith(end)), None):
        text = text.removesuffix(found).rstrip()
    return text
