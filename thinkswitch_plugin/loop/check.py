"""`make check`: everything that can be found wrong before a GPU hour is spent.

Every finding is a line; the exit code is 1 if one of them would stop the run.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from psutil import virtual_memory

from thinkswitch_plugin import console, files
from thinkswitch_plugin.args import ThinkSwitchKeys, is_local, resolve_seed
from thinkswitch_plugin.data import prompts
from thinkswitch_plugin.data.contamination import require_uncontaminated
from thinkswitch_plugin.engines import servers
from thinkswitch_plugin.environment import has_cuda, variable, visible_gpus
from thinkswitch_plugin.errors import ThinkSwitchError, not_fetched
from thinkswitch_plugin.judging.evaluation import uses_server
from thinkswitch_plugin.loop import foretell
from thinkswitch_plugin.loop.foretell import Foretold
from thinkswitch_plugin.loop.reference import asking, require_reference, unanswered
from thinkswitch_plugin.merging.settings import config_difference
from thinkswitch_plugin.merging.tensors import quantisation, quantised
from thinkswitch_plugin.merging.vocabulary import describe_renamed, vocabulary_difference
from thinkswitch_plugin.recipe import Recipe, check_axolotl_keys, iteration_config
from thinkswitch_plugin.report import price_per_hour
from thinkswitch_plugin.run import MODES, versions
from thinkswitch_plugin.training import distil
from thinkswitch_plugin.training.layout import rows_of_a_step, spread

# Throughput of one card for a batch if it was not measured: a cautious guess, and labelled as one.
GUESSED_TOKENS_PER_SECOND = 300.0
MIB_OF_A_GB = 950  # a card sold as 24 GB shows 23,028 MiB and more, one of 8 GB a little less than 8,192


# What needs no check where the pair is made on the spot.
MADE = {
    "pair": "trained on the spot",
    "training": "made for the pair",
    "prompts": "made with the pair",
    "questions": "held out when the pair is made",
    "stages": "those of a small pair",
}


def check_domain(
    recipe: Recipe,
    runs: Path,
    engine: str,
    seed: int,
    iterations: int,
    tokens_per_second: float | None,
    price: str,
) -> None:
    """Print the findings for a recipe.

    Args:
        engine: as the user names it.
        price: of an hour of this machine, as the user wrote it.

    Raises `ThinkSwitchError` if something would stop the run.
    """
    keys = recipe.keys
    counted: dict[str, int] = {}  # the questions by task, once they are loaded
    known = None
    with suppress(ThinkSwitchError):  # the line `recipe` names what is wrong
        known = foretell.foretell(runs, recipe, seed)
    checks: dict[str, Callable[[], str]] = {
        "GPU": lambda: gpu(keys),
        "memory": lambda: memory(keys, known),
        "disk": lambda: enough(files.free_space(runs), keys.needs.disk_gb, "two iterations need"),
        "engine": lambda: engine_found(keys, engine),
        "recipe": lambda: schema(recipe),
        "processes": lambda: layout(recipe),
        "pair": lambda: pair(keys, seed),
        "training": lambda: training(recipe, seed),
        "prompts": lambda: rendered_prompts(keys, seed),
        "questions": lambda: questions(recipe, counted, seed),
        "budget": lambda: budget(keys, iterations, tokens_per_second, counted, price, known),
        "stages": lambda: foretell.describe(known, recipe, counted, iterations),
    }
    failed = 0
    for title, find in checks.items():
        try:
            on_the_spot = prompts.made_with_pair(keys) if title in ("prompts", "questions") else keys.pair.demo
            made = MADE.get(title) if on_the_spot else None
            console.say(f"  ok    {title}: {made or find()}")
        except ThinkSwitchError as problem:
            failed += 1
            console.say(f"  STOP  {title}: {problem}")
    domain = recipe.path.stem
    if failed:
        raise ThinkSwitchError(
            f"{failed} of {len(checks)} checks would stop `make iterate DOMAIN={domain}`; fix the lines marked STOP, "
            f"then run `make check DOMAIN={domain}` again."
        )
    overlays = " ".join(map(str, recipe.overlays))
    words = (f"OVERLAY='{overlays}'" if overlays else "", f"SEED={seed}" if seed else "")
    first = f" --overlay '{overlays}'" if overlays else ""
    first = f"thinkswitch reference --domain {domain}{first}, then " if unanswered(keys) else ""
    console.say(" ".join(filter(None, (f"Ready: {first}make iterate DOMAIN={domain}", *words))))


def gpu(keys: ThinkSwitchKeys) -> str:
    """GPU and its memory against what the recipe needs."""
    if not keys.needs.gpu_gb:
        return "none needed"
    if not has_cuda():
        raise ThinkSwitchError(f"none found; the recipe needs one with {keys.needs.gpu_gb:g} GB")
    visible = variable("CUDA_VISIBLE_DEVICES") or ""
    # Names that nvidia-smi takes too; parts of a card (MIG) and whatever else there is it does not.
    chosen = [f"--id={visible}"] if re.fullmatch(r"(\d+|GPU-[\w-]+)(,(\d+|GPU-[\w-]+))*", visible) else []
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits", *chosen],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        largest = max(float(line.rsplit(",", 1)[1]) for line in listed.splitlines())
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError) as error:
        raise ThinkSwitchError(f"there is a driver, but nvidia-smi does not report the GPU ({error})") from None
    if largest < keys.needs.gpu_gb * MIB_OF_A_GB:
        raise ThinkSwitchError(f"{listed} MiB; the recipe needs {keys.needs.gpu_gb:g} GB")
    return listed.replace("\n", "; ") + " MiB"


def memory(keys: ThinkSwitchKeys, known: Foretold | None) -> str:
    """Free main memory against what the recipe needs, or what a rehearsal of it took."""
    most = max((cost.memory for cost in known.costs.values()), default=0) if known else 0
    if known and not known.measured:
        most = max(most, keys.needs.ram_gb)
    needed, who = (round(most, 1), "its stages take") if most else (keys.needs.ram_gb, "the recipe needs")
    return enough(virtual_memory().available, needed, who)


def enough(free: float, needed: float, who: str) -> str:
    """Bytes that are free against the GB that somebody needs."""
    if free < needed * 1e9:
        raise ThinkSwitchError(f"{free / 1e9:.0f} GB free; {who} {needed:g} GB")
    return f"{free / 1e9:.0f} GB free, {needed:g} GB needed"


def engine_found(keys: ThinkSwitchKeys, engine: str) -> str:
    """Which engine `ENGINE=` means, and the versions installed."""
    chosen = servers.choose(engine)
    if uses_server(keys.evaluation, chosen) and servers.vllm_python() is None:
        raise ThinkSwitchError(f"the evaluation runs through a server. {servers.NO_VLLM}")
    note = "" if chosen == "vllm" else " (much slower than vLLM on real models: make setup-vllm)"
    return f"{chosen}{note}; " + ", ".join(f"{n} {v}" for n, v in versions().items())


def schema(recipe: Recipe) -> str:
    """The recipe through axolotl's own validation."""
    check_axolotl_keys(recipe)
    model, pairs = recipe.keys.pair.instruct, Path("pairs.jsonl")
    validate(iteration_config(recipe, base_model=model, pairs=pairs, here=Path(), seed=0), str(recipe.path))
    return f"{recipe.path} passes axolotl's schema"


