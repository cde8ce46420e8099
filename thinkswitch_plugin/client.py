"""Ask an OpenAI-compatible server, and tell its troubles from those of a prompt.

The openai client retries refusals, dropped connections, 429 and 5xx by itself, with growing
pauses. What it leaves open is done here: a prompt is asked in a bounded number of such rounds,
before each further one the server must answer at all (for which it is waited), time-outs are not
multiplied by retries, and a body that is no chat completion is asked again instead of stored.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

import openai

from thinkswitch_plugin import batch, console, files
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.engines import Server, on_loopback
from thinkswitch_plugin.errors import ThinkSwitchError

CONNECT_SECONDS = 10.0
LONGEST_PAUSE = 8.0
Limits = type(openai.DEFAULT_CONNECTION_LIMITS)  # of whichever HTTP library this openai is built on
TIME_OUTS = 2  # a stalled connection deserves a second try, a prompt that is too long no more


T = TypeVar("T")


class Unanswered(Exception):
    """A prompt that could not be answered, and why."""


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, ended by a signal between the steps of its tasks, so that none of them prints a traceback.

    Raises `console.Interrupted` then, as the command line's own handlers do everywhere else.
    """
    stopped: list[int] = []
    with asyncio.Runner() as runner, ExitStack() as undo:
        loop = runner.get_loop()
        task = loop.create_task(work)

        def stop(number: int) -> None:
            stopped.append(number)
            undo.close()  # closing the loop would otherwise undo what comes now
            console.end_soon(number)
            task.cancel()

        for number in console.HANDLED if threading.current_thread() is threading.main_thread() else ():
            undo.callback(signal.signal, number, signal.getsignal(number))
            loop.add_signal_handler(number, stop, number)
            undo.callback(loop.remove_signal_handler, number)

        async def finished() -> T:
            return await task

        try:
            return runner.run(finished())
        except asyncio.CancelledError:
            if stopped:
                raise console.Interrupted(stopped[0]) from None
            raise


class Client:
    """Answers chat requests through one server, as one model."""

    def __init__(self, server: Server, model: str, keys: EngineKeys) -> None:
        self.server, self.model, self.keys = server, model, keys
        self.waiting = asyncio.Lock()
        self.openai = openai.AsyncOpenAI(
            base_url=server.base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=openai.Timeout(None, connect=CONNECT_SECONDS),  # `ask` bounds the whole answer
            http_client=openai.DefaultAsyncHttpxClient(
                # On a connection of its own an answer cannot be taken for that of the next prompt.
                limits=Limits(max_keepalive_connections=0),
                trust_env=not on_loopback(server.base_url),  # a proxy cannot reach our loopback
            ),
        )

    async def close(self) -> None:
        """Let go of all connections."""
        await self.openai.close()

    async def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """The chat completion body for one request body.

        Raises:
            Unanswered: the prompt was refused, or failed in every round.
            ThinkSwitchError: the server stays away, wants a key, or does not serve the model.
        """
        # `metadata` is ours; and whoever is served answers, also a candidate that the file does not name.
        sent = {**{k: v for k, v in body.items() if k != "metadata"}, "model": self.model}
        started, rounds, time_outs, problem = time.monotonic(), 0, 0, ""
        while rounds < self.keys.attempts and time_outs < TIME_OUTS:
            if problem:
                await asyncio.sleep(min(LONGEST_PAUSE, 0.25 * 2**rounds))
                await self.wait_until_back()
            rounds += 1
            try:
                async with asyncio.timeout(self.keys.timeout):
                    reply = await self.openai.post("/chat/completions", body=sent, cast_to=object)
            except TimeoutError:
                time_outs += 1
                problem = f"no answer within {self.keys.timeout:g} s (`thinkswitch.engine.timeout`)"
            except openai.NotFoundError as error:
                raise ThinkSwitchError(
                    f"The server at {self.server.base_url} does not serve this model ({error.message}); "
                    "start it with the model that requests.jsonl names."
                ) from None
            except (openai.AuthenticationError, openai.PermissionDeniedError):
                raise ThinkSwitchError(
                    f"The server at {self.server.base_url} refuses the key; set OPENAI_API_KEY."
                ) from None
            except openai.RateLimitError as error:
                problem = error.message
                if time.monotonic() - started < self.keys.outage:
                    rounds = max(0, rounds - 1)  # says nothing about the prompt
            except openai.APIStatusError as error:
                problem = error.message
                if error.status_code < 500 and error.status_code not in (408, 409):
                    raise Unanswered(problem) from None
            except openai.APIConnectionError as error:
                problem = f"connection lost ({str(error.__cause__ or '') or type(error.__cause__ or error).__name__})"
            except (ValueError, RecursionError, openai.OpenAIError) as error:
                problem = f"the server's answer is not JSON ({str(error)[:200]})"
            else:
                fault = batch.fault_of_completion(reply) or _fault_of_text(reply)
                if fault is None:
                    return dict(reply)  # type: ignore[call-overload]
                problem = f"the server's answer is no chat completion: {fault}"
        raise Unanswered(f"{problem}; asked {rounds} times")

    async def wait_until_back(self) -> None:
        """Return as soon as the server answers at all; one task asks for all.

        Raises `ThinkSwitchError` if it stays away for `thinkswitch.engine.outage` seconds, or was
        started here and has ended.
        """
        async with self.waiting:
            started, pause = time.monotonic(), 0.25
            while not await self._answers():
                self.server.require_alive()
                if time.monotonic() - started > self.keys.outage:
                    raise ThinkSwitchError(
                        f"The server at {self.server.base_url} has not answered for {self.keys.outage:g} s "
                        "(`thinkswitch.engine.outage`); answers so far are kept: start it and run the same "
                        "command again."
                    )
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    async def _answers(self) -> bool:
        once = self.openai.with_options(max_retries=0, timeout=CONNECT_SECONDS)
        try:
            await once.get("/models", cast_to=object)
        except openai.APIStatusError as error:
            return error.status_code < 500
        except openai.APIConnectionError:
            return False
        except ValueError:  # whatever it says, it answers
            return True
        return True


def ask_all(
    server: Server,
    model: str,
    bodies: Sequence[dict[str, Any]],
    keys: EngineKeys,
    answered: Callable[[], object] = lambda: None,
) -> list[dict[str, Any] | Unanswered]:
    """The chat completions for these request bodies, in order, or why there is none; `answered` is called after each.

    Raises `ThinkSwitchError` if the server stays away, wants a key, or does not serve the model.
    """

    async def ask() -> list[dict[str, Any] | Unanswered]:
        client, room = Client(server, model, keys), asyncio.Semaphore(keys.concurrency)

        async def one(body: dict[str, Any]) -> dict[str, Any] | Unanswered:
            async with room:
                try:
                    return await client.ask(body)
                except Unanswered as problem:
                    return problem
                finally:
                    answered()

        try:
            return list(await asyncio.gather(*(one(body) for body in bodies)))
        finally:
            await client.close()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run_async(ask())
    with ThreadPoolExecutor(1) as thread:  # a notebook's own loop is at work in this one
        return thread.submit(run_async, ask()).result()


def _fault_of_text(reply: Any) -> str | None:
    try:
        files.dumps_line(reply)
    except TypeError as error:  # half a surrogate pair, a number beyond 64 bit
        return f"it cannot be stored ({error})"
    return None
