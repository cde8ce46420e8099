"""The user's own servers and their differences: requests, answers, and what happens when they refuse."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.faulty_server import SHAPES, FaultyServer
from thinkswitch_plugin import files, recipe, run
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.engines import replies, servers
from thinkswitch_plugin.engines.generate import generate
from thinkswitch_plugin.errors import ThinkSwitchError

Write = Callable[[str, Sequence[object]], Path]
KEY = "sk-5ecret5ecret"


@pytest.fixture
def ask(write_jsonl: Write, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Ask prompts through a server; the stored lines, in the order of the prompts."""

    def asked(at: FaultyServer | str, *prompts: str, **server: Any) -> list[dict[str, Any]]:
        url = at if isinstance(at, str) else at.url
        body = {
            "model": "m",
            "temperature": 0.6,
            "top_k": 0,
            "max_tokens": 10,
            "seed": 1,
            "metadata": {"prompt_id": "p"},
        }
        rows = [
            {"custom_id": f"p{n}", "body": body | {"messages": [{"role": "user", "content": text}]}}
            for n, text in enumerate(prompts or ("answer 1",))
        ]
        keys = EngineKeys.model_validate({"concurrency": 1, "timeout": 10, "outage": 2, "server": server})
        out = tmp_path / "g.jsonl"
        out.unlink(missing_ok=True)
        generate(write_jsonl("requests.jsonl", rows), out, "m", url, keys, log=tmp_path / "log")
        return sorted((row for _, row in files.read_jsonl(out)), key=lambda row: str(row["custom_id"]))

    return asked


def choice(row: dict[str, Any]) -> dict[str, Any]:
    return dict(row["response"]["body"]["choices"][0])


@pytest.mark.parametrize(
    "models",
    [
        (200, {"object": "list", "data": [{"id": "other"}, {"id": "m"}]}),
        (200, [{"id": "m", "type": "chat"}]),
        (200, ["m"]),
        (200, {"models": [{"name": "m", "size": 1}]}),
        (200, {"object": "list", "data": None}),
        (403, {"error": {"message": "missing scope: model.read"}}),
        (404, {"detail": "Not Found"}),
        (405, {"detail": "Method Not Allowed"}),
        (501, b"not implemented"),
    ],
)
def test_a_list_of_models_in_any_shape_or_none_is_no_reason_to_stop(ask: Any, models: tuple[int, object]) -> None:
    with FaultyServer(models=models) as server:
        (row,) = ask(server)
    assert choice(row)["message"]["content"] == "echo: answer 1"


def test_a_key_that_is_refused_at_the_list_of_models_stops_with_the_servers_words(ask: Any) -> None:
    with (
        FaultyServer(models=(401, {"error": {"message": "no such account"}})) as server,
        pytest.raises(ThinkSwitchError, match=r"refuses the key \(status 401: no such account\); set OPENAI_API_KEY"),
    ):
        ask(server)


@pytest.mark.parametrize(
    "elsewhere",
    [(404, b"404 page not found"), (200, {"error": "Unexpected endpoint. (GET /models)"}), (200, b"<html></html>")],
)
def test_an_address_that_lacks_its_v1_is_put_right(ask: Any, elsewhere: tuple[int, object]) -> None:
    with FaultyServer(models={"/models": elsewhere, "/v1/models": (200, ["m"])}) as server:
        bare = server.url.removesuffix("/v1")
        with pytest.raises(ThinkSwitchError, match=f"use ENGINE={server.url}"):
            ask(bare)
    for address in ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1/chat/completions"):
        assert servers.choose(address) == "http://127.0.0.1:8000/v1"


def test_the_recipes_keys_say_who_is_asked_and_by_which_fields(ask: Any) -> None:
    with FaultyServer() as server:
        ask(
            server,
            model="house/best-model",  # not in the server's list
            omit=["seed"],
            rename={"max_tokens": "max_completion_tokens"},
            add={"reasoning_effort": "high"},
        )
    (sent,) = server.seen
    assert sent.pop("messages") == [{"role": "user", "content": "answer 1"}]
    assert sent == {
        "model": "house/best-model",
        "temperature": 0.6,
        "max_completion_tokens": 10,
        "reasoning_effort": "high",
    }


