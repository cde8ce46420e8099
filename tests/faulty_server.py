"""A real HTTP server on the loopback interface that fails in chosen ways.

What happens to a prompt is written in its last message: `answer 17`, or a fault and how often
it strikes before the answer comes, such as `reset:1 17` or `status-500:* 17` (always). The right
answer to a prompt is `echo: ` and the prompt, so a mix-up shows.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections import Counter
from contextlib import suppress
from types import TracebackType

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
    "no-text",
    "surrogate",
    "other-encoding",
    "stall",
)
HARMLESS = ("answer", "late", "twice", "stray")
FOREVER = ("status-400", "status-500", "reset", "truncated-json", "no-choices")


class FaultyServer:
    """Answers chat requests on 127.0.0.1 from a thread of its own, until the block ends."""

    def __init__(self, *, die_after: tuple[int, ...] = (), away: float = 1.0, return_at_all: bool = True) -> None:
        self.die_after, self.away, self.return_at_all = list(die_after), away, return_at_all
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.deaths = 0
        self.port = 0
        self.open_connections: set[asyncio.StreamWriter] = set()
        self.started = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

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
            server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1024)
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
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                length = next((int(h.split(":")[1]) for h in head.splitlines() if h.lower().startswith("content-l")), 0)
                body = await reader.readexactly(length)
                if head.startswith("GET"):
                    writer.write(http(200, {"data": [{"id": MODEL}]}))
                else:
                    await self._answer(writer, json.loads(body)["messages"][-1]["content"])
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.open_connections.discard(writer)
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, prompt: str) -> None:
        self.asked[prompt] += 1
        fault, _, times = prompt.split()[0].partition(":")
        strikes = bool(times) and (times == "*" or self.asked[prompt] <= int(times))
        if strikes:
            await self._fail(writer, fault, prompt)
            return
        good = http(200, completion(f"echo: {prompt}"))
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
    "no-text": http(200, {"choices": [{"message": {"content": [{"type": "text", "text": "a"}]}}]}),
    "surrogate": http(200, json.dumps(completion("half \ud83d")).encode()),
    "other-encoding": http(200, json.dumps(completion("ä"), ensure_ascii=False).encode("latin-1")),
}
