"""The client over real HTTP, with a small OpenAI-compatible server whose behaviour the test selects."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import bench_faults
from tests.faulty_server import FaultyServer
from thinkswitch_plugin import files
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.conventions import NONE
from thinkswitch_plugin.data.pairs import completions
from thinkswitch_plugin.demo.tokenizer import build_tokenizer
from thinkswitch_plugin.engines import client, embedded, replies, servers
from thinkswitch_plugin.engines.ask import ask_in_order
from thinkswitch_plugin.engines.generate import PROMPT_ROOM, generate, prompt_room
from thinkswitch_plugin.engines.stored import StoredAnswers, repair
from thinkswitch_plugin.errors import ThinkSwitchError

Write = Callable[[str, Sequence[object]], Path]
KEYS = EngineKeys(concurrency=4, timeout=5)  # type: ignore[call-arg]


class Answering(ThreadingHTTPServer):
    """Answers `echo: TEXT`; a text with a number above 400 gets that HTTP status."""

    daemon_threads = True
    seen: list[dict[str, Any]]


class _Handler(BaseHTTPRequestHandler):
    server: Answering

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "m"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        text = body["messages"][-1]["content"]
        if text.isdigit() and int(text) >= 400:
            return self.reply(int(text), {"error": {"message": f"status {text}"}})
        if text == "refused when longer" and body["max_tokens"] > 20:
            return self.reply(400, {"error": {"message": "too long"}})
        finish = "length" if text in ("long", "refused when longer") and body["max_tokens"] < 20 else "stop"
        self.reply(
            200,
            {
                "id": "x",
                "choices": [
                    {"index": 0, "message": {"role": "assistant", "content": f"echo: {text}"}, "finish_reason": finish}
                ],
                "usage": {"completion_tokens": 3},
            },
        )

    def reply(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Answering]:
    started = Answering(("127.0.0.1", 0), _Handler)
    started.seen = []
    threading.Thread(target=started.serve_forever, daemon=True).start()
    yield started
    started.shutdown()


def url(server: Answering) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/v1"


def requests_for(texts: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "custom_id": f"p{i}-s0",
            "body": {
                "model": "m",
                "messages": [{"role": "user", "content": t}],
                "max_tokens": 10,
                "metadata": {"prompt_id": "p"},
            },
        }
        for i, t in enumerate(texts)
    ]


def test_every_request_is_answered_once_and_metadata_stays_here(
    server: Answering, write_jsonl: Write, tmp_path: Path
) -> None:
    requests = write_jsonl("requests.jsonl", requests_for([f"q{i}" for i in range(50)]))
    out = tmp_path / "generations.jsonl"
    report = generate(requests, out, "m", url(server), KEYS, log=tmp_path / "log")
    rows = [row for _, row in files.read_jsonl(out)]
    assert sorted(r["custom_id"] for r in rows) == sorted(f"p{i}-s0" for i in range(50))
    assert (report.answered, report.failed, report.tokens) == (50, 0, 150)
    assert all("metadata" not in body and body["model"] == "m" for body in server.seen)


def test_a_second_call_asks_only_what_is_missing(server: Answering, write_jsonl: Write, tmp_path: Path) -> None:
    requests = write_jsonl("requests.jsonl", requests_for([f"q{i}" for i in range(10)]))
    out = tmp_path / "generations.jsonl"
    generate(requests, out, "m", url(server), KEYS, limit=6, log=tmp_path / "log")
    out.write_bytes(out.read_bytes()[:-7])  # killed while writing the sixth answer
    server.seen.clear()
    report = generate(requests, out, "m", url(server), KEYS, log=tmp_path / "log")
    assert (report.already_stored, report.answered, len(server.seen)) == (5, 5, 5)
    assert len({row["custom_id"] for _, row in files.read_jsonl(out)}) == 10


def test_a_request_that_always_fails_is_recorded_and_asked_again_next_time(
    server: Answering, write_jsonl: Write, tmp_path: Path
) -> None:
    requests = write_jsonl("requests.jsonl", requests_for(["fine", "422", "also fine"]))
    out = tmp_path / "generations.jsonl"
    report = generate(requests, out, "m", url(server), KEYS, log=tmp_path / "log")
    assert (report.answered, report.failed) == (2, 1)
    failed = [row for _, row in files.read_jsonl(out) if row["error"]]
    assert failed[0]["custom_id"] == "p1-s0" and "422" in failed[0]["error"]["message"]
    assert repair(out) == {"p0-s0", "p2-s0"}


def test_a_cut_answer_is_asked_once_more_with_a_larger_budget(
    server: Answering, write_jsonl: Write, tmp_path: Path
) -> None:
    requests = write_jsonl("requests.jsonl", requests_for(["long", "short"]))
    out = tmp_path / "generations.jsonl"
    report = generate(requests, out, "m", url(server), KEYS, retry_max_tokens=40, log=tmp_path / "log")
    assert (report.answered, report.retried) == (2, 1)
    assert {b["max_tokens"] for b in server.seen if b["messages"][0]["content"] == "long"} == {10, 40}
    assert all(r["response"]["body"]["choices"][0]["finish_reason"] == "stop" for _, r in files.read_jsonl(out))


def test_a_cut_answer_is_kept_where_the_larger_budget_gets_none_and_the_reason_is_printed(
    server: Answering, write_jsonl: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = write_jsonl("requests.jsonl", requests_for(["refused when longer", "short"]))
    out = tmp_path / "generations.jsonl"
    report = generate(requests, out, "m", url(server), KEYS, retry_max_tokens=40, log=tmp_path / "log")
    assert (report.answered, report.retried, report.retries_failed, report.failed) == (2, 1, 1, 0)
    assert "1 of 1 retries with 40 tokens failed; those answers stay cut. The last:" in capsys.readouterr().out
    (cut, _) = sorted((row for _, row in files.read_jsonl(out)), key=lambda row: row["custom_id"])
    assert cut["response"]["body"]["choices"][0]["finish_reason"] == "length"


def test_room_is_left_for_the_longest_prompt(tmp_path: Path) -> None:
    build_tokenizer("instruct").save_pretrained(tmp_path)
    assert prompt_room("1+1" * 500, str(tmp_path / "not looked at")) == PROMPT_ROOM
    assert prompt_room("1+1" * 5000, str(tmp_path)) >= 15_000


def test_a_long_prompt_to_a_server_of_the_users_own_needs_no_tokenizer_here(
    server: Answering, write_jsonl: Write, tmp_path: Path
) -> None:
    requests = write_jsonl("requests.jsonl", requests_for(["word " * 2000]))
    assert generate(requests, tmp_path / "g.jsonl", "m", url(server), KEYS, log=tmp_path / "log").answered == 1


def test_a_batch_that_the_memory_does_not_hold_is_answered_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = embedded.EmbeddedEngine.__new__(embedded.EmbeddedEngine)
    sizes: list[int] = []

    def answer(bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        sizes.append(len(bodies))
        if len(bodies) > 2:
            raise torch.OutOfMemoryError
        return [{"of": body["n"]} for body in bodies]

    monkeypatch.setattr(engine, "answer", answer)
    rows = [{"body": {"n": n}} for n in range(7)]
    assert [(row["body"]["n"], body["of"]) for row, body in engine.stream(rows, 7)] == [(n, n) for n in range(7)]
    assert sizes == [7, 3, 1, 2, 4, 2, 2]
    monkeypatch.setattr(engine, "answer", lambda bodies: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        list(engine.stream(rows, 7))


def test_replies_are_in_the_order_of_the_requests_with_the_reason_in_place_of_a_refused_one(server: Answering) -> None:
    bodies = [row["body"] for row in requests_for(["slow first", "422", "last"])]
    asker = client.ServedModel(servers.Server(url(server)), "m", KEYS, {"seed": 7})
    answered: list[None] = []
    first, refused, last = ask_in_order(asker, bodies, lambda: answered.append(None))
    assert isinstance(first, dict) and isinstance(last, dict) and len(answered) == 3
    texts = [reply["choices"][0]["message"]["content"] for reply in (first, last)]
    assert texts == ["echo: slow first", "echo: last"]
    assert isinstance(refused, replies.Unanswered) and "422" in str(refused)
    assert {body["seed"] for body in server.seen} == {7}


def test_a_server_that_is_not_there_or_serves_another_model(
    server: Answering, write_jsonl: Write, tmp_path: Path
) -> None:
    requests = write_jsonl("requests.jsonl", requests_for(["q"]))
    with pytest.raises(ThinkSwitchError, match="serves m, not other"):
        generate(requests, tmp_path / "a", "other", url(server), KEYS, log=tmp_path / "log")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    with pytest.raises(ThinkSwitchError, match="no OpenAI-compatible server answers"):
        generate(requests, tmp_path / "b", "m", gone, KEYS, log=tmp_path / "log")


def test_every_request_is_accounted_for_once_through_a_server_that_fails_in_every_way(tmp_path: Path) -> None:
    keys = EngineKeys(concurrency=64, timeout=4, outage=20)  # type: ignore[call-arg]
    found = bench_faults.run(240, tmp_path, keys, die_after=(60, 150), away=0.5)
    assert bench_faults.is_whole(found), found
    assert found["times the server died"] == 2 and found["expected to fail"] > 0


def test_a_server_that_stays_away_stops_the_run_with_its_answers_kept(write_jsonl: Write, tmp_path: Path) -> None:
    requests, out = (
        write_jsonl("requests.jsonl", requests_for([f"answer {i}" for i in range(60)])),
        tmp_path / "g.jsonl",
    )
    keys = EngineKeys(concurrency=4, timeout=5, outage=0.5)  # type: ignore[call-arg]
    stays_away = pytest.raises(ThinkSwitchError, match=r"has not answered for 0\.5 s .*answers so far are kept")
    with FaultyServer(die_after=(20,), return_at_all=False) as dead, stays_away:
        generate(requests, out, "m", dead.url, keys, log=tmp_path / "log")
    assert 20 <= dead.answered.total() < 60
    assert dead.answered.total() - keys.concurrency <= len(repair(out)) <= dead.answered.total()


def answered_once(out: Path, texts: Sequence[str]) -> bool:
    """Whether the file holds the right answer to every prompt, each once."""
    rows = [row for _, row in files.read_jsonl(out)]
    said = {row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"] for row in rows}
    return len(rows) == len(texts) and said == {f"p{i}-s0": f"echo: {text}" for i, text in enumerate(texts)}


def test_of_two_servers_one_that_dies_is_left_out_and_takes_part_again_when_it_is_back(
    write_jsonl: Write, tmp_path: Path
) -> None:
    texts = [f"wait:0.05 {i}" for i in range(500)]
    requests, out = write_jsonl("requests.jsonl", requests_for(texts)), tmp_path / "g.jsonl"
    keys = EngineKeys(concurrency=16, timeout=10)  # type: ignore[call-arg]
    with FaultyServer(die_after=(60,), away=0.3) as dying, FaultyServer() as other:
        report = generate(requests, out, "m", f"{dying.url},{other.url}", keys, log=tmp_path / "log")
    assert (report.answered, report.failed, dying.deaths) == (500, 0, 1) and answered_once(out, texts)
    assert dying.answered.total() > 60 + keys.concurrency and other.answered.total() > 200
    assert max((dying.asked + other.asked).values()) <= 3


def test_a_server_whose_engine_is_dead_or_that_is_not_there_loses_no_request(
    write_jsonl: Write, tmp_path: Path
) -> None:
    texts = [f"answer {i}" for i in range(60)]
    requests, out = write_jsonl("requests.jsonl", requests_for(texts)), tmp_path / "g.jsonl"
    vllm = (200, {"data": [{"id": "m", "owned_by": "vllm"}]})
    dead: dict[str, tuple[int, object]] = {"/v1/models": vllm, "/health": (503, "")}  # a data-parallel rank was killed
    with (
        FaultyServer(models={"/v1/models": vllm, "/health": (200, "")}) as good,
        FaultyServer(models=dead, refuse=lambda _: (500, {"error": {"message": "EngineCore died"}})) as broken,
        FaultyServer(die_after=(20,), return_at_all=False) as killed,
    ):
        every = f"{broken.url},http://127.0.0.1:9/v1,{killed.url},{good.url}"
        report = generate(requests, out, "m", every, KEYS, log=tmp_path / "log")
    assert (report.answered, report.failed) == (60, 0) and answered_once(out, texts)
    assert good.answered.total() + killed.answered.total() >= 60
    assert len(broken.seen) <= 3 * KEYS.concurrency  # only what was in flight before its /health was asked


def test_a_second_answer_on_the_connection_is_never_taken_for_the_next_prompts(
    write_jsonl: Write, tmp_path: Path
) -> None:
    texts = [f"stray {i}" for i in range(30)]
    requests, out = write_jsonl("requests.jsonl", requests_for(texts)), tmp_path / "g.jsonl"
    with FaultyServer() as server:
        generate(requests, out, "m", server.url, KEYS, log=tmp_path / "log")
    bodies = {row["custom_id"]: row["response"]["body"] for _, row in files.read_jsonl(out)}
    assert [bodies[f"p{i}-s0"]["choices"][0]["message"]["content"] for i in range(30)] == [f"echo: {t}" for t in texts]


@pytest.mark.parametrize(
    ("fault", "reason", "asked"),
    [
        ("status-400", "400", 1),
        ("status-500", "a 500", 6),
        ("truncated-json", "not JSON", 2),
        ("no-text", "`message.content` has a part without text", 1),
        ("refusal", "the model refused: I cannot help with that.", 1),
        ("choice-error", "the filter struck", 1),
        ("error-200", "the provider is busy; asked 2 times", 2),
        ("status-422", "a 422", 1),
        ("status-529", "a 529", 6),
        ("surrogate", "cannot be stored", 2),
        ("reset", "connection lost", 6),
        ("stall", "no answer within 1.5 s", 2),
    ],
)
def test_a_prompt_that_always_fails_is_asked_a_bounded_number_of_times_and_its_reason_kept(
    write_jsonl: Write, tmp_path: Path, fault: str, reason: str, asked: int
) -> None:
    texts = [f"{fault}:* 0", "answer 1", "answer 2"]
    requests, out = write_jsonl("requests.jsonl", requests_for(texts)), tmp_path / "g.jsonl"
    # Long enough for the client's own retries, but for the one prompt that stalls.
    timeout = 1.5 if fault == "stall" else 10
    keys = EngineKeys(concurrency=4, timeout=timeout, attempts=2)  # type: ignore[call-arg]
    with FaultyServer() as server:
        report = generate(requests, out, "m", server.url, keys, log=tmp_path / "log")
        assert (report.answered, report.failed, server.asked[texts[0]]) == (2, 1, asked)
    (failure,) = [row["error"] for _, row in files.read_jsonl(out) if row["error"]]
    assert reason in failure["message"]


def test_an_answer_stored_beside_failures_is_not_lost_when_few_are_left_to_ask(
    server: Answering, write_jsonl: Write, tmp_path: Path
) -> None:
    requests, out = write_jsonl("requests.jsonl", requests_for(["a", "b", "c", "422"])), tmp_path / "g.jsonl"
    for _ in range(2):  # the second call has only the bad prompt to ask, and ends well too
        assert generate(requests, out, "m", url(server), KEYS, log=tmp_path / "log").failed == 1
    assert repair(out) == {"p0-s0", "p1-s0", "p2-s0"}


def test_an_engine_of_ours_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("out of memory\n")
    ended = subprocess.Popen(["false"])
    ended.wait()
    with pytest.raises(ThinkSwitchError, match=r"engine stopped .*exit code 1(.|\n)*out of memory"):
        servers.Server("http://127.0.0.1:1/v1", ended, tmp_path / "log").require_alive()


@pytest.mark.parametrize("address", ["http://me:pa55@host/v1", "https://host/v1?key=pa55", "http://pa55@host"])
def test_an_address_that_holds_a_secret_is_refused_without_repeating_it(address: str) -> None:
    with pytest.raises(ThinkSwitchError, match="OPENAI_API_KEY") as refused:
        servers.choose(address)
    assert "pa55" not in str(refused.value)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ThinkSwitchError, match=f"Port {port} on 127.0.0.1 is not free"):
            servers.free_port(port)


def test_engine_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "vllm_python", lambda: None)
    assert servers.choose("auto") == "embedded"
    assert servers.choose("http://127.0.0.1:8000/v1/") == "http://127.0.0.1:8000/v1"
    assert servers.choose("http://a/v1, https://b:81/v1/,http://a/v1") == "http://a/v1,https://b:81/v1"
    with pytest.raises(ThinkSwitchError, match="'b:81/v1' is not an address"):
        servers.choose("http://a/v1,b:81/v1")
    with pytest.raises(ThinkSwitchError, match="make setup-vllm"):
        servers.choose("vllm")
    with pytest.raises(ThinkSwitchError, match="ENGINE=llama is unknown"):
        servers.choose("llama")


def test_answers_in_several_files_are_resumed_by_reading_only_the_files_that_are_not_complete(
    server: Answering, write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"q{i}" for i in range(95)]
    requests, out = write_jsonl("requests.jsonl", requests_for(texts)), tmp_path / "generations"
    keys = KEYS.model_copy(update={"rows_per_file": 10})
    arrived, append = [0], StoredAnswers.append

    def killed(self: StoredAnswers, place: int, line: bytes, *, answered: bool) -> None:
        append(self, place, line, answered=answered)
        arrived[0] += 1
        if arrived[0] == 57:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(StoredAnswers, "append", killed)
        generate(requests, out, "m", url(server), keys, log=tmp_path / "log")
    last = sorted(out.glob("*.jsonl"))[-1]
    last.write_bytes(last.read_bytes()[:-7])  # the line that was being written
    stored = sum(line.endswith(b"\n") for path in out.glob("*.jsonl") for line in path.open("rb"))
    assert 56 <= stored <= 56 + KEYS.concurrency
    read: list[str] = []
    monkeypatch.setattr("thinkswitch_plugin.engines.stored.repair", lambda path: read.append(path.name) or repair(path))
    server.seen.clear()
    report = generate(requests, out, "m", url(server), keys, log=tmp_path / "log")
    asked = {body["messages"][0]["content"] for body in server.seen}  # one may still be of the first generation
    assert report.already_stored == stored and len(asked) == report.answered == 95 - stored
    assert 1 <= len(read) <= 4 and "00000.jsonl" not in read
    assert [path.name for path in sorted(out.glob("*.jsonl"))] == [f"{n:05}.jsonl" for n in range(10)]
    assert answered_once(out, texts)
    found = [one.request["custom_id"] for one in completions(requests, out, NONE)]
    assert found == [f"p{i}-s0" for i in range(95)]
    read.clear()
    assert generate(requests, out, "m", url(server), keys, log=tmp_path / "log").already_stored == 95 and read == []
    part = out / "00003.jsonl"
    part.write_bytes(part.read_bytes() + b"{broken\n")
    with pytest.raises(ThinkSwitchError, match=r"generations/00003\.jsonl, line 11"):
        list(files.read_jsonl(out))