@pytest.mark.parametrize("owner", ["vllm", "sglang"])
def test_a_vllm_of_the_users_own_is_asked_to_keep_special_tokens(ask: Any, owner: str) -> None:
    with FaultyServer(models=(200, {"data": [{"id": "m", "owned_by": owner}]})) as server:
        ask(server)
        ask(server, omit=["skip_special_tokens"])
    first, second = server.seen
    assert first["skip_special_tokens"] is False and first["top_k"] == -1
    assert "skip_special_tokens" not in second


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        ({"add": {"messages": []}}, "cannot be added: the prompts are the messages"),
        ({"add": {"model": "x"}}, "engine.server.model"),
        ({"add": {"temperature": 1}}, "thinkswitch.sampling"),
        ({"add": {"api_key": KEY}}, "OPENAI_API_KEY"),
        ({"add": {"a": 1}, "rename": {"seed": "a"}}, "would send `a` twice"),
        ({"rename": {"seed": "messages"}}, "would send `messages` twice"),
        ({"omit": ["messages"]}, "temperature"),
        ({"add": {"day": object()}}, "JSON"),
    ],
)
def test_keys_that_would_break_a_request_or_store_a_secret_are_refused(server: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as refused:
        EngineKeys.model_validate({"server": server})
    sentence = recipe.explain(refused.value)
    assert reason in sentence and KEY not in sentence


def test_a_stamp_holds_the_keys_that_change_answers_and_only_for_a_server_of_the_users_own(tmp_path: Path) -> None:
    def engine_values(engine: str, server: dict[str, Any]) -> dict[str, Any]:
        overlay = tmp_path / "x.overlay.yaml"
        files.write_yaml(overlay, {"thinkswitch": {"engine": {"server": server}}})
        loaded = recipe.load_recipe(recipe.recipe_path("arithmetic"), (overlay,))
        every = run.stages(run.Run(tmp_path, loaded, 0, engine, 1))
        return {stage.name: stage.values.get("engine", stage.values.get("backend")) for stage in every}

    url = "http://127.0.0.1:1/v1"
    plain = engine_values(url, {})
    assert engine_values(url, {"stream": True}) == plain
    changed = engine_values(url, {"model": "best", "omit": ["seed"]})
    assert {name for name in plain if plain[name] != changed[name]} == {"generate"}
    assert engine_values("vllm", {"model": "best"}) == engine_values("vllm", {})


def test_every_shape_of_an_answer_is_stored_in_one_form_with_its_trace(ask: Any) -> None:
    prompts = [f"{shape} 1" for shape in SHAPES]
    with FaultyServer() as server:
        rows = ask(server, *prompts)
    for shape, row in zip(SHAPES, sorted(rows, key=lambda row: int(row["custom_id"][1:])), strict=True):
        found = choice(row)
        assert found["message"]["content"] == f"echo: {shape} 1"
        assert found["finish_reason"] == (None if shape == "null-finish" else "stop")
        assert row["response"]["body"]["usage"]["completion_tokens"] == (None if shape == "no-count" else 3)
        trace = found["message"].get("reasoning") or found["message"].get("reasoning_content")
        assert trace == ("why" if shape.startswith(("thinking", "reasoning")) else None)
    assert set(server.asked.values()) == {1}


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, "Incorrect API key provided: …"),
        (402, {"error": {"message": "Insufficient Balance", "code": "invalid_request_error"}}, "Insufficient Balance"),
        (403, {"detail": "not in your country"}, "not in your country"),
        (429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}, "exceeded your quota"),
        (404, {"error": {"message": "The model `m` does not exist"}}, "engine.server.model"),
        (400, {"error": {"message": "Model Not Exist"}}, "engine.server.model"),
        (400, {"error": {"message": "x/y is not a valid model ID", "code": 400}}, "engine.server.model"),
        (405, b"<html><body>Method Not Allowed</body></html>", "status 405: Method Not Allowed"),
    ],
)
def test_what_every_prompt_would_be_refused_for_stops_the_run_at_the_first(
    ask: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, body: object, words: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FaultyServer(refuse=lambda _: (status, body)) as server, pytest.raises(ThinkSwitchError) as stopped:
        ask(server, "answer 1", "answer 2", "answer 3")
    assert words in str(stopped.value) and "\n" not in str(stopped.value)
    assert server.asked.keys() == {"answer 1"} and len(server.seen) == (3 if status == 429 else 1)
    assert KEY not in f"{stopped.value}{[path.read_text() for path in tmp_path.iterdir() if path.is_file()]}"


@pytest.mark.parametrize(
    ("field", "status", "body", "advice"),
    [
        (
            "max_tokens",
            400,
            {
                "error": {
                    "message": "Unsupported parameter: 'max_tokens' is not supported with this model. "
                    "Use 'max_completion_tokens' instead.",
                    "param": "max_tokens",
                    "code": "unsupported_parameter",
                }
            },
            "rename: {max_tokens: max_completion_tokens}",
        ),
        (
            "seed",
            422,
            {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]},
            "omit: [seed]",
        ),
        (
            "temperature",
            400,
            {"error": {"message": "Unsupported value: it does not support 0.6", "param": "temperature"}},
            "omit: [temperature]",
        ),
        ("seed", 400, {"error": "unknown field `seed`, expected one of `max_tokens`, `temperature`"}, "omit: [seed]"),
        ("seed", 400, [{"error": {"message": 'Unknown name "seed": Cannot find field.'}}], "omit: [seed]"),
        ("tier", 400, {"message": {"detail": [{"loc": ["tier"], "msg": "Extra inputs are not permitted"}]}}, "add`"),
    ],
)
def test_a_field_that_the_server_does_not_take_is_named_with_the_key_that_helps(
    ask: Any, field: str, status: int, body: object, advice: str
) -> None:
    with FaultyServer(refuse=lambda sent: (status, body) if field in sent else None) as server:
        with pytest.raises(ThinkSwitchError, match=f"does not take the field `{field}`") as stopped:
            ask(server, add={"tier": 1})
        assert advice in str(stopped.value) and len(server.seen) == 1
        keys = {"rename": {"max_tokens": "max_completion_tokens"}} if field == "max_tokens" else {"omit": [field]}
        (row,) = ask(server, **(keys if field != "tier" else {}))  # and with the key it answers
    assert row["error"] is None


