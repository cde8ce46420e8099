"""Ask an OpenAI-compatible server, or several, and distinguish their failures from those of a prompt.

The openai client retries dropped connections, 429 and 5xx by itself, with growing pauses. The rest is done here: a
prompt is asked in a bounded number of such rounds, before each further one a server must answer at all, time-outs
are not multiplied by retries, a body that is not a chat completion is asked for again instead of stored, and what
every prompt would be refused for stops the run.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

import openai

from thinkswitch_plugin import files
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.data import batch
from thinkswitch_plugin.engines import connection, replies
from thinkswitch_plugin.engines.ask import Arrived, Reply, Request
from thinkswitch_plugin.engines.endpoint import LONGEST_PAUSE, Endpoint, rare_collections
from thinkswitch_plugin.engines.replies import Unanswered
from thinkswitch_plugin.engines.servers import Server
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run import processes

TIME_OUTS = 2  # a stalled connection deserves a second try, a prompt that is too long no more


T = TypeVar("T")


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, ended by a signal between the steps of its tasks, so that none of them prints a traceback.

    Raises `processes.Interrupted` then, as the command line's own handlers do everywhere else.
    """
    stopped: list[int] = []
    with asyncio.Runner() as runner, ExitStack() as undo:
        loop = runner.get_loop()
        task = loop.create_task(work)

        def stop(number: int) -> None:
            stopped.append(number)
            undo.close()  # closing the loop would otherwise undo what comes now
            processes.end_soon(number)
            task.cancel()

        for number in processes.HANDLED if threading.current_thread() is threading.main_thread() else ():
            undo.callback(signal.signal, number, signal.getsignal(number))
            loop.add_signal_handler(number, stop, number)
            undo.callback(loop.remove_signal_handler, number)

        async def finished() -> T:
            return await task

        try:
            return runner.run(finished())
        except asyncio.CancelledError:
            if stopped:
                raise processes.Interrupted(stopped[0]) from None
            raise


