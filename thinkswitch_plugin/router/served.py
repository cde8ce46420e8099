"""Chat requests to a pair: the router decides for each whether instruct or thinking answers; `serve.py` speaks HTTP.

    {"messages": [{"role": "user", "content": "7*3+4*2"}], "threshold": 0.5}
    {"choices": […], "thinkswitch": {"mode": "thinking", "p_think": 0.81, "threshold": 0.5}}

A request is answered, or refused with a reason; if the server of one mode has gone, the other one still answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
from pydantic import BaseModel, Field, ValidationError

from thinkswitch_plugin.data import messages, prompts
from thinkswitch_plugin.engines import connection, replies
from thinkswitch_plugin.engines.ask import ask_in_order
from thinkswitch_plugin.engines.client import Client
from thinkswitch_plugin.engines.replies import Unanswered
from thinkswitch_plugin.errors import ThinkSwitchError, first_fault, first_line
from thinkswitch_plugin.router.switch import Switch
from thinkswitch_plugin.run import MODES

MODEL = "switch"
BAD_REQUEST, NO_ANSWER = 400, 502
OUTAGE = 5.0  # seconds that a request waits if no server of its mode answers
FAILURES = (Unanswered, ThinkSwitchError, openai.OpenAIError, httpx.HTTPError, TimeoutError, ValueError)


class Refused(Exception):
    """A request that gets no answer: an HTTP status and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's API writes an error."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "code": self.status}}


class ChatRequest(BaseModel, extra="allow"):
    """What is read of a request; other fields are passed on to the checkpoint's server."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    model: str = MODEL
    stream: bool | None = False
    threshold: float | None = Field(None, ge=0, le=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, gt=0)
    max_completion_tokens: int | None = Field(None, gt=0)

    @classmethod
    def read(cls, data: bytes) -> ChatRequest:
        """Parse the body of a request. Raises `Refused` naming the field that is wrong."""
        try:
            found = cls.model_validate_json(data)
        except ValidationError as error:
            raise Refused(BAD_REQUEST, first_fault(error)) from None
        if found.model != MODEL:
            raise Refused(404, f"The model `{found.model}` does not exist; this endpoint has one, `{MODEL}`.")
        return found


@dataclass(frozen=True)
class Decision:
    """Who answers a request, and why; `body` is what that checkpoint is asked."""

    mode: str
    p_think: float
    threshold: float
    body: dict[str, Any]

    @property
    def field(self) -> dict[str, Any]:
        """What every reply says of it."""
        return {"thinkswitch": {"mode": self.mode, "p_think": round(self.p_think, 6), "threshold": self.threshold}}

    @property
    def headers(self) -> dict[str, str]:
        """The same as headers."""
        return {"X-ThinkSwitch-Mode": self.mode, "X-ThinkSwitch-P-Think": f"{self.p_think:.6f}"}


class ServedSwitch:
    """A switch behind HTTP. A mode with a server is asked there; the checkpoint of another one is loaded in process."""

    def __init__(self, switch: Switch) -> None:
        self.switch = switch
        self.clients: dict[str, Client] = {}
        for mode, served in switch.served.items():
            # Who waits for an answer gets a reason soon; a further attempt is for a further server of the mode.
            soon = {"attempts": 1 + len(served.server.replicas), "outage": OUTAGE}
            self.clients[mode] = Client(served.server, served.model, served.keys.model_copy(update=soon))
        self.waiting: dict[str, list[tuple[dict[str, Any], asyncio.Future[Any]]]] = {mode: [] for mode in MODES}
        self.turn = asyncio.Lock()

    def decide(self, chat: ChatRequest) -> Decision:
        """Ask the router. User turns are put into the domain's template, and what a request leaves out is the recipe's.

        Raises `Refused` if a turn cannot be asked.
        """
        switch, keys = self.switch, self.switch.run.recipe.keys
        turns = [self._turn(number, turn) for number, turn in enumerate(chat.messages)]
        question = next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), None)
        if question is None:
            raise Refused(BAD_REQUEST, "`messages`: there is no turn of the user.")
        if not any(turn["role"] in ("system", "developer") for turn in turns):
            turns = [*prompts.messages(keys.prompts, "")[:-1], *turns]
        p = float(switch.router.p_think([question])[0])
        threshold = switch.threshold if chat.threshold is None else chat.threshold
        mode = "thinking" if p >= threshold else "instruct"
        given = {name: value for name, value in chat.model_dump().items() if value is not None}
        body = prompts.request_body(MODEL, turns, keys.sampling, switch.run.seed)
        if "max_completion_tokens" in given:
            body["max_tokens"] = given.pop("max_completion_tokens")
        kwargs = keys.pair.arguments(mode)
        body |= {"chat_template_kwargs": kwargs} if kwargs else {}
        body |= {name: given[name] for name in given.keys() - {"messages", "model", "stream", "threshold"}}
        body |= switch.served[mode].fields if mode in switch.served else {}
        return Decision(mode, p, threshold, body)

    def _turn(self, number: int, turn: dict[str, Any]) -> dict[str, Any]:
        """A turn as it is asked. Raises `Refused` naming it if it is not text."""
        where = f"`messages.{number}`"
        if turn.get("role") not in ("system", "developer", "user", "assistant"):
            raise Refused(BAD_REQUEST, f"{where}: the role must be system, user or assistant.")
        try:
            text = messages.texts(turn).get("content", "")
            if turn["role"] == "user":
                text = prompts.as_asked(self.switch.run.recipe.keys.prompts, text)[0]
        except (ValueError, ThinkSwitchError) as problem:
            raise Refused(BAD_REQUEST, f"{where}: {problem}") from None
        return {**turn, "content": text}

    async def answer(self, found: Decision) -> dict[str, Any]:
        """The chat completion. Raises `Refused` if the checkpoint gives none."""
        try:
            client = self.clients.get(found.mode)
            reply = await (client.ask(found.body) if client else self._in_process(found))
        except FAILURES as problem:
            raise self.refusal(found, problem) from None
        return reply | {"model": MODEL} | found.field

    async def events(self, found: Decision) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a streamed chat completion as they come.

        Raises `Refused` if there is none, or it broke off; a checkpoint in process gives all of its answer at once.
        """
        client = self.clients.get(found.mode)
        if client is None:
            reply = await self.answer(found)
            (choice,) = reply["choices"]
            piece = {"index": 0, "delta": choice["message"], "finish_reason": choice["finish_reason"]}
            yield reply | {"object": "chat.completion.chunk", "choices": [piece]}
            return
        ended, at = False, client.idlest()
        sent = client.request(found.body, at.server) | {"stream": True}
        try:
            async with asyncio.timeout(client.keys.timeout) as limit:
                with at.client(limit) as asked:
                    chunks = await asked.post(
                        "/chat/completions",
                        body=sent,
                        cast_to=object,
                        stream=True,
                        stream_cls=openai.AsyncStream[object],
                    )
                    async for chunk in chunks:
                        event = dict(chunk) if isinstance(chunk, dict) else {}
                        ended = ended or any(choice.get("finish_reason") for choice in event.get("choices") or [])
                        yield event | {"model": MODEL} | found.field
            if not ended:
                raise ValueError("the stream broke off before its end")
        except FAILURES as problem:
            if len(client.endpoints) > 1:
                await at.check()  # the next request goes to another server
            raise self.refusal(found, problem) from None

    def refusal(self, found: Decision, problem: BaseException) -> Refused:
        """Why a checkpoint gave no answer; what its server refused is the request's fault, the rest is not."""
        status, cause = NO_ANSWER, problem.__context__
        words = first_line(problem) if str(problem) else type(problem).__name__
        if isinstance(problem, openai.APIStatusError):
            status, words = problem.status_code, replies.words_of(problem.body)
        elif isinstance(cause, replies.Refusal) and isinstance(problem, Unanswered):
            status = cause.status
        elif isinstance(problem, openai.APIConnectionError):
            words = str(problem.__cause__ or problem)
        urls = [one.server.base_url for one in self.clients[found.mode].endpoints] if found.mode in self.clients else []
        at = f" at {' or '.join(urls)}" if urls else ""
        reason = f"The {found.mode} checkpoint{at} gave no answer ({connection.without_key(words)})."
        return Refused(status if status in (400, 413, 422, 429) else NO_ANSWER, reason)

    async def _in_process(self, found: Decision) -> dict[str, Any]:
        """As `answer`, from the checkpoint in memory: all that waits for one mode is answered as one batch."""
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.waiting[found.mode].append((found.body, future))
        async with self.turn:
            batch, self.waiting[found.mode] = self.waiting[found.mode], []
            try:
                answered = await asyncio.to_thread(self._batch, found.mode, [body for body, _ in batch])
            except BaseException as problem:
                for _, waiting in batch:
                    if not waiting.done():
                        waiting.set_exception(Unanswered(first_line(problem)))
                if not isinstance(problem, Exception):
                    raise
            else:
                for (_, waiting), reply in zip(batch, answered, strict=True):
                    if not waiting.done():
                        waiting.set_result(reply)
        return await future

    def _batch(self, mode: str, bodies: list[dict[str, Any]]) -> list[Any]:
        return ask_in_order(self.switch.in_process(mode), bodies) if bodies else []
