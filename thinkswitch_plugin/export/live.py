"""`thinkswitch serve --lambda`: one vLLM that holds the interpolation of a pair, and a command that moves its λ.

iter-1/serve/live.json    where the running server is, and its token; only its user can read it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.engines.generate import room_for
from thinkswitch_plugin.engines.live import EngineGoneError, LiveVllm
from thinkswitch_plugin.engines.servers import choose
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.config import of_recipe, place_models, set_lambda
from thinkswitch_plugin.merging.holding import SERVED, Live, MergeJob, sending
from thinkswitch_plugin.search.pair import Pair, Template

STATE = "live.json"
MODEL = "interpolated"  # its name for users


def serve_live(pair: Pair, weight: float, template: Template, port: int, extra: Sequence[str]) -> None:
    """Start vLLM with the pair interpolated at λ = `weight`, to this machine only, and stay until it ends.

    Args:
        template: whose tokenizer and chat template it gets.
        port: 0 takes any free one.
        extra: further options of vLLM.

    Raises `ThinkSwitchError` if there is no vLLM, the pair cannot be merged, or vLLM ends.
    """
    choose("vllm")
    keys, work = pair.keys, pair.out / "serve"
    skeleton = pair.roles["thinking"]
    names = ["--served-model-name", str(work / SERVED), MODEL]
    options = keys.engine.model_copy(update={"port": port, "vllm_args": [*keys.engine.vllm_args, *names, *extra]})
    job = MergeJob(skeleton, pair.roles[template], options, work, work / "vllm.log", batch=1, seed=pair.seed)
    config, _ = of_recipe(keys.rebuild)
    holder = Live(job)
    try:
        engine = holder.hold(_placed(config, weight, pair.roles))
        server = engine.ready(room_for(str(skeleton), keys.longest_answer))
        note_server(work / STATE, engine, {"config": config, "roles": _folders(pair.roles), "seed": pair.seed})
        console.say(f"λ = {weight:g} at {server.base_url}; the model is {MODEL}, the key {server.token}")
        console.say(
            "Move λ from another window: thinkswitch serve-lambda 0.6, with the same --domain, --runs and --iteration"
        )
        while True:
            server.require_alive(wait=1)
    except EngineGoneError as error:
        raise ThinkSwitchError(f"vLLM could not be given the weights: {error}; its log is {job.log}.") from None
    finally:
        files.remove(work / STATE)
        holder.close()


def note_server(path: Path, engine: LiveVllm, about: Mapping[str, Any]) -> None:
    """Write where a running server is and what is merged, for `move_lambda`; only the user can read the file."""
    files.remove(path)
    path.touch(mode=0o600)
    path.write_bytes(files.dumps_line({**engine.address(), "folder": str(engine.folder.absolute()), **about}))


def move_lambda(results: Path, weight: float) -> None:
    """Give the server that `serve_live` started the weights of another λ.

    Args:
        results: the folder of the pair's iteration.

    Raises `ThinkSwitchError` if there is no such server, or it does not take the weights.
    """
    path = results / "serve" / STATE
    if not path.is_file():
        raise ThinkSwitchError(f"No server of {results} is running; start one by `make serve LAMBDA={weight:g}`.")
    state = files.read_json(path)
    roles = {name: Path(folder) for name, folder in state["roles"].items()}
    engine = LiveVllm(Path(state["folder"]), EngineKeys.model_validate({}), path.with_name("vllm.log"))
    engine.attach(state)
    engine.hold(sending(_placed(state["config"], weight, roles), engine.folder, state["seed"]))
    try:
        engine.ready(0)
    except EngineGoneError as error:
        raise ThinkSwitchError(
            f"The server did not take the weights of λ = {weight:g}: {error}; stop it and start it again by `make serve LAMBDA={weight:g}`."
        ) from None
    console.say(f"  λ = {weight:g} at {state['url']}")


def _placed(config: dict[str, Any], weight: float, roles: Mapping[str, Path]) -> dict[str, Any]:
    """A merge config with λ and real folders in it."""
    return dict(place_models(set_lambda(config, weight, Path("the merge config")), _folders(roles)))


def _folders(roles: Mapping[str, Path]) -> dict[str, str]:
    return {name: str(folder.absolute()) for name, folder in roles.items()}