class Client:
    """Answers chat requests as one model, through one server or several that serve it."""

    def __init__(self, server: Server, model: str, keys: EngineKeys) -> None:
        self.model, self.keys = model, keys
        self.endpoints = [Endpoint(one, keys) for one in (server, *server.replicas)]
        self.waiting = asyncio.Lock()

    async def __aenter__(self) -> Client:
        for endpoint in self.endpoints:
            if endpoint.away:
                endpoint.leave_out()
        return self

    async def __aexit__(self, *_: object) -> None:
        for endpoint in self.endpoints:
            await endpoint.close()

    async def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """The chat completion body for one request body.

        Raises:
            Unanswered: the prompt was refused, or failed in every round.
            ThinkSwitchError: every server stays away, or one refuses what is the same for every prompt: the key, the
                model, a field of the request.
        """
        started, rounds, time_outs, problem, pause = time.monotonic(), 0, 0, "", 0.0
        at = self.idlest()
        while rounds < self.keys.attempts and time_outs < TIME_OUTS:
            if problem:
                await self._after_failure(at, max(pause, min(LONGEST_PAUSE, 0.25 * 2**rounds)))
                at = self.idlest(at)
            rounds, pause = rounds + 1, 0.0
            sent = self.request(body, at.server)
            try:
                async with asyncio.timeout(self.keys.timeout) as limit:
                    with at.client(limit) as client:
                        return await self._reply(client, sent, at.server)
            except TimeoutError:
                time_outs += not at.away
                problem = f"no answer within {self.keys.timeout:g} s (`thinkswitch.engine.timeout`)"
            except replies.Refusal as refusal:
                problem = connection.without_key(str(refusal))
                self._require_possible(refusal, problem, sent, at.server)
                left = self.keys.outage - (time.monotonic() - started)
                pause = min(refusal.retry_after, max(0, left))
                if refusal.status == 429 and left > 0:
                    rounds = max(0, rounds - 1)  # not the prompt's fault
                elif 400 <= refusal.status < 500 and refusal.status not in (408, 409, 429):
                    raise Unanswered(problem) from None
            except openai.APIConnectionError as error:
                if fault := connection.untrusted(at.server.base_url, error):
                    raise fault from None
                problem = f"connection lost ({str(error.__cause__ or '') or type(error.__cause__ or error).__name__})"
            except (ValueError, RecursionError, openai.OpenAIError) as error:
                problem = f"the server's answer is not a chat completion: {str(error)[:200]}"
        raise Unanswered(f"{problem}; asked {rounds} times")

    def idlest(self, failed: Endpoint | None = None) -> Endpoint:
        """The server with the fewest requests in flight among those that answer, if possible not the one that failed."""
        there = [one for one in self.endpoints if not one.away] or self.endpoints
        return min(there, key=lambda one: (one is failed, one.in_flight))

    async def _after_failure(self, at: Endpoint, pause: float) -> None:
        """Wait before the next attempt; not if the server turns out to be away and another can be asked."""
        if len(self.endpoints) > 1:
            await at.check()
            if at.away and not all(one.away for one in self.endpoints):
                return
        await asyncio.sleep(pause)
        await self.wait_until_back(at)

    async def wait_until_back(self, at: Endpoint) -> None:
        """Return as soon as a server answers.

        Raises `ThinkSwitchError` if all stay away for `thinkswitch.engine.outage` seconds, or the one that failed was
        started here and has ended.
        """
        await at.check()
        async with self.waiting:  # one task looks for all
            started = time.monotonic()
            while all(one.away for one in self.endpoints):
                at.server.require_alive()
                if time.monotonic() - started > self.keys.outage:
                    named = " or ".join(one.server.base_url for one in self.endpoints)
                    raise ThinkSwitchError(
                        f"The server at {named} has not answered for {self.keys.outage:g} s "
                        "(`thinkswitch.engine.outage`); answers so far are kept: start it and run the same "
                        "command again."
                    )
                await asyncio.sleep(0.1)

    def request(self, body: dict[str, Any], server: Server) -> dict[str, Any]:
        """The body as it is sent to a server, for the model that it serves, whatever the file names."""
        sent = {k: v for k, v in body.items() if k != "metadata"} | {"model": self.model}
        if server.keeps_special:
            sent["skip_special_tokens"] = False  # where a model's trace tags are special, the trace would lose them
        if sent.get("top_k") in (0, -1):  # off
            sent["top_k"] = -1
            if not server.keeps_special:
                del sent["top_k"]
        if server.process is not None:
            return sent
        keys = self.keys.server
        if keys.stream:
            sent |= {"stream": True, "stream_options": {"include_usage": True}}
        renamed: dict[Any, str] = {**keys.rename}
        return keys.add | {renamed.get(k, k): v for k, v in sent.items() if k not in keys.omit}

    async def _reply(self, client: openai.AsyncOpenAI, sent: dict[str, Any], server: Server) -> dict[str, Any]:
        """One attempt. Raises what the openai client raises, and `ValueError` for a reply that cannot be stored."""
        path = "/completions" if "prompt_embeds" in sent else "/chat/completions"  # of a prompt without text
        try:
            data = await client.post(path, body=sent, cast_to=bytes)
        except openai.APIStatusError as error:
            wait = error.response.headers.get("retry-after", "")
            raise replies.Refusal(error.status_code, error.body, float(wait) if wait.isdigit() else 0.0) from None
        try:
            reply = replies.completion(data, streamed="stream" in sent)
        except replies.Streamed as error:
            raise ThinkSwitchError(_wants_stream(server, str(error))) from None
        except replies.Unreadable as error:
            raise Unanswered(f"the server's answer is not a chat completion: {error}") from None
        if fault := batch.fault_of_completion(reply):
            raise ValueError(fault)
        try:
            files.dumps_line(reply)
        except TypeError as error:  # half a surrogate pair, a number beyond 64 bit
            raise ValueError(f"it cannot be stored ({error})") from None
        message = reply["choices"][0]["message"]
        if message.get("refusal") and not message.get("content"):
            raise Unanswered(f"the model refused: {message['refusal'][:500]}")
        return dict(reply)

    def _require_possible(self, refusal: replies.Refusal, words: str, sent: dict[str, Any], server: Server) -> None:
        """Raise `ThinkSwitchError` for a refusal that every other prompt would meet too."""
        at = f"The server at {server.base_url}"
        if refusal.status == 412 and server.weights:
            raise ThinkSwitchError(f"{at} has other weights now ({words}).")
        if server.process is None and refusal.status in (0, 400, 404, 405, 422, 501):
            if "stream" not in sent and replies.wants_stream(words):
                raise ThinkSwitchError(_wants_stream(server, words))
            if field := replies.refused_field(words, sent):
                raise ThinkSwitchError(
                    f"{at} does not take the field `{field}` ({words}); {self._instead(field, words)}."
                )
        if refusal.status in (404, 405, 410) or refusal.unknown_model:
            raise ThinkSwitchError(
                f"{at} does not serve {self.model} ({words}); set `thinkswitch.engine.server.model` to a name that "
                "it knows, or correct the address in ENGINE=."
            )
        if refusal.status in (401, 402, 403) or refusal.code == "insufficient_quota":
            advice = "set" if refusal.status == 401 else "see to the account of the key in"
            raise ThinkSwitchError(f"{at} refuses the key ({words}); answers so far are kept: {advice} OPENAI_API_KEY.")

    def _instead(self, field: str, words: str) -> str:
        """Which key keeps a field from being sent."""
        keys, here = self.keys.server, "`thinkswitch.engine.server."
        if field in keys.add or field == "stream":
            return f"take it out of {here}add`" if field in keys.add else f"take out {here}stream`"
        ours = next((name for name, theirs in keys.rename.items() if theirs == field), field)
        if ours == "max_tokens" and "max_completion_tokens" in words and field != "max_completion_tokens":
            return f"set {here}rename: {{max_tokens: max_completion_tokens}}`"
        return f"leave it out by {here}omit: [{ours}]`, or give it the server's name for it by {here}rename`"


