"""What a server replied, brought into one form: a chat completion, or an error in the server's own words.

OpenAI-compatible servers agree on the shape of a chat completion and differ in its details. What is stored has
text in `message.content` and in `message.reasoning` (or `reasoning_content`), whole numbers in `usage`, and
`stop` as the reason of every answer that came to its end:

    {"choices": [{"message": {"content": [{"type": "thinking", "thinking": "a"}, {"type": "text", "text": "b"}]},
                  "finish_reason": "eos"}], "usage": {"completion_tokens": 3.0}}
    {"choices": [{"message": {"content": "b", "reasoning": "a"},
                  "finish_reason": "stop"}], "usage": {"completion_tokens": 3}}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from thinkswitch_plugin.data import distributions
from thinkswitch_plugin.data.messages import REASONING, texts

END_OF_TURN = ("eos", "eos_token", "end_turn")  # what Together, TGI and Anthropic call `stop`
LONGEST_WORDS = 500
_SERVER_SENT_EVENTS = re.compile(rb"\s*(?:data|event|id|retry)?:")


_REFUSED = re.compile(
    r"unsupported|not supported|not support|unknown|unrecogni[sz]ed|unexpected|extra (?:inputs|fields)|not permitted"
    r"|not allowed|cannot find|not a valid|invalid (?:param|field|argument)|deprecated|forbidden|removed",
    re.IGNORECASE,
)
_ONLY = r"(?:must|only|requir|need|support|set to true)"
_WANTS_STREAM = re.compile(rf"\bstream.{{0,80}}{_ONLY}|{_ONLY}.{{0,80}}\bstream", re.IGNORECASE)
_UNKNOWN_MODEL = re.compile(
    r"model\b.{0,100}\b(?:not exist|not found)\b|(?:invalid|unknown|no such) model\b|not a valid model", re.IGNORECASE
)


class Unanswered(Exception):
    """A prompt that could not be answered, and why."""


class Refusal(Exception):
    """A server's error: its HTTP status (0 if it gave none) and words, and the seconds it asks to be left alone."""

    def __init__(self, status: int, body: object, retry_after: float = 0.0) -> None:
        words = words_of(body)
        super().__init__(f"status {status}: {words}" if status else words)
        self.status, self.retry_after = status, retry_after
        self.unknown_model = status in (0, 400, 422) and _UNKNOWN_MODEL.search(words) is not None
        self.code = str(body.get("code") or body.get("type")) if isinstance(body, dict) else ""


class Streamed(ValueError):
    """The server sent a stream that was not asked for."""


class Unreadable(ValueError):
    """A whole chat completion whose message is not text; asking again would bring the same."""


def completion(data: bytes, *, streamed: bool) -> Any:
    """The JSON value that a server sent with status 200, in the one form if it is a chat completion.

    Args:
        streamed: whether a stream was asked for; a server may send a whole completion all the same.

    Raises `Refusal` for an error, `Streamed`, `Unreadable`, and `ValueError` for broken JSON or a stream that broke off.
    """
    if _SERVER_SENT_EVENTS.match(data):
        if not streamed:
            raise Streamed("it sent a stream that was not asked for")
        try:
            reply = _assembled(data.decode())
        except (AttributeError, TypeError) as error:
            raise ValueError(f"an event of the stream has another shape ({error})") from None
    else:
        try:
            reply = json.loads(data)
        except ValueError as error:
            raise ValueError(f"it is not JSON ({error})") from None
    _require_no_error(reply)
    if isinstance(reply, dict):
        _normalize(reply)
    return reply


def words_of(body: object) -> str:
    """The words for a person in the body of an error, whichever of the usual shapes it has, on one line."""
    text = _words(body).strip()
    if text.startswith("<"):  # a page of a gateway
        text = re.sub(r"<[^<>]*>", " ", text)
    text = " ".join(text.split()) or "no reason given"
    return text if len(text) <= LONGEST_WORDS else f"{text[:LONGEST_WORDS]}…"


def wants_stream(words: str) -> bool:
    """Whether a server reports that it only supports streaming."""
    return _WANTS_STREAM.search(words) is not None


