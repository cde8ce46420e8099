"""Choose the engine; start vLLM around a piece of work, wait for it, stop it; or connect to a running server."""

from __future__ import annotations

import itertools
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from thinkswitch_plugin import console, files, places
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.engine_args import DATA_PARALLEL, addresses, option_name, option_values
from thinkswitch_plugin.engines.connection import LOOPBACK, NoServerError, listed_models
from thinkswitch_plugin.environment import has_cuda, variable, visible_gpus
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.run import processes
from thinkswitch_plugin.run.progress import Bar

# The values of vLLM's --max-lora-rank (vllm/config/lora.py).
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_SERVER_DEV_MODE": "0",  # endpoints that anyone who reaches the port could use, with or without a key
}

NO_VLLM = (
    "vLLM is not installed; run `make setup-vllm`, or point VLLM_PYTHON at the python of an environment that has it."
)


@dataclass(frozen=True)
class Server:
    """A server that answers at `base_url` (…/v1); `process` and `log` if it was started here.

    `replicas` are further servers of the same model, which share its requests. `away` says that it does not answer yet.
    `keeps_special` says whether it accepts vLLM's field that keeps special tokens in the text. `token` and `weights` belong
    to a vLLM whose weights change (`live.py`): its own key, and the id of the weights that are to answer.
    """

    base_url: str
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None
    keeps_special: bool = False
    token: str = ""
    weights: str = ""
    replicas: tuple[Server, ...] = ()
    away: bool = False

    def require_alive(self, wait: float = 0) -> None:
        """Raise `ThinkSwitchError` if an engine that was started here has ended, or ends within `wait` seconds.

        Nobody would start it again.
        """
        if self.process is None or self.log is None:
            return
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(wait)
            raise ThinkSwitchError(
                f"The engine stopped during its work (exit code {self.process.returncode}): {processes.fault(self.log)}; "
                f"its log is {self.log}. What was finished is kept: run the same command again."
            )


def vllm_python() -> Path | None:
    """The interpreter that has vLLM: `VLLM_PYTHON`, then `.venv-vllm`, then the one of `vllm` on the path."""
    candidates = [variable("VLLM_PYTHON"), str(places.find(places.VLLM_PYTHON))]
    command = shutil.which("vllm")
    if command:
        candidates.append(str(Path(command).resolve().parent / "python"))
    return next((Path(c) for c in candidates if c and Path(c).is_file()), None)


def choose(engine: str) -> str:
    """What `ENGINE=` means on this machine: `vllm`, `embedded`, or base URLs separated by commas.

    A run that was begun keeps its engine for `auto`, and `thinkswitch compare` takes the embedded one if the model fits.

    Raises `ThinkSwitchError` for an unknown name, vLLM if it is not installed, or a URL that holds a secret.
    """
    if addresses(engine):
        return ",".join(dict.fromkeys(map(_address, addresses(engine))))
    if engine not in ("auto", "vllm", "embedded"):
        raise ThinkSwitchError(f"ENGINE={engine} is unknown; use auto, vllm, embedded or a base URL.")
    if engine == "vllm" and vllm_python() is None:
        raise ThinkSwitchError(f"ENGINE=vllm: {NO_VLLM}")
    return engine if engine != "auto" else "vllm" if vllm_python() else "embedded"


def _address(text: str) -> str:
    """One base URL as it is used. Raises `ThinkSwitchError` if it is not one, or holds a secret."""
    text = text.strip()
    try:
        parts = urllib.parse.urlsplit(text)
        secret = "@" in parts.netloc or parts.query or parts.fragment
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        secret, usable = None, False
    if secret:
        raise ThinkSwitchError(
            "ENGINE= contains a user name and password, or a `?` or `#` part, which would be written to files and logs; "
            "give the plain address, and the key as OPENAI_API_KEY in the environment."
        )
    if not usable:
        raise ThinkSwitchError(
            f"ENGINE=: {text!r} is not an address; use one such as http://127.0.0.1:8000/v1, or several with commas between."
        )
    return text.rstrip("/").removesuffix("/chat/completions").rstrip("/")


def free_port(wanted: int) -> int:
    """A free port on the loopback interface. Raises `ThinkSwitchError` if `wanted` is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, wanted))
        except OSError as error:
            raise ThinkSwitchError(
                f"Port {wanted} on {LOOPBACK} is not free ({error.strerror}); set "
                "`thinkswitch.engine.port: 0` (for `make serve`: PORT=0) to take any free one."
            ) from None
        return int(probe.getsockname()[1])


def vllm_command(model: str, port: int, keys: EngineKeys, max_len: int | None) -> list[str]:
    """The command that serves `model` with the vLLM that is installed."""
    python = vllm_python()
    if python is None:
        raise ThinkSwitchError(NO_VLLM)
    launcher = python.with_name("vllm")
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    # The CPU build installs a `vllm` command that fails: it looks up a distribution of that name.
    if launcher.is_file() and any(python.parent.parent.glob("lib/python*/site-packages/vllm-[0-9]*.dist-info")):
        command = [str(launcher), "serve", model]
    command += ["--host", LOOPBACK, "--port", str(port)]
    if max_len is not None:
        command += ["--max-model-len", str(max_len)]
    if not has_cuda():
        command += ["--gpu-memory-utilization", "0.2", "--enforce-eager", "--dtype", "float32"]
    return command + keys.vllm_args


def data_parallel(words: list[str]) -> list[str]:
    """vLLM's option for as many copies of the model as fit on the visible GPUs, unless its options speak of copies or nodes."""
    names = [option_name(word) for word in words]
    if any(name in ("--nnodes", "-n") or name.startswith(DATA_PARALLEL) for name in names):
        return []
    each = 1
    for name, size in option_values(words):
        if name in ("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp"):
            each *= int(size) if size.isdecimal() and int(size) else 1
    copies = visible_gpus() // each
    return ["--data-parallel-size", str(copies)] if copies > 1 else []