def _wants_stream(server: Server, words: str) -> str:
    return (
        f"The server at {server.base_url} answers only by a stream ({words}); "
        "set `thinkswitch.engine.server.stream: true`."
    )


@dataclass(frozen=True)
class ServedModel:
    """A model of a server, or of several that serve the same, as an `Asker`; `fields` are added to every request body."""

    server: Server
    model: str
    keys: EngineKeys
    fields: Mapping[str, Any] = field(default_factory=dict)

    def ask(self, requests: Iterable[Request], arrived: Arrived) -> None:
        """As `Asker.ask`, many at once; raises as `Client.ask`."""
        try:
            beside = asyncio.get_running_loop() is not None  # a notebook's own loop runs in this thread
        except RuntimeError:
            beside = False
        if beside:
            with ThreadPoolExecutor(1) as thread:
                thread.submit(run_async, self._ask(requests, arrived)).result()
        else:
            with rare_collections():
                run_async(self._ask(requests, arrived))

    def close(self) -> None:
        """Nothing to release: a server uses no memory of this process."""

    async def _ask(self, requests: Iterable[Request], arrived: Arrived) -> None:
        left, stopped = iter(requests), asyncio.Event()
        async with Client(self.server, self.model, self.keys) as client:

            async def reply_to(request: Request) -> Reply:
                try:
                    return await client.ask({**request["body"], **self.fields})
                except Unanswered as problem:
                    return problem

            async def answer_some() -> None:
                for request in left:  # all of these tasks take from one iterator, so memory stays flat for any file
                    if stopped.is_set():  # a connection that is being made may swallow that its task is cancelled
                        return
                    if again := arrived(request, await reply_to(request)):
                        arrived(again, await reply_to(again))

            tasks: list[asyncio.Task[None]] = []
            try:
                for _ in range(self.keys.concurrency):
                    tasks.append(asyncio.create_task(answer_some()))
                    await asyncio.sleep(0)  # thousands at once would keep each other from connecting in time
                await asyncio.gather(*tasks)
            finally:
                stopped.set()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
