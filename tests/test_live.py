"""Weights changed in a running vLLM: what is sent and digested, what the guard lets through, and the real engine."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import psutil
import pytest
import torch
from mergekit.options import MergeOptions
from safetensors.torch import save_file

from tests.conftest import ROOT
from thinkswitch_plugin import files
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.demo import task
from thinkswitch_plugin.engines import live_worker
from thinkswitch_plugin.engines.ask import ask_in_order
from thinkswitch_plugin.engines.embedded import EmbeddedEngine
from thinkswitch_plugin.engines.live import EngineGoneError, Sender
from thinkswitch_plugin.engines.live_worker import Digest, Guard, Weights, of_folder, of_socket
from thinkswitch_plugin.engines.replies import Unanswered
from thinkswitch_plugin.engines.servers import vllm_python
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.export.live import move_lambda, note_server
from thinkswitch_plugin.judging.evaluation import evaluate_checkpoint
from thinkswitch_plugin.judging.samples import samples_of
from thinkswitch_plugin.judging.served import IN_REQUESTS, Served, one_server_holds, told_of
from thinkswitch_plugin.loop.rebuild import Check, rebuild_thinking
from thinkswitch_plugin.merging.config import fit_layers, place_models, set_lambda
from thinkswitch_plugin.merging.holding import Live, MergeJob, sending
from thinkswitch_plugin.merging.run import merge
from thinkswitch_plugin.recipe import load_recipe
from thinkswitch_plugin.run import MODES, checkpoint
from thinkswitch_plugin.run.checkpoint import Subject


def REAL(test: Any) -> Any:
    """Marks a test that asks a real vLLM."""
    missing = pytest.mark.skipif(vllm_python() is None, reason="vLLM is not installed: make setup-vllm")
    return pytest.mark.slow(pytest.mark.vllm(missing(test)))


TENSORS = {
    "embed": torch.arange(12, dtype=torch.bfloat16).view(3, 4),
    "bias": torch.tensor([1.5, -2.0]),
    "scale": torch.tensor(3.0, dtype=torch.float64),
    "none": torch.empty(0, 4),
}


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[tuple[str, Callable[[], socket.socket]]]:
    """The address of a socket that waits for a worker, and what accepts one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        listener.settimeout(10)
        yield str(tmp_path / "s"), lambda: listener.accept()[0]


def send_all(accept: Callable[[], socket.socket], tensors: dict[str, torch.Tensor], end: bool = True) -> None:
    with accept() as worker:
        sender = Sender([worker])
        for name, tensor in tensors.items():
            sender(name, tensor)
        if end:
            sender.end()


def test_tensors_arrive_as_they_were_sent(listening: Any) -> None:
    address, accept = listening
    thread = threading.Thread(target=send_all, args=(accept, TENSORS))
    thread.start()
    found = dict(of_socket(address))
    thread.join()
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_a_sender_that_goes_away_half_way_is_an_error_in_the_worker(listening: Any) -> None:
    address, accept = listening
    thread = threading.Thread(target=send_all, args=(accept, TENSORS, False))
    thread.start()
    with pytest.raises(ConnectionError):
        list(of_socket(address))
    thread.join()


def test_a_worker_that_goes_away_half_way_is_an_error_in_the_sender(listening: Any) -> None:
    address, accept = listening

    def first_only() -> None:
        next(of_socket(address))

    thread = threading.Thread(target=first_only)
    thread.start()
    with pytest.raises(EngineGoneError, match="ended while it loaded weights"):
        send_all(accept, TENSORS)
    thread.join()


def test_the_digest_is_of_names_dtypes_shapes_and_bytes_and_not_of_their_order(tmp_path: Path) -> None:
    def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
        counted = Digest()
        list(counted.of(tensors))
        return str(counted)

    save_file(TENSORS, tmp_path / "model.safetensors")
    whole = digest(TENSORS.items())
    assert digest(of_folder(str(tmp_path))) == whole
    assert digest(reversed(TENSORS.items())) == whole
    for changed in (
        {"bias": torch.tensor([1.5, -2.1])},
        {"bias": TENSORS["bias"].view(2, 1)},
        {"embed": TENSORS["embed"].view(torch.float16)},
        {"other": TENSORS["bias"]},
    ):
        assert digest((TENSORS | changed).items()) != whole
    assert digest(list(TENSORS.items())[:-1]) != whole