def test_a_prompt_that_is_too_long_does_not_stop_the_run(ask: Any) -> None:
    body = {"error": {"message": "max_tokens is too large: the context length is 20. (parameter=max_tokens)"}}
    with FaultyServer(refuse=lambda sent: (400, body) if "long" in str(sent["messages"]) else None) as server:
        rows = ask(server, "long 0", "answer 1", "answer 2")
    assert [row["error"] and row["error"]["message"] for row in rows] == [
        "status 400: max_tokens is too large: the context length is 20. (parameter=max_tokens)",
        None,
        None,
    ]


def only_streams(body: dict[str, Any]) -> tuple[int, object] | None:
    return None if body.get("stream") else (400, {"error": {"message": "stream must be set to true"}})


def test_a_server_that_answers_only_by_a_stream_is_asked_for_one_by_its_key(ask: Any) -> None:
    prompts = ["answer 1", "broken:1 2"]
    with FaultyServer(refuse=only_streams) as server:
        with pytest.raises(ThinkSwitchError, match=r"stream must be set to true.*engine\.server\.stream: true"):
            ask(server, *prompts)
        assert len(server.seen) == 1
        rows = ask(server, *prompts, stream=True)
    for prompt, row in zip(prompts, rows, strict=True):
        assert choice(row)["message"] | {"role": ""} == {
            "role": "",
            "content": f"echo: {prompt}",
            "reasoning_content": "why",
        }
        assert choice(row)["finish_reason"] == "stop" and row["response"]["body"]["usage"]["completion_tokens"] == 3
    assert server.asked["broken:1 2"] == 2  # half a stream is not an answer
    assert server.seen[-1]["stream_options"] == {"include_usage": True}


