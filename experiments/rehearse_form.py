"""What runs inside vLLM during a rehearsal: every completion is held to a form, since random weights write nonsense.

ASGI middleware (`--middleware`), copied into a folder of its own beside `form.json`, the fields that are added to each
request: {"structured_outputs": {"regex": "[0-9]{40}</think>…"}}.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Form:
    """Adds the fields to every request for a completion."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.fields = json.loads(Path(__file__).with_name("form.json").read_text())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on a request, with its body changed if it is one for a completion."""
        if scope["type"] != "http" or not scope["path"].endswith("/completions"):
            return await self.app(scope, receive, send)
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        changed = json.dumps({**json.loads(body), **self.fields}).encode()
        length = (b"content-length", str(len(changed)).encode())
        scope["headers"] = [*(header for header in scope["headers"] if header[0] != length[0]), length]
        whole = [{"type": "http.request", "body": changed, "more_body": False}]

        async def receive_changed() -> Any:
            return whole.pop() if whole else await receive()

        await self.app(scope, receive_changed, send)