def layout(recipe: Recipe) -> str:
    """How many processes train, and which of several GPUs a stage would leave idle."""
    model, pairs = recipe.keys.pair.instruct, Path("pairs.jsonl")
    config = iteration_config(recipe, base_model=model, pairs=pairs, here=Path(), seed=0)
    processes, gpus = spread(config, recipe.keys.axolotl_args)[2], visible_gpus()
    text = f"{processes} in training"
    if gpus < 2:
        return text
    rows = rows_of_a_step(config)
    idle = f" ({gpus} cannot share the {rows} rows of a step equally)" if processes < gpus else ""
    return f"{text}{idle}; vLLM answers prompts on {gpus} GPUs; trying λ, merging and lm-eval in process use one"


def validate(config: dict[str, Any], where: str) -> None:
    """Run axolotl's own validation. Raises `ThinkSwitchError` with its first complaint."""
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault
    from pydantic import ValidationError

    for plugin in config.get("plugins") or []:
        PluginManager.get_instance().register(plugin)
    try:
        validate_config(DictDefault(config))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ThinkSwitchError(f"{where}: axolotl refuses `{field}`: {first['msg']}") from None
    except ValueError as error:
        raise ThinkSwitchError(f"{where}: axolotl refuses it: {error}") from None


def pair(keys: ThinkSwitchKeys, seed: int = 0) -> str:
    """Hub access, and the two checkpoints' compatibility from their configs and tokenizers."""
    names = keys.pair.instruct, keys.pair.thinking
    folders = [
        described(name, revision, seed)
        for name, revision in zip(names, (keys.pair.revision_instruct, keys.pair.revision_thinking), strict=True)
    ]
    configs = [files.read_json(folder / "config.json") for folder in folders]
    for name, config in zip(names, configs, strict=True):
        if method := quantisation(config):
            raise ThinkSwitchError(quantised(name, f"its config.json has a `quantization_config` ({method})"))
    difference = config_difference(*configs, may_differ=keys.rebuild.may_differ) or vocabulary_difference(*folders)
    if difference:
        raise ThinkSwitchError(f"no compatible pair: {difference}")
    distil.require_switch(keys.pair, {mode: resolve_seed(name, seed) for mode, name in zip(MODES, names, strict=True)})
    if keys.pair.hybrid:
        return f"{keys.pair.instruct} is a hybrid; its chat template tells the two modes apart"
    alike = f"{' and '.join(names)} have one architecture, size and vocabulary"
    return "; ".join(filter(None, (alike, describe_renamed(*folders))))


