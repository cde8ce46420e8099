"""A vLLM whose weights are changed in place, so that one server answers for many merges and checkpoints.

The merge runs in this process and sends each tensor to vLLM's workers, which load it as they would from a file
(`live_worker.py`). A server that ends is started again, and gets the same weights again; requests name the weights
that are to answer, so none is answered by others.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from thinkswitch_plugin import console
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.engines import live_worker
from thinkswitch_plugin.engines.ask import Arrived, Reply, Request
from thinkswitch_plugin.engines.client import ServedModel
from thinkswitch_plugin.engines.connection import LOOPBACK
from thinkswitch_plugin.engines.generate import asked_text, room_for
from thinkswitch_plugin.engines.replies import Unanswered
from thinkswitch_plugin.engines.servers import Server, serving
from thinkswitch_plugin.environment import variable
from thinkswitch_plugin.errors import ThinkSwitchError

STARTS = 3  # of a server for the same weights
REFUSED = re.compile(r"Worker failed with error '(.+?)(?:\. |', please|$)")  # by a live worker: no use to start again
OF_FOLDER = "start"  # the id of the weights that a server is started with
MODULE = "thinkswitch_live"  # the name of `live_worker.py` in vLLM's environment
# Behind the user's own options, so that these count: one guard knows of all requests, and only this machine reaches it.
OPTIONS = (
    *("--worker-extension-cls", f"{MODULE}.Weights", "--middleware", f"{MODULE}.Guard"),
    *("--api-server-count", "1", "--data-parallel-size", "1", "--host", LOOPBACK),
)

Send = Callable[[str, torch.Tensor], None]
Source = Path | Callable[[Send], None]  # a checkpoint folder, or what calls `send` with each tensor of one


class EngineGoneError(Exception):
    """The server ended, or does not hold the weights that it should."""


@dataclass(frozen=True)
class Weights:
    """What a server is to hold; the id is new for every load."""

    source: Source
    id: str


class Sender:
    """Sends tensors to vLLM's workers as files in memory; the next one when all of them have asked for it."""

    def __init__(self, workers: Sequence[socket.socket]) -> None:
        self.workers = workers
        self.sent = False

    def __call__(self, name: str, tensor: torch.Tensor) -> None:
        """Send one tensor in checkpoint layout. Raises `EngineGoneError` if a worker has gone."""
        held = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        about = {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        with os.fdopen(os.memfd_create("thinkswitch"), "wb") as memory:
            memory.write(held)
            memory.flush()
            self._line(json.dumps({**about, "bytes": held.nbytes}).encode(), memory.fileno())

    def end(self) -> None:
        """Say that this was all."""
        self._line(b"end")

    def _line(self, line: bytes, *handles: int) -> None:
        try:
            for worker in self.workers:
                if self.sent and not worker.recv(16):
                    raise EngineGoneError("a worker of vLLM ended while it loaded weights")
                socket.send_fds(worker, [line], list(handles))
        except OSError as error:
            raise EngineGoneError(f"a worker of vLLM ended while it loaded weights ({error})") from None
        self.sent = True


class LiveVllm:
    """One vLLM, started when it is first asked, as an `Asker`.

    Args:
        folder: the checkpoint that it is started on; its config and tokenizer count for all weights that it gets.
        budget: tokens of the longest completion, where the requests do not say so.
        shown: standard output and error for what concerns the server, whatever becomes of lm-eval's own.
    """

    def __init__(
        self, folder: Path, keys: EngineKeys, log: Path, budget: int = 0, shown: tuple[Any, Any] | None = None
    ) -> None:
        self._shown = shown or (sys.stdout, sys.stderr)
        options = [*keys.vllm_args, *OPTIONS]
        self.folder, self.log, self.budget = folder, log, budget
        self.keys = keys.model_copy(update={"vllm_args": options})
        self.wanted = Weights(folder, OF_FOLDER)
        self.server: Server | None = None
        self.digests: list[str] = []
        self.count_digests = False
        self._room, self._loaded, self._private = 0, "", Path()
        self._running = ExitStack()

    def hold(self, source: Source) -> None:
        """Have the next answers come from these weights; they are loaded when they are needed."""
        self.wanted = Weights(source, secrets.token_hex(8))

    def ask(self, requests: Iterable[Request], arrived: Arrived) -> None:
        """As `Asker.ask`. A server that ends is started again, and asked for what is missing.

        Raises `ThinkSwitchError` if it does not stay up, and as `ServedModel.ask`.
        """
        left = {request["custom_id"]: request for request in requests}
        if not left:
            return

        def noted(request: Request, reply: Reply) -> Request | None:
            if isinstance(reply, Unanswered) and not self._as_wanted():
                raise EngineGoneError(str(reply))
            if again := arrived(request, reply):
                left[request["custom_id"]] = again
            else:
                del left[request["custom_id"]]
            return again

        longest = max(map(asked_text, left.values()), key=len)
        budget = max(self.budget, *(request["body"]["max_tokens"] for request in left.values()))

        def work(server: Server) -> None:
            ServedModel(server, str(self.folder), self.keys).ask(list(left.values()), noted)

        self.with_server(room_for(str(self.folder), budget, longest), work)

    def with_server(self, room: int, work: Callable[[Server], None]) -> None:
        """Do some work with a server that holds the weights; started again, and the rest done again, if it ends.

        Args:
            room: tokens of the longest prompt and completion.
        """
        for attempt in range(STARTS):
            try:
                work(self.ready(room))
                return
            except (EngineGoneError, ThinkSwitchError) as error:
                if isinstance(error, ThinkSwitchError) and (self.server is None or self._as_wanted()):
                    raise
                self.close()
                if attempt + 1 == STARTS:
                    raise ThinkSwitchError(
                        f"vLLM ended {STARTS} times with the same weights; its log is {self.log}. The last time: {error}"
                    ) from None
                with redirect_stdout(self._shown[0]), redirect_stderr(self._shown[1]):
                    console.say(f"  vLLM ended ({error}); it is started again, and what is missing is asked again")

    def ready(self, room: int) -> Server:
        """The server with the weights in it. Raises `EngineGoneError` if it ends before, and as `serving`."""
        if self.server is not None and room > self._room:
            self.close()
        if self.server is None:
            self.start(room)
        assert self.server is not None
        if self._loaded != self.wanted.id:
            self._load(self.wanted)
            self._loaded = self.wanted.id
        return replace(self.server, weights=self.wanted.id)

    def address(self) -> dict[str, str]:
        """What another process of this user needs to change the weights of the running server: see `attach`."""
        assert self.server is not None
        return {"url": self.server.base_url, "token": self.server.token, "private": str(self._private)}

    def attach(self, address: Mapping[str, str]) -> None:
        """Use a server that another process started and keeps."""
        self.server = Server(address["url"], token=address["token"])
        self._room, self._private = sys.maxsize, Path(address["private"])

    def close(self) -> None:
        """End the server; asked again, it starts again."""
        self.server, self._loaded = None, ""
        self._running.close()

    def start(self, room: int) -> None:
        """Start the server, with the weights of its folder. Raises as `serving`."""
        token = secrets.token_urlsafe(24)
        with redirect_stdout(self._shown[0]), redirect_stderr(self._shown[1]), ExitStack() as stack:
            # A folder that nobody else can read: the module for vLLM, and the socket for the weights.
            private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thinkswitch-")))
            shutil.copy(str(live_worker.__file__), private / f"{MODULE}.py")
            path = os.pathsep.join(filter(None, (str(private), variable("PYTHONPATH"))))
            env = {live_worker.TOKEN: token, "PYTHONPATH": path}
            server = stack.enter_context(serving("vllm", str(self.folder), self.keys, self.log, max_len=room, env=env))
            self.server, self._room, self._loaded = replace(server, token=token), room, OF_FOLDER
            self._private, self._running = private, stack.pop_all()

    def _load(self, weights: Weights) -> None:
        """Raises `EngineGoneError` if the server fails, and whatever the source raises; the server is of no use then."""
        try:
            if isinstance(weights.source, Path):
                self._request({"id": weights.id, "source": str(weights.source.absolute())})
            else:
                self._stream(weights.source, weights.id)
        except BaseException as error:
            self.close()
            if found := REFUSED.search(str(error)):
                raise ThinkSwitchError(
                    f"vLLM cannot load these weights ({found[1]}); use `thinkswitch.evaluation.backend: hf` in an overlay."
                ) from None
            raise

    def _stream(self, source: Callable[[Send], None], name: str) -> None:
        address = self._private / "weights"
        posted: Future[dict[str, Any]] = Future()

        def post() -> None:
            try:
                posted.set_result(self._request({"id": name, "source": str(address)}))
            except BaseException as error:
                posted.set_exception(error)

        with ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            stack.callback(address.unlink, missing_ok=True)
            listener.bind(str(address))
            listener.listen()
            listener.settimeout(0.5)
            expected = self._request()["workers"]
            threading.Thread(target=post, daemon=True).start()
            workers: list[socket.socket] = []
            connections = stack.enter_context(ExitStack())
            while len(workers) < expected:
                if posted.done():
                    posted.result()
                    raise EngineGoneError("the workers of vLLM did not take the weights")
                try:
                    workers.append(connections.enter_context(listener.accept()[0]))
                except TimeoutError:
                    self._request(place="/health")  # an engine that has ended never connects
            for worker in workers:
                worker.settimeout(self.keys.start_timeout)
            sender = Sender(workers)
            try:
                source(sender)
                sender.end()
            except EngineGoneError:
                with suppress(TimeoutError):
                    posted.result(10)  # raises with the server's own words, if it can still say why
                raise
            while not posted.done():
                with suppress(TimeoutError):
                    posted.result(1)
                self._request(place="/health")  # an engine that has ended never answers a load
            posted.result()

    def _as_wanted(self) -> bool:
        """Whether the engine runs and holds the weights that are to answer."""
        try:
            self._request(place="/health")
            return self._request()["id"] == self.wanted.id
        except EngineGoneError:
            return False

    def _request(self, body: dict[str, str] | None = None, place: str = live_worker.PLACE) -> dict[str, Any]:
        """GET, or POST with a body. Raises `EngineGoneError` with the server's words."""
        if self.server is None:
            raise EngineGoneError("it is not running")
        if body is not None and self.count_digests:
            body = {**body, "digest": "yes"}
        request = urllib.request.Request(
            self.server.base_url.removesuffix("/v1") + place,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.server.token}"},
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=10 if body is None else self.keys.start_timeout) as answer:
                found: dict[str, Any] = json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise EngineGoneError(f"status {error.code}: {error.read().decode(errors='replace')[:500]}") from None
        except (OSError, ValueError) as error:
            raise EngineGoneError(str(error)) from None
        self.digests = found.get("digests", self.digests)
        return found