def adapter_rank(adapter: Path) -> int:
    """The largest rank in a PEFT adapter folder. Raises `ThinkSwitchError` if it is not one."""
    path = adapter / "adapter_config.json"
    config = files.read_json(path)
    try:
        return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    except (KeyError, TypeError, ValueError):
        raise ThinkSwitchError(f"{path} has no rank `r`; export the adapter again.") from None


def lora_arguments(adapters: Mapping[str, Path]) -> list[str]:
    """vLLM's options that serve PEFT adapters by name, all of them in one batch if need be.

    Raises `ThinkSwitchError` for a folder that is not an adapter, or a rank that vLLM does not serve.
    """
    largest = max(map(adapter_rank, adapters.values()))
    room = next((rank for rank in MAX_LORA_RANKS if rank >= largest), None)
    if room is None:
        raise ThinkSwitchError(f"An adapter has rank {largest}; vLLM serves up to {MAX_LORA_RANKS[-1]}.")
    named = [f"{name}={folder}" for name, folder in adapters.items()]
    return ["--enable-lora", "--max-loras", str(len(named)), "--max-lora-rank", str(room), "--lora-modules", *named]


@contextmanager
def serving(
    engine: str,
    model: str,
    keys: EngineKeys,
    log: Path,
    *,
    max_len: int | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Serve `model` for the length of the block; nothing of the engine is left afterwards.

    Args:
        engine: `vllm`, or the base URLs of servers that run already.
        model: checkpoint folder or hub id, also the name under which it is asked.
        log: the engine's output goes here.
        max_len: longest prompt plus completion, in tokens (vLLM).
        env: more variables for the engine's environment.

    Raises `ThinkSwitchError` if there is no free port or the engine does not start, and as `connect`.
    """
    if addresses(engine):
        yield connect(engine, model, unlisted=model == keys.server.model)
        return
    port = free_port(keys.port)
    command = [*vllm_command(model, port, keys, max_len), *data_parallel(keys.vllm_args)]
    log.parent.mkdir(parents=True, exist_ok=True)
    console.say(f"  $ {' '.join(command)}")
    with log.open("ab") as handle:
        process = processes.spawn(command, handle, {**VLLM_ENVIRONMENT, **(env or {})})
        try:
            _wait_until_ready(process, f"http://{LOOPBACK}:{port}/health", keys.start_timeout, engine, log)
            yield Server(f"http://{LOOPBACK}:{port}/v1", process, log, keeps_special=True)
        finally:
            processes.stop_group(process)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, timeout: float, engine: str, log: Path) -> None:
    started, direct = time.monotonic(), urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with Bar(0, f"starting {engine}") as bar:
        while time.monotonic() - started <= timeout:
            if process.poll() is not None:
                raise ThinkSwitchError(
                    f"The {engine} engine ended while starting (exit code {process.returncode}): {processes.fault(log)}; "
                    f"its log is {log}. Where vLLM cannot run a model, transformers can answer: ENGINE=embedded, and for a sweep "
                    "`thinkswitch.evaluation.backend: hf` in an overlay."
                )
            with suppress(OSError), direct.open(url, timeout=2) as reply:
                if reply.status == 200:
                    return
            time.sleep(0.5)
            bar.update(0)
    raise ThinkSwitchError(
        f"The {engine} engine did not answer within {timeout:g} s; raise "
        f"`thinkswitch.engine.start_timeout`, or see {log}:\n{processes.tail(log)}"
    )


def connect(engine: str, model: str, *, unlisted: bool = False) -> Server:
    """Running servers that are to answer as `model`: one, with the others as its replicas.

    Args:
        engine: their base URLs, separated by commas.
        unlisted: a server may know the name without listing it, as hosted ones do with variants of a model.

    Raises `ThinkSwitchError` if no server answers, or one lists other models. One that lists none is asked anyway:
    its reply to the first prompt decides. If only some answer, the others take part as soon as they do.
    """
    found: list[Server] = []
    away: dict[str, NoServerError] = {}
    for base_url in addresses(engine):
        try:
            found.append(_connected(base_url, model, unlisted))
        except NoServerError as error:
            away[base_url] = error
    if not found:
        raise next(iter(away.values()))
    for base_url, problem in away.items():
        console.notice(f"  {problem} The other servers are asked until then.")
        # Servers of one list are taken to be alike.
        found.append(Server(base_url, keeps_special=found[0].keeps_special, away=True))
    return replace(found[0], replicas=tuple(found[1:]))


def _connected(base_url: str, model: str, unlisted: bool) -> Server:
    served = listed_models(base_url)
    if served is not None and model not in served and not unlisted:
        raise ThinkSwitchError(
            f"The server at {base_url} serves {_first_names(served)}, not {model}; start it with "
            f"that checkpoint (for vLLM: --served-model-name {model}), or set `thinkswitch.engine.server.model` to the "
            "name of the model that answers, and run the same command again."
        )
    return Server(base_url, keeps_special=(served or {}).get(model) in ("vllm", "sglang"))


def _first_names(names: Collection[str]) -> str:
    """Names in a sentence; a hosted server lists hundreds."""
    shown = ", ".join(itertools.islice(names, 10)) or "nothing"
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown
