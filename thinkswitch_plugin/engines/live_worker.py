"""What runs inside vLLM to change its weights in place; this one file is all that vLLM's environment needs of us.

`Weights` is mixed into every worker (`--worker-extension-cls`). It takes tensors in checkpoint layout, from a
checkpoint folder or one by one from another process, and hands them to vLLM's own loaders, which shard, fuse and
round them as at the start. `Guard` stands before vLLM's API (`--middleware`). It asks for the run's token, has one
endpoint of its own, and lets no request through while weights are being loaded:

    POST /thinkswitch/weights {"id": "…", "source": "…"}    -> {"digests": […]}
    GET  /thinkswitch/weights                               -> {"id": "…", "workers": 1}

A request whose header names other weights than those that are loaded is refused with 412, so no answer can come from
weights that were not meant. vLLM's development endpoints are not needed, and stay closed.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import mmap
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

HEADER = "x-thinkswitch-weights"
PLACE = "/thinkswitch/weights"
TOKEN = "VLLM_API_KEY"  # vLLM's own name for it
CACHE_SECONDS = 30.0  # that the blocks of finished requests may take to be released


class Digest:
    """The digest of a checkpoint: SHA-256 of all names, dtypes, shapes and bytes, whatever the order of the tensors."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def of(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors, each counted in."""
        for name, tensor in tensors:
            held = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
            held.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self.found.append(held.hexdigest())
            yield name, tensor

    def __str__(self) -> str:
        return hashlib.sha256("".join(sorted(self.found)).encode()).hexdigest()


def of_folder(folder: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint folder, one at a time."""
    index = Path(folder) / "model.safetensors.index.json"
    if index.is_file():
        shards = [Path(folder) / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        shards = sorted(Path(folder).glob("*.safetensors"))
    for shard in shards:
        with safe_open(str(shard), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                yield name, handle.get_tensor(name)


def of_socket(address: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that another process of this machine sends: for each one a line of JSON and a file in memory.

    Raises `ConnectionError` if the sender goes away before the end.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sender:
        sender.connect(address)
        while True:
            line, handles, _, _ = socket.recv_fds(sender, 1 << 16, 1)
            if not line:
                raise ConnectionError("the process that sends the weights has gone")
            if line == b"end":
                return
            about = json.loads(line)
            dtype, size = getattr(torch, about["dtype"]), about["bytes"]
            if size:
                # Private: a loader that writes into a tensor changes nobody else's.
                held = mmap.mmap(handles[0], size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
                tensor = torch.frombuffer(held, dtype=dtype).view(about["shape"])
            else:
                tensor = torch.empty(about["shape"], dtype=dtype)
            for handle in handles:
                os.close(handle)
            yield about["name"], tensor
            sender.send(b"next")


class Weights:
    """Mixed into each worker of vLLM."""

    def thinkswitch_load(self, source: str, digest: str = "") -> str:
        """Load weights from a checkpoint folder or the address of a socket; returns their digest if one is asked for."""
        counted = Digest()
        tensors = of_folder(source) if Path(source).is_dir() else of_socket(source)
        model = self.model_runner.get_model()  # type: ignore[attr-defined]
        prepare_experts(model)
        self.reload_weights(weights_iterator=counted.of(tensors) if digest else tensors)  # type: ignore[attr-defined]
        prepare_tied_heads(model)
        return str(counted) if digest else ""


def prepare_experts(model: torch.nn.Module) -> None:
    """Have experts packed for the kernels of a CPU at the next reload, as they are at a start.

    vLLM 0.32 packs them only with the first weights (`UnquantizedFusedMoEMethod._setup_kernel`): after a reload the
    kernel would take unpacked weights for packed ones, or the reload would fail if packing pads them. On a GPU the
    kernel has to stay, since CUDA graphs hold on to what belongs to it.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts

    for module in model.modules():
        method = getattr(module, "quant_method", None)
        experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
        packs = type(experts).process_weights_after_loading if isinstance(experts, FusedMoEExperts) else None
        if packs not in (None, FusedMoEExperts.process_weights_after_loading):
            method.moe_kernel = None  # type: ignore[union-attr]


def prepare_tied_heads(model: torch.nn.Module) -> None:
    """Have output heads that are the embedding take its new values.

    At a start vLLM rearranges the weight of a tied head for its CPU kernels, as it does at a start and at a reload for
    every layer with a weight of its own; a tied head is left out at a reload (vLLM 0.32), and would keep the old values.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(module, ParallelLMHead) and isinstance(method, UnquantizedEmbeddingMethod):
            method.process_weights_after_loading(module)


class Guard:
    """ASGI middleware: the run's token, and no answers from weights that are being loaded or were not asked for."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.token = os.environ[TOKEN]
        self.loaded: str | None = "start"  # None: nothing that may answer
        self.answering = 0
        self.changed = asyncio.Condition()
        self.loading = asyncio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer our endpoint, pass on what may be passed on, and refuse the rest."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {name.decode().lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["path"] == "/health":
            return await self.app(scope, receive, send)
        if not hmac.compare_digest(headers.get("authorization", "").encode(), f"Bearer {self.token}".encode()):
            return await reply(send, 401, {"error": "this server is asked with the token of its run"})
        if scope["path"] == PLACE:
            return await self.weights(scope, receive, send)
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        async with self.changed:
            await self.changed.wait_for(lambda: not self.loading.locked())
            wanted = headers.get(HEADER, self.loaded)
            if self.loaded is None or wanted != self.loaded:
                why = "no whole weights are loaded" if self.loaded is None else f"its weights are {self.loaded}"
                return await reply(send, 412, {"error": f"this server cannot answer with {wanted}: {why}"})
            self.answering += 1
        try:
            await self.app(scope, receive, send)
        finally:
            async with self.changed:
                self.answering -= 1
                self.changed.notify_all()

    async def weights(self, scope: Any, receive: Any, send: Any) -> None:
        """Say which weights are loaded, or load others."""
        state = scope["app"].state
        if scope["method"] == "GET":
            parallel = state.vllm_config.parallel_config
            workers = parallel.world_size * parallel.data_parallel_size
            return await reply(send, 200, {"id": self.loaded, "workers": workers})
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        asked = json.loads(body)
        try:
            async with self.loading:
                digests = await self.load(state.engine_client, asked)
        except Exception as error:  # whatever the engine raised, the process that asked has to hear of it
            await reply(send, 500, {"error": f"{type(error).__name__}: {error}"})
        else:
            await reply(send, 200, {"digests": digests})
        finally:
            async with self.changed:
                self.changed.notify_all()

    async def load(self, engine: Any, asked: dict[str, str]) -> list[str]:
        """Wait for the answers under way, load, and drop what was cached of the weights before."""
        async with self.changed:
            await self.changed.wait_for(lambda: not self.answering)
        self.loaded = None
        digests = await engine.collective_rpc("thinkswitch_load", args=(asked["source"], asked.get("digest", "")))
        for _ in range(int(CACHE_SECONDS / 0.05)):
            if await engine.reset_prefix_cache():
                break
            await asyncio.sleep(0.05)
        else:
            raise RuntimeError("the prefix cache could not be emptied")
        self.loaded = asked["id"]
        return list(map(str, digests))


async def reply(send: Any, status: int, body: dict[str, Any]) -> None:
    """A JSON response."""
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})
