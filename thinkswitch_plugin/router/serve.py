"""`thinkswitch serve --switch`: one OpenAI-compatible endpoint in front of a pair, and a page to chat with it.

    curl -s http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \
      -d '{"messages": [{"role": "user", "content": "7*3+4*2"}], "threshold": 0.5}'

The reply names the checkpoint that answered in the header `X-ThinkSwitch-Mode` and in the field `thinkswitch`; a
refused request gets the reason in OpenAI's form.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from thinkswitch_plugin import console, conventions
from thinkswitch_plugin.engines.connection import LOOPBACK
from thinkswitch_plugin.engines.servers import free_port
from thinkswitch_plugin.report.page import policy
from thinkswitch_plugin.router.served import MODEL, ChatRequest, Refused, ServedSwitch
from thinkswitch_plugin.router.switch import Switch

PAGE = Path(__file__).with_name("chat.html")


def application(switch: Switch) -> Starlette:
    """The endpoint as an ASGI application."""
    served = ServedSwitch(switch)

    async def chat(request: Request) -> Response:
        asked = ChatRequest.read(await request.body())
        found = served.decide(asked)
        if not asked.stream:
            return JSONResponse(await served.answer(found), headers=found.headers)
        events = served.events(found)
        first = await anext(events)  # a request that is refused gets a status, not a stream
        return StreamingResponse(_as_lines(first, events), media_type="text/event-stream", headers=found.headers)

    async def models(_: Request) -> Response:
        convention = switch.run.recipe.keys.convention or conventions.CONVENTIONS[0]
        about = {"threshold": switch.threshold, "closes": convention.closes, "domain": switch.run.recipe.keys.domain}
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "thinkswitch", "thinkswitch": about}
        return JSONResponse({"object": "list", "data": [model]})

    async def page(_: Request) -> Response:
        return chat_page()

    async def refused(_: Request, problem: Exception) -> Response:
        assert isinstance(problem, Refused)
        return JSONResponse(problem.body, problem.status)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as open_clients:
            for client in served.clients.values():
                await open_clients.enter_async_context(client)
            yield

    return Starlette(
        routes=[
            Route("/", page),
            Route("/v1/models", models),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ],
        # A web page elsewhere must not reach it under a name of its own.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[LOOPBACK, "localhost"])],
        exception_handlers={Refused: refused},
        lifespan=lifespan,
    )


async def _as_lines(first: dict[str, Any], events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Chunks as server-sent events; a failure on the way is the last one."""
    yield b"data: %b\n\n" % orjson.dumps(first)
    try:
        async for event in events:
            yield b"data: %b\n\n" % orjson.dumps(event)
    except Refused as problem:
        yield b"data: %b\n\n" % orjson.dumps(problem.body)
        return
    yield b"data: [DONE]\n\n"


def chat_page() -> Response:
    """The page, with a policy under which it loads nothing and asks this endpoint only."""
    text = PAGE.read_text(encoding="utf-8")
    style, script = (text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0] for tag in ("style", "script"))
    return HTMLResponse(
        text, headers={"Content-Security-Policy": f"{policy(style, script)}; connect-src 'self'; img-src data:"}
    )


def serve_switch(switch: Switch, port: int) -> None:
    """Serve until the process is stopped. Raises `ThinkSwitchError` if the port is taken."""
    import uvicorn

    port = free_port(port)
    console.say(f"  http://{LOOPBACK}:{port}/v1, model `{MODEL}`; a page to chat: http://{LOOPBACK}:{port}/")
    uvicorn.run(application(switch), host=LOOPBACK, port=port, log_level="warning", timeout_graceful_shutdown=5)