def described(name: str, revision: str | None, seed: int) -> Path:
    """A folder with config and tokenizer of a checkpoint. Raises `ThinkSwitchError` if they cannot be downloaded."""
    if is_local(name):
        return Path(resolve_seed(name, seed))
    from huggingface_hub import snapshot_download

    wanted = ["*config.json", "tokenizer.json", "chat_template.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises many types; all mean no access
        raise not_fetched(name, error) from None


def training(recipe: Recipe, seed: int) -> str:
    """What the recipe would train of the instruct checkpoint, from its config and tokenizer."""
    pair = recipe.keys.pair
    distil.require_trainable(recipe, resolve_seed(pair.instruct, seed), pair.revision_instruct)
    return "the answer and the end of its turn, behind the prompt that is asked; all that LoRA is asked to reach"


def rendered_prompts(keys: ThinkSwitchKeys, seed: int = 0) -> str:
    """Two rendered prompts."""
    chosen, commit = prompts.prompts_of_iteration(keys.prompts, seed, 1)
    shown = "\n".join(f"          {prompt_id}: {text[:300]!r}" for prompt_id, text in chosen[:2])
    return f"{len(chosen)}, of commit {commit or '(a local file)'}\n{shown}"


def questions(recipe: Recipe, counted: dict[str, int], seed: int = 0) -> str:
    """The evaluation sets, and that no training prompt is in them; how many questions they have is put into `counted`."""
    keys = recipe.keys
    chosen, _ = prompts.prompts_of_iteration(keys.prompts, seed, 1)
    known, note = {}, ""
    if waiting := unanswered(keys):
        known[keys.evaluation.task] = [text for _, text in prompts.read_prompts(asking(keys.prompts, waiting), seed)[0]]
        note = "; reference answers are still missing"
    else:
        require_reference(recipe, seed)
    counted |= require_uncontaminated(chosen, keys.evaluation, known)
    loaded = "; ".join(f"{task} {'has' if task in known else 'loads,'} {n} questions" for task, n in counted.items())
    return f"{loaded}; no training prompt is in {'it' if len(counted) == 1 else 'them'}{note}"


def budget(
    keys: ThinkSwitchKeys,
    iterations: int,
    tokens_per_second: float | None,
    questions: dict[str, int],
    per_hour: str,
    known: Foretold | None = None,
) -> str:
    """Tokens at most, and the time and money that would take, with the basis of the estimate.

    Args:
        questions: of the evaluation set and the guard tasks, by task; none if they could not be loaded, or are not made yet.
    """
    parts = foretell.tokens_at_most(keys, iterations, questions)
    total = sum(parts.values())
    found = known.tokens_per_second if known else None
    rate = tokens_per_second or found or GUESSED_TOKENS_PER_SECOND
    guess = known.basis if known and found else "a guess, nobody measured this card"
    basis = "as you gave it" if tokens_per_second else guess
    hours = total / rate / 3600
    price = price_per_hour(per_hour)
    money = f", {price * hours:.2f} at {price:g} an hour" if price else "; set PRICE_PER_HOUR for the money"
    kept = f" Each token of an answer is stored with {keys.distribution.top_k} probabilities, {keys.distribution.top_k * 0.05:.2g} kB."
    kept = kept if keys.loss == "distribution" else ""
    rest = (
        "Training and merging come"
        if keys.evaluation.max_tokens and questions
        else "Evaluation, training and merging come"
    )
    listed = "\n".join(f"          {tokens:,} {what}" for what, tokens in parts.items())
    return (
        f"at most {total:,} tokens in {iterations} iteration{'s' * (iterations != 1)}; {hours:.1f} h at {rate:g} tokens/s ({basis}){money}. "
        f"{rest} on top.{kept}\n{listed}"
    )
