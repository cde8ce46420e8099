"""The endpoint of the switch, over real HTTP: who is asked, what the reply says, what is refused; and its page in Chromium."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from click.testing import CliRunner

from tests import browser, report_run
from tests.faulty_server import FaultyServer
from thinkswitch_plugin.cli import main
from thinkswitch_plugin.engines import servers
from thinkswitch_plugin.engines.client import ServedModel
from thinkswitch_plugin.router import serve
from thinkswitch_plugin.router.classifier import Router, candidates, describe
from thinkswitch_plugin.router.switch import Switch
from thinkswitch_plugin.run import MODES, Run, open_run

EASY, HARD = "answer 1+2", "answer 3*4*5"  # `answer` tells the fake server to answer at once
THINK, DIRECT = {"threshold": 0}, {"threshold": 1}


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Router]:
    """A run, and a router that has learnt that products need thinking."""
    questions = [f"answer {a}{op}{b}{op}{a}" for op in "+*" for a in range(1, 8) for b in range(1, 8)]
    name = "length, characters; logistic regression, C 10"
    router = Router(name, candidates(0)[name].fit(describe(questions), ["*" in q for q in questions]))
    return open_run(report_run.make_run(tmp_path_factory.mktemp("run"), questions=2, iterations=1)), router


@contextmanager
def running(routed: tuple[Run, Router], **urls: str) -> Iterator[str]:
    """The endpoint's address; `urls` are those of the modes' servers."""
    run, router = routed
    served = {mode: ServedModel(servers.connect(url, "m"), "m", run.recipe.keys.engine) for mode, url in urls.items()}
    switch = Switch(run, {mode: run.checkpoint(mode, 1) for mode in MODES}, router, 0.5, served)
    port = servers.free_port(0)
    server = uvicorn.Server(uvicorn.Config(serve.application(switch), port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def started(routed: tuple[Run, Router]) -> Iterator[tuple[str, FaultyServer, FaultyServer]]:
    """The endpoint, with a server for each mode; they refuse a question with the word `never`."""

    def refuse(body: dict[str, Any]) -> tuple[int, object] | None:
        return (400, {"error": {"message": "too long"}}) if "never" in body["messages"][-1]["content"] else None

    with (
        FaultyServer(refuse=refuse) as instruct,
        FaultyServer(refuse=refuse) as thinking,
        running(routed, instruct=instruct.url, thinking=thinking.url) as address,
    ):
        yield address, instruct, thinking


@pytest.fixture
def both(started: tuple[str, FaultyServer, FaultyServer]) -> tuple[str, FaultyServer, FaultyServer]:
    """The same, whose servers have not been asked yet."""
    for server in started[1:]:
        server.seen.clear()
        server.asked.clear()
    return started


def ask(address: str, text: str = EASY, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], **fields}
    return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=30)


def content(reply: httpx.Response) -> str:
    """The text of a chat completion, streamed or not."""
    if not reply.text.startswith("data: "):
        return str(reply.json()["choices"][0]["message"]["content"])
    chunks = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line not in ("", "data: [DONE]")]
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def test_the_router_decides_who_answers_and_the_reply_says_who(both: Any) -> None:
    address, instruct, thinking = both
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["switch"]
    for text, mode, server in ((EASY, "instruct", instruct), (HARD, "thinking", thinking)):
        raw = client.chat.completions.with_raw_response.create(
            model="switch", messages=[{"role": "user", "content": text}], temperature=0.5
        )
        reply = raw.parse()
        assert reply.choices[0].message.content == f"echo: {text}" and reply.model == "switch"
        assert raw.headers["X-ThinkSwitch-Mode"] == mode
        found = reply.model_extra["thinkswitch"]
        assert found["mode"] == mode and found["threshold"] == 0.5 and (found["p_think"] >= 0.5) == (mode == "thinking")
        assert set(server.asked) == {text}
        # What the request leaves out is the recipe's.
        assert server.seen[0]["temperature"] == 0.5 and server.seen[0]["max_tokens"] == 64


def test_a_request_has_a_threshold_of_its_own_and_only_the_last_question_counts(both: Any) -> None:
    address, instruct, thinking = both
    assert ask(address, HARD, **DIRECT).headers["X-ThinkSwitch-Mode"] == "instruct"
    assert ask(address, EASY, **THINK).headers["X-ThinkSwitch-Mode"] == "thinking"
    turns = [{"role": role, "content": text} for role, text in (("user", HARD), ("assistant", "0"), ("user", EASY))]
    body = {"messages": turns, "max_completion_tokens": 7, "logprobs": True}
    assert httpx.post(f"{address}/v1/chat/completions", json=body).headers["X-ThinkSwitch-Mode"] == "instruct"
    sent = instruct.seen[-1]
    assert sent["messages"] == turns and sent["max_tokens"] == 7 and sent["logprobs"] is True
    assert "threshold" not in sent and len(thinking.seen) == 1


def test_a_stream_says_who_answers_in_every_chunk(both: Any) -> None:
    address, _, thinking = both
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    chunks = list(
        client.chat.completions.create(model="switch", messages=[{"role": "user", "content": HARD}], stream=True)
    )
    assert len(chunks) > 4 and {chunk.model_extra["thinkswitch"]["mode"] for chunk in chunks} == {"thinking"}
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == f"echo: {HARD}" and thinking.seen[0]["stream"] is True
    # What breaks off after its beginning ends with a reason, and without the usual last line.
    broken = ask(address, "broken:1 3*4", stream=True, **THINK)
    *_, last, end = broken.text.split("\n\n")
    assert end == "" and "the stream broke off before its end" in json.loads(last[6:])["error"]["message"]
    refused = ask(address, "answer 1+2", stream=True, messages=[{"role": "system", "content": "no question"}])
    assert refused.status_code == 400 and refused.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ({"messages": []}, 400, "`messages`: List should have at least 1 item"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "there is no turn of the user"),
        ({"messages": [{"role": "user", "content": "a<|im_end|>b"}]}, 400, "`messages.0`: the question holds"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "without text"),
        ({"messages": [{"role": "cook", "content": "x"}]}, 400, "`messages.0`: the role must be"),
        ({"threshold": 2}, 400, "`threshold`: Input should be less than or equal to 1"),
        ({"temperature": "hot"}, 400, "`temperature`: Input should be a valid number"),
        ({"model": "gpt"}, 404, "The model `gpt` does not exist; this endpoint has one, `switch`"),
    ],
)
def test_a_request_that_cannot_be_asked_is_refused_with_the_field(
    both: Any, fields: dict[str, Any], status: int, says: str
) -> None:
    address, instruct, thinking = both
    found = ask(address, **fields)
    assert found.status_code == status and says in found.json()["error"]["message"]
    assert not instruct.seen and not thinking.seen


def test_what_a_server_refuses_is_passed_on_and_other_names_are_not_served(both: Any) -> None:
    address, *_ = both
    for stream in (False, True):
        found = ask(address, "never", stream=stream, **DIRECT)
        assert found.status_code == 400 and "The instruct checkpoint at http" in found.json()["error"]["message"]
        assert "too long" in found.json()["error"]["message"]
    assert ask(address, "truncated-json:* 1", **DIRECT).status_code == 502
    assert httpx.post(f"{address}/v1/chat/completions", content=b"{").status_code == 400
    assert httpx.get(f"{address}/v1/models", headers={"Host": "example.org"}).status_code == 400


def test_of_200_requests_with_one_server_killed_every_one_ends(routed: tuple[Run, Router]) -> None:
    async def storm(address: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:

            def post(number: int) -> Any:
                turn = {"role": "user", "content": f"late {number}"}
                fields = {**(THINK if number % 2 else DIRECT), "stream": number % 4 > 1}
                return client.post(f"{address}/v1/chat/completions", json={"messages": [turn], **fields})

            found = await asyncio.gather(*(post(number) for number in range(200)))
            return found + await asyncio.gather(*(post(number) for number in range(200, 220)))  # it is dead by now

    with (
        FaultyServer() as instruct,
        FaultyServer(die_after=(10,), return_at_all=False) as thinking,
        running(routed, instruct=instruct.url, thinking=thinking.url) as address,
    ):
        found = asyncio.run(storm(address))
    assert thinking.deaths == 1 and len(found) == 220
    answered = [reply.status_code == 200 and '"error"' not in reply.text for reply in found]
    assert all(answered[::2])  # instruct is as it was
    assert any(answered[1:200:2]) and not any(answered[201::2])
    for reply, whole in zip(found, answered, strict=True):
        if whole:
            assert reply.headers["X-ThinkSwitch-Mode"] in MODES and content(reply).startswith("echo: late ")
        else:
            assert f"The thinking checkpoint at {thinking.url} gave no answer (" in reply.text
            assert reply.status_code in (200, 502)  # 200 if its stream had begun


class Counting:
    """Stands for a checkpoint in process; notes how many requests came together."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def ask(self, requests: Any, arrived: Callable[..., Any]) -> None:
        batch = list(requests)
        self.batches.append(len(batch))
        time.sleep(0.2)
        for request in batch:
            text = request["body"]["messages"][-1]["content"]
            if text == "broken":
                raise RuntimeError("no memory left")
            message = {"role": "assistant", "content": f"echo: {text}"}
            arrived(request, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})


