"""The text in the message of a chat completion, in the shapes that servers give it."""

from __future__ import annotations

from typing import Any


def reasoning_of(message: dict[str, Any]) -> str:
    """The trace that a server returned apart, empty if it returned none.

    vLLM names it `reasoning`, transformers and others `reasoning_content`, Ollama `thinking`; OpenRouter adds
    `reasoning_details`, and Mistral's API has parts of type `thinking` in the content.
    """
    for name in ("reasoning", "reasoning_content", "thinking"):
        if isinstance(message.get(name), str) and message[name].strip():
            return str(message[name])
    details = message.get("reasoning_details")
    parts = [*(details if isinstance(details, list) else ()), *_parts(message.get("content"), thinking=True)]
    return "\n".join(_text_of(part) or "…" for part in parts)


def content_of(message: dict[str, Any]) -> str:
    """The text of a message's content, which may be a list of parts."""
    content = message.get("content")
    return content if isinstance(content, str) else "".join(map(_text_of, _parts(content, thinking=False)))


def _parts(content: Any, *, thinking: bool) -> list[Any]:
    parts = content if isinstance(content, list) else []
    return [
        p for p in parts if isinstance(p, dict) and (p.get("type", "text") not in ("text", "output_text")) is thinking
    ]


def _text_of(part: Any) -> str:
    """All text in a part of a message, however deep."""
    if isinstance(part, str):
        return part
    if isinstance(part, list):
        return "".join(map(_text_of, part))
    if not isinstance(part, dict):
        return ""
    return "".join(
        _text_of(part[name]) for name in ("text", "thinking", "reasoning", "summary", "content") if name in part
    )
