"""A real HTTP server on the loopback interface that fails in chosen ways.

What happens to a prompt is written in its last message: `answer 17`, or a fault and how often
it strikes before the answer comes, such as `reset:1 17` or `status-500:* 17` (always). `parts 17`
answers in one of the shapes that servers give a chat completion. The right answer to a prompt is
`echo: ` and the prompt, so a mix-up shows. What a server refuses or lists is told to `FaultyServer`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

MODEL = "m"
ONCE = (
    "status-500",
    "status-503",
    "status-429",
    "reset",
    "half",
    "truncated-json",
    "html",
    "empty",
    "no-choices",
    "error-200",
    "surrogate",
    "other-encoding",
    "stall",
)
HARMLESS = ("answer", "late", "twice", "stray", "parts", "float-count", "eos", "null-finish", "thinking-parts")
FOREVER = ("status-400", "status-500", "reset", "truncated-json", "no-choices")


class FaultyServer:
    """Answers chat requests on 127.0.0.1 from a thread of its own, until the block ends."""

    def __init__(
        self,
        *,
        die_after: tuple[int, ...] = (),
        away: float = 1.0,
        return_at_all: bool = True,
        models: tuple[int, object] | dict[str, tuple[int, object]] = (200, {"data": [{"id": "m"}]}),
        refuse: Callable[[dict[str, Any]], tuple[int, object] | None] = lambda body: None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Args:
        models: status and body of the list of models, or these by path.
        refuse: the status and body with which a request is refused, None for one that is answered.
        """
        self.die_after, self.away, self.return_at_all = list(die_after), away, return_at_all
        self.models = models if isinstance(models, dict) else {"/v1/models": models}
        self.refuse, self.tls = refuse, tls
        self.seen: list[dict[str, Any]] = []
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.deaths = self.most_connections = 0
        self.port = 0
        self.open_connections: set[asyncio.StreamWriter] = set()
        self.started = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> FaultyServer:
        self.thread.start()
        assert self.started.wait(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(RuntimeError):  # the loop has ended by itself; the test's own error counts
            self.loop.call_soon_threadsafe(self.ended.set)
        self.thread.join(10)

    async def _run(self) -> None:
        self.loop, self.ended, self.dying = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        while not self.ended.is_set():
            server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=4096, ssl=self.tls)
            self.port = server.sockets[0].getsockname()[1]
            self.started.set()
            waits = [asyncio.create_task(event.wait()) for event in (self.ended, self.dying)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            server.close()
            for connection in list(self.open_connections):
                reset(connection)
            if self.dying.is_set() and not self.ended.is_set():
                self.deaths += 1
                self.dying.clear()
                if not self.return_at_all:
                    await self.ended.wait()
                await asyncio.sleep(self.away)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open_connections.add(writer)
        self.most_connections = max(self.most_connections, len(self.open_connections))
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                length = next((int(h.split(":")[1]) for h in head.splitlines() if h.lower().startswith("content-l")), 0)
                body = await reader.readexactly(length)
                if head.startswith("GET"):
                    writer.write(http(*self.models.get(head.split()[1], (404, {"detail": "Not Found"}))))
                else:
                    await self._receive(writer, json.loads(body))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.open_connections.discard(writer)
            writer.close()

    async def _receive(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        self.seen.append(body)
        prompt = body["messages"][-1]["content"]
        self.asked[prompt] += 1
        if refused := self.refuse(body):
            writer.write(http(*refused))
        elif body.get("stream"):
            whole = not (prompt.startswith("broken:1") and self.asked[prompt] == 1)
            writer.write(http(200, stream(prompt, whole=whole), "text/event-stream"))
        else:
            await self._answer(writer, prompt)

    async def _answer(self, writer: asyncio.StreamWriter, prompt: str) -> None:
        fault, _, times = prompt.split()[0].partition(":")
        if fault == "wait":  # a number of seconds
            await asyncio.sleep(float(times))
            times = ""
        strikes = bool(times) and (times == "*" or self.asked[prompt] <= int(times))
        if strikes:
            await self._fail(writer, fault, prompt)
            return
        good = http(200, SHAPES.get(fault, completion)(f"echo: {prompt}"))
        if fault == "late":
            await asyncio.sleep(0.001 * (sum(prompt.encode()) % 200))
        writer.write(
            {"twice": good + good, "stray": good + http(200, completion("echo: a stray answer"))}.get(fault, good)
        )
        self.answered[prompt] += 1
        if self.die_after and self.answered.total() >= self.die_after[0]:
            self.die_after.pop(0)
            self.dying.set()

    async def _fail(self, writer: asyncio.StreamWriter, fault: str, prompt: str) -> None:
        good = http(200, completion(f"echo: {prompt}"))
        if fault.startswith("status-"):
            status = int(fault.removeprefix("status-"))
            writer.write(http(status, {"error": {"message": f"a {status}"}}))
        elif fault == "reset":
            reset(writer)
        elif fault == "half":
            writer.write(good[: len(good) // 2])
            writer.write_eof()
        elif fault == "stall":
            await asyncio.sleep(3600)
        else:
            writer.write(BODIES[fault])


def completion(text: str) -> dict[str, object]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "x",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"completion_tokens": 3},
    }


def shaped(finish: object = "stop", tokens: object = 3, **message: object) -> dict[str, object]:
    """A completion with a message, finish reason and count of tokens in another shape."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}
    return {"id": "x", "choices": [choice], "usage": {"completion_tokens": tokens}}


def part(text: str) -> dict[str, object]:
    return {"type": "text", "text": text}


# How servers shape a whole chat completion; the trace, if there is one, is `why`.
SHAPES: dict[str, Callable[[str], dict[str, object]]] = {
    "parts": lambda text: shaped(content=[part(text[:3]), part(text[3:])]),
    "float-count": lambda text: shaped(tokens=3.0, content=text),
    "text-count": lambda text: shaped(tokens="3", content=text),
    "no-count": lambda text: shaped(tokens={"of": "many"}, content=text),
    "long": lambda text: shaped(content=text) | {"padding": "x" * 2000},
    "eos": lambda text: shaped(finish="eos", content=text),
    "null-finish": lambda text: shaped(finish=None, content=text),
    "thinking-parts": lambda text: shaped(content=[{"type": "thinking", "thinking": [part("why")]}, part(text)]),
    "reasoning": lambda text: shaped(content=text, reasoning="why"),
    "reasoning_content": lambda text: shaped(content=text, reasoning_content="why"),
    "reasoning_text": lambda text: shaped(content=text, reasoning_text="why"),
    "thinking": lambda text: shaped(content=text, thinking="why"),
    "thinking_blocks": lambda text: shaped(content=text, thinking_blocks=[{"type": "thinking", "thinking": "why"}]),
    "reasoning_details": lambda text: shaped(
        content=text, reasoning=None, reasoning_details=[{"type": "reasoning.text", "text": "why"}]
    ),
}


def stream(prompt: str, *, whole: bool = True) -> bytes:
    """A completion with a trace as server-sent events; or only their beginning."""
    text = f"echo: {prompt}"
    deltas: list[dict[str, object]] = [{"role": "assistant", "content": ""}]
    deltas += [{"reasoning_content": "wh"}, {"reasoning_content": "y"}]
    deltas += [{"content": text[:4]}, {"content": text[4:]}, {}]
    events: list[dict[str, object]] = [
        {"id": "x", "choices": [{"index": 0, "delta": d, "finish_reason": None if d else "stop"}]} for d in deltas
    ]
    events.append({"id": "x", "choices": [], "usage": {"completion_tokens": 3}})
    lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
    return "".join([": keep-alive\n\n", *(lines if whole else lines[:4])]).encode()


def http(status: int, value: object, kind: str = "application/json") -> bytes:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\nretry-after-ms: 50\r\n\r\n"
    return head.encode() + data


def reset(writer: asyncio.StreamWriter) -> None:
    """Drop a connection the way a killed process does."""
    with suppress(OSError):  # it may be closed already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


BODIES = {
    "truncated-json": http(200, json.dumps(completion("cut")).encode()[:-20]),
    "html": http(200, b"<html>Bad gateway</html>", "text/html"),
    "empty": http(200, b""),
    "no-choices": http(200, {"id": "x", "choices": []}),
    "no-text": http(200, {"choices": [{"message": {"content": [{"type": "image_url", "image_url": {}}]}}]}),
    "error-200": http(200, {"error": {"message": "the provider is busy", "code": 502}}),
    "refusal": http(200, shaped(content=None, refusal="I cannot help with that.")),
    "choice-error": http(200, {"choices": [{"error": {"message": "the filter struck", "code": 400}, "message": {}}]}),
    "stream-unasked": http(200, stream("x"), "text/event-stream"),
    "surrogate": http(200, json.dumps(completion("half \ud83d")).encode()),
    "other-encoding": http(200, json.dumps(completion("ä"), ensure_ascii=False).encode("latin-1")),
}
