"""The text in the message of a chat completion, in the shapes that servers give it.

{"content": "b", "reasoning": "a"}
{"content": [{"type": "thinking", "thinking": "a"}, {"type": "text", "text": "b"}]}    content b, trace a
"""

from __future__ import annotations

from typing import Any

# Where servers put the trace: vLLM and OpenRouter, transformers and DeepSeek, then others. The first that has text counts.
REASONING = (
    "reasoning",
    "reasoning_content",
    "reasoning_text",
    "thinking",
    "thinking_content",
    "thinking_blocks",
    "reasoning_details",
)
STORED = REASONING[:2]  # the names under which a trace is stored
_OF_TRACE = ("think", "reason", "redacted_thinking")  # how the type of a part of a trace begins
_TEXTS = ("text", "thinking", "reasoning", "summary", "content", "refusal")
HIDDEN = "…"  # stands for a trace that a server returned encrypted


def texts(message: dict[str, Any]) -> dict[str, str]:
    """The texts of a message, or of a piece of a streamed one, by the names under which they are stored.

    These are `content`, `reasoning` or `reasoning_content`, and `refusal`; only those that the message has.

    Raises `ValueError`, saying what is wrong, for content of which a part is neither text nor a trace.
    """
    found: dict[str, str] = {}
    content, trace = message.get("content"), ""
    if isinstance(content, list | dict):
        parts = content if isinstance(content, list) else [content]
        trace = _trace(part for part in parts if _is_trace(part))
        answer = [_text(part) for part in parts if not _is_trace(part)]
        if None in answer:
            raise ValueError("`message.content` has a part without text")
        found["content"] = "".join(part or "" for part in answer)
    elif isinstance(content, str):
        found["content"] = content
    elif content is not None:
        raise ValueError("`message.content` is not text")
    apart = {
        name: _trace(value if isinstance(value := message.get(name), list) else [value])
        for name in REASONING
        if message.get(name)
    }
    if name := next((name for name in apart if apart[name].strip()), next(filter(apart.get, apart), None)):
        found[name if name in STORED else "reasoning"] = apart[name]
    elif trace:
        found["reasoning"] = trace
    if isinstance(message.get("refusal"), str) and message["refusal"]:
        found["refusal"] = message["refusal"]
    return found


def parts(message: dict[str, Any]) -> tuple[str, str]:
    """The trace that a server returned apart, and the content without it; empty if there is none.

    Raises `ValueError` as `texts`.
    """
    found = texts(message)
    trace = next((found[name] for name in STORED if found.get(name, "").strip()), "")
    return trace, found.get("content", "")


def fault(message: dict[str, Any]) -> str | None:
    """What keeps the content of a message from being text, None if nothing does."""
    try:
        texts(message)
    except ValueError as error:
        return str(error)
    return None


def _is_trace(part: Any) -> bool:
    return isinstance(part, dict) and str(part.get("type")).startswith(_OF_TRACE)


def _trace(parts: Any) -> str:
    return "".join(HIDDEN if (text := _text(part)) is None else text for part in parts)


def _text(value: object) -> str | None:
    """The text of a part of a message, whichever of the usual shapes it has; None if it has none."""
    if isinstance(value, list):
        return "".join(_text(part) or "" for part in value)
    if isinstance(value, dict):
        return next((text for name in _TEXTS if (text := _text(value.get(name))) is not None), None)
    return value if isinstance(value, str) else None