def test_a_stream_that_was_not_asked_for_names_the_key_and_a_whole_answer_to_the_key_is_taken(ask: Any) -> None:
    with FaultyServer() as server, pytest.raises(ThinkSwitchError, match=r"engine\.server\.stream: true"):
        ask(server, "stream-unasked:* 1")
    assert replies.completion(b'{"choices": []}', streamed=True) == {"choices": [], "usage": None}


def test_a_completion_without_chat_is_brought_into_the_one_form() -> None:
    found = replies.completion(b'{"choices": [{"text": "a", "finish_reason": "eos"}]}', streamed=False)
    assert found["choices"] == [{"message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}]


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ('data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: [DONE]\n\n', "broke off"),
        ('data: {"choices": [{"delta": {"con', "Unterminated"),
        ('data: {"choices": [3]}\n\n', "another shape"),
        ('data: {"error": {"message": "overloaded", "code": 503}}\n\n', "overloaded"),
    ],
)
def test_half_a_stream_is_no_answer(events: str, reason: str) -> None:
    with pytest.raises((ValueError, replies.Refusal), match=reason):
        replies.completion(events.encode(), streamed=True)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": {"message": "Provider returned error", "metadata": {"raw": "rate-limited"}}}, "rate-limited"),
        ({"errors": [{"message": "a"}, {"message": "b"}]}, "a; b"),
        ({"title": "Bad", "detail": "the prompt is empty"}, "the prompt is empty"),
        ({"strange": 1}, '{"strange": 1}'),
        ("line\nline", "line line"),
        (None, "no reason given"),
    ],
)
def test_the_servers_own_words_are_found_in_the_usual_shapes(body: object, words: str) -> None:
    assert words in replies.words_of(body)


def test_an_unlisted_model_is_named_in_a_list_of_bearable_length() -> None:
    with (
        FaultyServer(models=(200, [f"model-{n}" for n in range(300)])) as server,
        pytest.raises(ThinkSwitchError, match="model-9 and 290 more, not m;"),
    ):
        servers.connect(server.url, "m")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1, with its key in the same folder."""
    here = tmp_path_factory.mktemp("certificate")
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    options = [*words.split(), "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run(
            ["openssl", *options, "-keyout", here / "key.pem", "-out", here / "cert.pem"],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return here / "cert.pem"


def test_certificates_of_the_environment_are_trusted_and_one_that_is_not_is_final(
    ask: Any, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, certificate.with_name("key.pem"))
    with FaultyServer(tls=tls) as server:
        with pytest.raises(ThinkSwitchError, match=r"not trusted \(self.signed certificate\); .* SSL_CERT_FILE"):
            ask(server)
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
            with monkeypatch.context() as set_once:
                set_once.setenv(name, str(certificate))
                (row,) = ask(server)
                assert row["error"] is None
        # A certificate that stops being trusted during the run is not an outage either.
        monkeypatch.setattr(servers, "listed_models", lambda url: None)
        with pytest.raises(ThinkSwitchError, match="not trusted"):
            ask(server)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
        with pytest.raises(ThinkSwitchError, match=r"SSL_CERT_FILE=.*is not a file of certificates"):
            ask(server)


def test_a_key_that_no_header_can_carry_is_refused_without_repeating_it(
    ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyServer() as server:
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")  # as `$(cat file)` may leave it
        assert ask(server)[0]["error"] is None
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX: y")
        with pytest.raises(ThinkSwitchError, match="OPENAI_API_KEY holds a character") as refused:
            ask(server)
    assert KEY not in str(refused.value)
