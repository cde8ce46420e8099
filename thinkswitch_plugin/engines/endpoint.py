"""One server of those that answer: its connections, how many requests are in flight there, and whether it answers."""

from __future__ import annotations

import asyncio
import gc
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import httpx
import openai

from thinkswitch_plugin import console
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.engines import connection
from thinkswitch_plugin.engines.servers import Server

LONGEST_PAUSE = 8.0
TRIES = 3  # of the client library, in a round
WEIGHTS = "X-ThinkSwitch-Weights"  # a vLLM with other weights than these refuses to answer; see `live_worker.Guard`
LOST = 30.0  # seconds; a machine that is off says nothing about the requests that it had
OBJECTS = 50_000  # new ones between two collections
IN_A_POOL = 64  # for every request httpx searches its whole pool of connections, so thousands in one take very long


@contextmanager
def rare_collections() -> Iterator[None]:
    """Have Python look for unreachable objects less often: with thousands in flight that takes a third of the time."""
    usual = gc.get_threshold()
    gc.set_threshold(OBJECTS, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


@dataclass
class Pool:
    """An openai client, and how many requests it has in flight."""

    openai: openai.AsyncOpenAI
    in_flight: int = 0


class Endpoint:
    """One server. `away` from when it stops answering until it answers again."""

    def __init__(self, server: Server, keys: EngineKeys) -> None:
        self.server, self.keys = server, keys
        self.transport = connection.transport(server.base_url)
        if self.transport["verify"] is True:  # certificates are read once, not for every pool
            self.transport["verify"] = httpx.create_ssl_context()
        self.away = server.away
        self.limits: set[asyncio.Timeout] = set()  # of the requests in flight
        self.pools = [self._pool()]
        self.checking = asyncio.Lock()
        self.watch: asyncio.Task[None] | None = None

    def _pool(self) -> Pool:
        server = self.server
        client = openai.AsyncOpenAI(
            base_url=server.base_url,
            api_key=server.token or connection.api_key() or "none",
            timeout=openai.Timeout(None, connect=connection.CONNECT_SECONDS),  # `Client.ask` bounds the whole answer
            max_retries=TRIES - 1,
            # On a connection of its own an answer cannot be taken for that of the next prompt.
            default_headers={"Connection": "close", **({WEIGHTS: server.weights} if server.weights else {})},
            http_client=openai.DefaultAsyncHttpxClient(**self.transport),
        )
        return Pool(client)

    @property
    def in_flight(self) -> int:
        """How many requests wait for their answers there."""
        return len(self.limits)

    @contextmanager
    def client(self, limit: asyncio.Timeout) -> Iterator[openai.AsyncOpenAI]:
        """A client for one request, which `limit` bounds; a further one is made if all have `IN_A_POOL` in flight."""
        pool = next((pool for pool in self.pools if pool.in_flight < IN_A_POOL), None)
        if pool is None:
            self.pools.append(pool := self._pool())
        pool.in_flight += 1
        self.limits.add(limit)
        try:
            yield pool.openai
        finally:
            pool.in_flight -= 1
            self.limits.discard(limit)

    async def check(self) -> None:
        """Find out whether the server still answers, after a request failed there; the failed requests ask once."""
        async with self.checking:
            self.server.require_alive()
            if not self.away and not await self.answers():
                console.notice(f"  the server at {self.server.base_url} does not answer; waiting for it")
                self.leave_out()

    def leave_out(self) -> None:
        """Send no more requests there until the server answers again."""
        self.away = True
        self.watch = asyncio.create_task(self._return())

    async def _return(self) -> None:
        started, pause = time.monotonic(), 0.25
        while not await self.answers():
            if time.monotonic() - started > LOST:
                for limit in [limit for limit in self.limits if not limit.expired()]:
                    limit.reschedule(0)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        self.away = False
        console.notice(f"  the server at {self.server.base_url} answers again")

    async def answers(self) -> bool:
        """Whether the server answers at all. The API of a vLLM may outlive its engine, so its `/health` counts too."""
        once = self.pools[0].openai.with_options(max_retries=0, timeout=connection.CONNECT_SECONDS)
        paths = ["/models"]
        if self.server.keeps_special:
            paths.insert(0, re.sub(r"/v\d+$", "", self.server.base_url) + "/health")
        for path in paths:
            try:
                await once.get(path, cast_to=bytes)
            except openai.APIStatusError as error:
                if error.status_code >= 500:
                    return False
            except openai.APIConnectionError:
                return False
        return True

    async def close(self) -> None:
        """Close all connections."""
        if self.watch is not None:
            self.watch.cancel()
            with suppress(asyncio.CancelledError):
                await self.watch
        for pool in self.pools:
            await pool.openai.close()