def refused_field(words: str, sent: Iterable[str]) -> str | None:
    """The field of a request that a server says it does not take, None if its words are about something else."""
    if not _REFUSED.search(words):
        return None
    names = (name for name in sent if name not in ("messages", "model", *distributions.FIELDS))
    found = [(match.start(), name) for name in names if (match := re.search(rf"\b{re.escape(name)}\b", words))]
    return min(found)[1] if found else None


def _words(value: object) -> str:
    if isinstance(value, list):
        return "; ".join(filter(None, map(_words, value)))
    if not isinstance(value, dict):
        return "" if value is None else str(value)
    found = [_words(value[name]) for name in ("error", "errors", "message", "msg", "detail") if value.get(name)]
    found = list(dict.fromkeys(filter(None, found))) or [json.dumps(value, default=str)]
    where = value.get("loc") or value.get("param")  # the field's name, where the words leave it out
    field = str(where[-1] if isinstance(where, list | tuple) and where else where or "")
    if field and field not in found[0]:
        found.insert(0, f"`{field}`")
    metadata = value.get("metadata")  # OpenRouter puts the words of the server behind it there
    if isinstance(metadata, dict) and metadata.get("raw"):
        found.append(_words(metadata["raw"]))
    return ": ".join(found)


def _require_no_error(reply: object) -> None:
    """Raise `Refusal` if a reply, or its first choice, is an error."""
    if not isinstance(reply, dict):
        return
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    error = choice.get("error") or (None if choices else reply.get("error") or reply.get("detail"))
    if not error:
        return
    values = error if isinstance(error, dict) else {}
    codes = (str(values.get(name, reply.get(name))) for name in ("code", "status", "status_code"))
    status = next((int(code) for code in codes if re.fullmatch(r"[45]\d\d", code)), 0)
    if not status and values.get("type") == "invalid_request_error":
        status = 400
    raise Refusal(status, error)


def _assembled(text: str) -> dict[str, Any]:
    """The chat completion that a stream of events adds up to. Raises `ValueError` if it broke off."""
    reply: dict[str, Any] = {}
    pieces: dict[str, str] = {}
    finish, usage = None, None
    for line in re.split(r"\r\n|\r|\n", text):
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or not data or data == "[DONE]":
            continue
        event = json.loads(data)
        _require_no_error(event)
        usage = event.get("usage") or usage
        reply = {**{name: event[name] for name in ("id", "model") if name in event}, **reply}
        for choice in (choice for choice in event.get("choices") or [] if choice.get("index", 0) == 0):
            finish = choice.get("finish_reason") or finish
            for name, value in texts(choice.get("delta") or choice.get("message") or {}).items():
                pieces[name] = pieces.get(name, "") + value
    if finish is None:
        raise ValueError("the stream broke off before its end")
    message = {"role": "assistant", "content": None, **pieces}
    return reply | {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}


def _normalize(reply: dict[str, Any]) -> None:
    """Bring a chat completion into the one form, in place; what it lacks is left to the check of the whole."""
    usage = reply.get("usage")
    counts = usage.items() if isinstance(usage, dict) else ()
    reply["usage"] = {name: _whole_number(n) if name.endswith("_tokens") else n for name, n in counts} or None
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return
    if isinstance(choice.get("text"), str):  # a completion without chat
        choice["message"] = {"role": "assistant", "content": choice.pop("text")}
    message = choice.get("message")
    if not isinstance(message, dict):
        return
    try:
        found = texts(message)
    except ValueError as error:
        raise Unreadable(str(error)) from None
    choice["message"] = {k: v for k, v in message.items() if k not in REASONING} | found
    finish = choice.get("finish_reason")
    if isinstance(finish, str) and finish.lower() in ("stop", *END_OF_TURN):
        choice["finish_reason"] = "stop"


def _whole_number(value: object) -> int | None:
    """A count of tokens, which some servers write as 3.0 or "3"; None for anything else."""
    try:
        number = float(str(value))
    except ValueError:
        return None
    return int(number) if number.is_integer() else None