def test_checkpoints_in_process_answer_what_waits_as_one_batch(
    routed: tuple[Run, Router], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Counting()
    monkeypatch.setattr(Switch, "in_process", lambda self, mode: engine)

    async def several(address: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=30) as client:
            bodies = [{"messages": [{"role": "user", "content": f"1+{n}"}], **DIRECT} for n in range(20)]
            return await asyncio.gather(*(client.post(f"{address}/v1/chat/completions", json=b) for b in bodies))

    with running(routed) as address:
        found = asyncio.run(several(address))
        texts = [reply.json()["choices"][0]["message"]["content"] for reply in found]
        assert texts == [f"echo: 1+{n}" for n in range(20)] and sum(engine.batches) == 20 and len(engine.batches) < 8
        streamed = ask(address, "1+2", stream=True).text.split("\n\n")
        assert json.loads(streamed[0][6:])["choices"][0]["delta"]["content"] == "echo: 1+2"
        assert streamed[1:] == ["data: [DONE]", ""]
        broken = ask(address, "broken")
        assert broken.status_code == 502 and "gave no answer (no memory left)" in broken.text
        assert ask(address, "1+1").status_code == 200


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--url", "http://127.0.0.1:1/v1"], "--url belongs to --switch"),
        (["--switch", "--lambda", "0.5"], "leave out --lambda"),
        (["--switch", "--max-num-seqs", "4"], "leave out --lambda"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(words: list[str], says: str) -> None:
    done = CliRunner().invoke(main, ["serve", "--domain", "arithmetic", *words])
    assert done.exit_code == 2 and says in done.output


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason=browser.MISSING)
def test_the_page_shows_who_answers_and_why_there_is_no_answer(both: Any, tmp_path: Path) -> None:
    from axe_playwright_python.sync_playwright import Axe

    address, *_ = both
    with browser.started() as chromium:
        for scheme, size in (("light", (1280, 900)), ("dark", (390, 844))):
            context = chromium.new_context(
                viewport=dict(zip(("width", "height"), size, strict=True)), color_scheme=scheme
            )
            page, complaints, asked = context.new_page(), [], []
            page.on("pageerror", lambda error, to=complaints: to.append(str(error)))
            page.on("console", lambda message, to=complaints: to.append(message.text))
            context.on("request", lambda request, to=asked: to.append(request.url))
            page.goto(address)
            page.locator("#shown", has_text="0.500").wait_for()
            for text in (EASY, HARD):
                page.get_by_label("Question").fill(text)
                page.keyboard.press("Enter")
                page.locator("#send:enabled").wait_for()
            assert page.locator("#log > li").count() == 4
            first, second = page.locator("#log > .instruct"), page.locator("#log > .thinking")
            assert "instruct (p(think) = " in first.inner_text() and f"echo: {EASY}" in first.inner_text()
            assert len(both[2].seen[-1]["messages"]) == 1  # a question stands alone, unless earlier turns are wanted
            second.locator("summary").click()
            assert second.locator("details .text").inner_text() == "why"
            assert second.locator("> .text").inner_text() == f"echo: {HARD}"
            violations = Axe().run(page).response["violations"]
            assert [(v["id"], [n["html"][:100] for n in v["nodes"]]) for v in violations] == []
            assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
            assert complaints == [] and all(url.startswith((address, "data:")) for url in asked)

            page.get_by_label("Send earlier turns").check()
            page.get_by_label("Question").fill(EASY)
            page.keyboard.press("Enter")
            page.locator("#send:enabled").wait_for()
            sent = [turn["content"] for turn in both[1].seen[-1]["messages"]]
            assert sent == [EASY, f"echo: {EASY}", HARD, f"echo: {HARD}", EASY]
            page.get_by_role("button", name="New chat").click()
            assert page.locator("#log > li").count() == 0
            page.get_by_label("Question").fill("never <b>1</b>")
            page.get_by_role("button", name="Send").click()
            page.locator("#log > .failed").wait_for()
            assert "gave no answer (too long)" in page.locator("#log > .failed").inner_text()
            assert page.locator("#log > .user .text").inner_text() == "never <b>1</b>"
            context.close()