class Engine:
    """Stands in for vLLM's engine behind the guard: takes its time to load, and counts what it is told."""

    def __init__(self) -> None:
        self.gate, self.loads, self.resets, self.broken = asyncio.Event(), 0, 0, False

    async def collective_rpc(self, method: str, args: tuple[str, ...]) -> list[str]:
        self.loads += 1
        await self.gate.wait()
        if self.broken:
            raise RuntimeError("the worker died")
        return ["d"]

    async def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return self.resets > 1  # blocks are held for a while


class Server:
    """A guard, and a way to ask it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(live_worker.TOKEN, "secret")
        self.engine, self.answer_gate = Engine(), asyncio.Event()
        self.guard = Guard(self.app)
        self.state = type("State", (), {"engine_client": self.engine})()
        self.scope_app = type("App", (), {"state": self.state})()

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        await self.answer_gate.wait()
        await live_worker.reply(send, 200, {"answered by": self.guard.loaded})

    async def ask(
        self, path: str = "/v1/chat/completions", weights: str = "", token: str = "secret", **body: Any
    ) -> tuple[int, Any]:
        sent: list[Any] = []
        headers = [(b"authorization", f"Bearer {token}".encode())]
        headers += [(b"X-ThinkSwitch-Weights".lower(), weights.encode())] if weights else []
        scope = {"type": "http", "path": path, "method": "POST", "headers": headers, "app": self.scope_app}

        async def receive() -> Any:
            return {"body": json.dumps(body).encode()}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.guard(scope, receive, send)
        return sent[0]["status"], json.loads(sent[1]["body"])


def test_answers_under_way_are_waited_for_and_none_comes_from_weights_that_it_did_not_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> None:
        server = Server(monkeypatch)
        early = asyncio.create_task(server.ask(weights="start"))
        await asyncio.sleep(0.01)
        load = asyncio.create_task(server.ask(live_worker.PLACE, id="new", source="x"))
        await asyncio.sleep(0.01)
        late = [asyncio.create_task(server.ask(weights=name)) for name in ("start", "new", "")]
        await asyncio.sleep(0.01)
        assert server.engine.loads == 0  # an answer is still under way
        server.answer_gate.set()
        assert await early == (200, {"answered by": "start"})
        await asyncio.sleep(0.01)
        assert server.engine.loads == 1 and not any(task.done() for task in (load, *late))
        server.engine.gate.set()
        assert await load == (200, {"digests": ["d"]})
        assert server.engine.resets == 2  # until the cache was empty
        refused, *answered = [await task for task in late]
        assert refused[0] == 412 and "its weights are new" in refused[1]["error"]
        assert answered == [(200, {"answered by": "new"})] * 2

    asyncio.run(work())


def test_after_a_load_that_failed_nothing_is_answered_until_another_succeeded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        server = Server(monkeypatch)
        server.answer_gate.set()
        server.engine.gate.set()
        server.engine.broken = True
        status, body = await server.ask(live_worker.PLACE, id="new", source="x")
        assert status == 500 and "the worker died" in body["error"]
        for name in ("start", "new", ""):
            status, body = await server.ask(weights=name)
            assert status == 412 and "no whole weights" in body["error"]
        server.engine.broken = False
        assert (await server.ask(live_worker.PLACE, id="newer", source="x"))[0] == 200
        assert await server.ask(weights="newer") == (200, {"answered by": "newer"})

    asyncio.run(work())


@pytest.mark.parametrize("path", ["/v1/models", live_worker.PLACE, "/collective_rpc", "/metrics", "/tokenize"])
def test_every_path_but_the_health_asks_for_the_token(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    async def work() -> None:
        server = Server(monkeypatch)
        server.answer_gate.set()
        for token in ("", "wrong"):
            assert (await server.ask(path, token=token))[0] == 401
        assert server.engine.loads == 0
        assert (await server.ask("/health", token=""))[0] == 200

    asyncio.run(work())


def test_the_worker_loads_a_folder_or_a_stream_by_vllms_own_loader(
    tmp_path: Path, listening: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: dict[str, torch.Tensor] = {}

    order: list[str] = []
    monkeypatch.setattr(live_worker, "prepare_experts", lambda model: order.append("experts"))
    monkeypatch.setattr(live_worker, "prepare_tied_heads", lambda model: loaded.update(model))

    class Worker(Weights):
        model_runner = SimpleNamespace(get_model=lambda: {"prepared": torch.ones(1)})

        def reload_weights(self, weights_iterator: Iterable[tuple[str, torch.Tensor]]) -> None:
            order.append("reload")
            loaded.update(weights_iterator)

    save_file(TENSORS, tmp_path / "model.safetensors")
    of_file = Worker().thinkswitch_load(str(tmp_path), "yes")
    assert loaded.keys() == {*TENSORS, "prepared"} and len(of_file) == 64
    loaded.clear()
    address, accept = listening
    thread = threading.Thread(target=send_all, args=(accept, TENSORS))
    thread.start()
    assert Worker().thinkswitch_load(address, "yes") == of_file
    thread.join()
    assert loaded.keys() == {*TENSORS, "prepared"}
    assert order == ["experts", "reload"] * 2


# From here on a real vLLM, one for all tests.


@pytest.fixture(scope="module")
def roles(finished_run: Path) -> dict[str, Path]:
    pair = files.read_json(finished_run / "iter-0" / "pair.json")
    found = {mode: Path(pair[mode]["path"]).absolute() for mode in ("instruct", "thinking")}
    return {**found, "instruct-0": found["instruct"], "base": found["instruct"].with_name("base")}


@pytest.fixture(scope="module")
def holder(roles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    work = tmp_path_factory.mktemp("live")
    keys = EngineKeys.model_validate({"vllm_args": [IN_REQUESTS]})
    subject = MergeJob(roles["thinking"], roles["thinking"], keys, work, work / "vllm.log", batch=64, budget=64)
    live = Live(subject)
    yield live
    live.close()


def placed(name: str, roles: dict[str, Path], weight: float | None = None) -> dict[str, Any]:
    path = ROOT / "merge_configs" / name
    config = fit_layers(files.read_yaml(path), 4)
    if weight is not None:
        config = set_lambda(config, weight, path)
    return dict(place_models(config, {role: str(folder) for role, folder in roles.items()}))


def answers(asker: Any, count: int = 12) -> list[str]:
    bodies = [
        {"messages": [{"role": "user", "content": text}], "max_tokens": 64, "temperature": 0, "stop": ["<|im_end|>"]}
        for text in task.held_out(count)
    ]
    replies = ask_in_order(asker, bodies)
    assert not any(isinstance(reply, Unanswered) for reply in replies), replies
    return [reply["choices"][0]["message"]["content"] for reply in replies]  # type: ignore[index]


def digest_of(folder: Path) -> str:
    counted = Digest()
    list(counted.of(of_folder(str(folder))))
    return str(counted)


@REAL
def test_what_a_running_server_holds_is_what_the_same_merge_has_on_disk(
    holder: Live, roles: dict[str, Path], tmp_path: Path
) -> None:
    said = {}
    for name, weight in (
        ("slerp.yaml", -1.0),
        ("slerp.yaml", 0.0),
        ("slerp.yaml", 0.6),
        ("linear.yaml", 0.6),
        ("thinkswitch.yaml", 1.0),
        ("layers/2-first.yaml", None),
        ("modules/attention-mixed-ffn-thinking.yaml", None),
        ("baselines/ties.yaml", None),
    ):
        config = placed(name, roles, weight)
        engine = holder.hold(config)
        engine.count_digests = True
        said[name, weight] = answers(engine)
        out = tmp_path / "merged"
        files.write_yaml(tmp_path / "merge.yaml", config)
        merge(tmp_path / "merge.yaml", out, MergeOptions(copy_tokenizer=True))
        assert engine.digests == [digest_of(out)], name
        files.remove(out)
    for weight, mode, name in ((0.0, "instruct", "slerp.yaml"), (1.0, "thinking", "thinkswitch.yaml")):
        shutil.copytree(roles[mode], tmp_path / mode)
        checkpoint.adopt_mode(roles["thinking"], tmp_path / mode)
        assert said[name, weight] == answers(EmbeddedEngine(tmp_path / mode, batch=64)), mode
    assert said["slerp.yaml", -1.0] != said["thinkswitch.yaml", 1.0]
    assert all(path.is_symlink() for path in holder.job.work.rglob("*.safetensors"))


@REAL
def test_the_real_server_asks_for_its_token_and_has_no_development_endpoints(holder: Live, roles: Any) -> None:
    engine = holder.hold(placed("slerp.yaml", roles, 0.5))
    server = engine.ready(512)
    url = server.base_url.removesuffix("/v1")

    def status(path: str, token: str) -> int:
        request = urllib.request.Request(url + path, data=b"{}", headers={"Authorization": f"Bearer {token}"})
        try:
            return int(urllib.request.urlopen(request, timeout=10).status)
        except urllib.error.HTTPError as error:
            return error.code

    paths = ["/v1/chat/completions", "/collective_rpc", "/pause", "/sleep", "/reset_prefix_cache", live_worker.PLACE]
    assert [status(path, "wrong") for path in paths] == [401] * 6
    assert [status(path, server.token) for path in paths[1:5]] == [404] * 4
    assert server.base_url.startswith("http://127.0.0.1:")
    log = holder.job.log.read_text()
    assert server.token not in log


@REAL
def test_lambda_is_moved_from_another_process_by_what_its_user_alone_can_read(
    holder: Live, roles: dict[str, Path], tmp_path: Path
) -> None:
    thinking = answers(holder.hold(placed("slerp.yaml", roles, 1.0)))
    assert holder.engine is not None
    path = tmp_path / "serve" / "live.json"
    path.parent.mkdir()
    about = {"roles": {name: str(folder) for name, folder in roles.items()}, "seed": 0}
    note_server(path, holder.engine, {"config": files.read_yaml(ROOT / "merge_configs" / "slerp.yaml"), **about})
    assert path.stat().st_mode & 0o777 == 0o600
    move_lambda(tmp_path, -1.0)
    state = files.read_json(path)
    client = openai.OpenAI(base_url=state["url"], api_key=state["token"])
    chat: Any = [{"role": "user", "content": task.held_out(1)[0]}]
    reply = client.chat.completions.create(
        model=state["folder"], messages=chat, temperature=0, max_tokens=64, extra_body={"skip_special_tokens": False}
    )
    moved = str(reply.choices[0].message.content).removesuffix("<|im_end|>")
    assert moved == answers(holder.hold(placed("slerp.yaml", roles, -1.0)), 1)[0] != thinking[0]
    with pytest.raises(ThinkSwitchError, match="No server of"):
        move_lambda(tmp_path / "elsewhere", 0.5)


@REAL
def test_a_rebuild_through_vllm_tries_its_lambdas_live_and_writes_the_checkpoint_of_the_accepted_one(
    finished_run: Path, holder: Live, roles: dict[str, Path], tmp_path: Path
) -> None:
    here, recipe = finished_run / "iter-1", load_recipe(ROOT / "recipes" / "arithmetic.yaml").keys

    class Shared(Check):
        def holding(self, anchor: Path) -> AbstractContextManager[Live]:
            return nullcontext(holder)

    keys = recipe.rebuild.model_copy(update={"lambda_": -1.0, "lambda_steps": [recipe.rebuild.lambda_]})
    check = Shared(
        here / "requests.jsonl",
        reference_requests=here / "requests.jsonl",
        reference=here / "generations.jsonl",
        engine="vllm",
        engine_keys=recipe.engine,
        logs=tmp_path / "logs",
    )
    written: list[Path] = []
    found = rebuild_thinking(
        here / "instruct",
        roles["thinking"],
        keys,
        tmp_path / "thinking",
        check,
        lambda folder, _: written.append(folder),
    )
    before = files.read_json(here / "rebuild.json")
    assert [one["lambda"] for one in found["tried"]] == [-1.0, before["lambda"]] and len(written) == 1
    assert found["tried"][1] == before["tried"][-1]
    assert digest_of(tmp_path / "thinking") == digest_of(here / "thinking")


@REAL
def test_one_server_evaluates_both_checkpoints_of_an_iteration_as_each_is_evaluated_by_itself(
    finished_run: Path, holder: Live, roles: dict[str, Path], tmp_path: Path
) -> None:
    keys = load_recipe(ROOT / "recipes" / "arithmetic.yaml").keys
    judged = keys.evaluation.model_copy(update={"backend": "server", "limit": 40})
    keys, served = keys.model_copy(update={"evaluation": judged}), Served(keys.engine)
    served.engine = holder.hold(placed("slerp.yaml", roles, 0.5))
    process = served.engine.ready(512).process
    for mode in MODES:
        place, name = tmp_path / mode, str(roles[mode])
        evaluate_checkpoint(Subject(name), place, keys, "vllm", log=tmp_path / "log", served=served)
        before = samples_of(finished_run / "iter-0" / "eval" / mode, keys, name)[:40]
        assert samples_of(place, keys, name) == before
    assert served.engine.server is not None and served.engine.server.process is process


@pytest.mark.slow
def test_a_server_answers_only_for_checkpoints_that_differ_in_what_requests_tell_it(
    finished_run: Path, tmp_path: Path
) -> None:
    pair = files.read_json(finished_run / "iter-0" / "pair.json")
    thinking, instruct = (Path(pair[mode]["path"]).absolute() for mode in ("thinking", "instruct"))
    assert one_server_holds(thinking, instruct) and one_server_holds(instruct, instruct)
    assert not one_server_holds(thinking, Path("Qwen/Qwen3-4B"))
    told = told_of(thinking)
    assert told["temperature"] == 1.0 and "<think>" in told["chat_template"]
    for file, old, new, same in (
        ("generation_config.json", '"do_sample": false', '"do_sample": true, "top_k": 20', True),
        ("generation_config.json", '"eos_token_id": 2', '"eos_token_id": 3', False),
        ("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05', False),
        ("tokenizer.json", '"content": "<think>"', '"content": "<thought>"', False),
    ):
        shutil.copytree(thinking, tmp_path / "other")
        text = (tmp_path / "other" / file).read_text()
        assert old in text, file
        (tmp_path / "other" / file).write_text(text.replace(old, new))
        assert one_server_holds(instruct, tmp_path / "other") is same, file
        assert told_of(tmp_path / "other")["top_k"] == (20 if same else 0)
        shutil.rmtree(tmp_path / "other")


@REAL
def test_a_worker_that_is_killed_inside_a_load_is_replaced_and_no_answer_comes_from_half_the_weights(
    holder: Live, roles: dict[str, Path]
) -> None:
    wanted = answers(holder.hold(placed("slerp.yaml", roles, 1.0)))
    engine = holder.hold(placed("slerp.yaml", roles, -1.0))
    direct = answers(engine)
    assert direct != wanted
    whole = sending(placed("slerp.yaml", roles, 1.0), engine.folder, 0)
    killed: list[int] = []

    def kill_in_the_middle(send: Any) -> None:
        sent = 0

        def counted(name: str, tensor: torch.Tensor) -> None:
            nonlocal sent
            sent += 1
            if sent == 10 and not killed:
                assert engine.server is not None and engine.server.process is not None
                for below in psutil.Process(engine.server.process.pid).children(recursive=True):
                    if "EngineCore" in " ".join([below.name(), *below.cmdline()]):
                        killed.append(below.pid)
                        below.kill()
            send(name, tensor)

        whole(counted)

    engine.hold(kill_in_the_middle)
    assert answers(engine) == wanted
    assert killed
