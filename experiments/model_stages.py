"""The columns of docs/models.md that run engines on a tiny pair: sweep by server, train, merge-lora, export, loop.

axolotl, mergekit and peft run as in the loop, in forks of a process that has imported them; vLLM is started.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from experiments.model_merges import loaded, merge_config, merged_folder, read
from experiments.model_pairs import Model
from tests import forked
from thinkswitch_plugin import files
from thinkswitch_plugin.args import EngineKeys
from thinkswitch_plugin.engines.ask import Asker, ask_in_order
from thinkswitch_plugin.engines.replies import Unanswered
from thinkswitch_plugin.errors import ThinkSwitchError
from thinkswitch_plugin.merging.compatibility import require_compatible
from thinkswitch_plugin.merging.lora import lora_target
from thinkswitch_plugin.recipe import Recipe, iteration_config, load_recipe
from thinkswitch_plugin.run import Run, processes
from thinkswitch_plugin.run.checkpoint import ADAPTER_WEIGHTS, adopt_mode
from thinkswitch_plugin.training import distil

ROOT = Path(__file__).parents[1]
RANK = 64  # no matrix of a tiny model has more
SMALL = ["--gpu-memory-utilization", "0.05", "--max-num-seqs", "4"]
TAUGHT = 0.02  # the loss of a tiny model that knows its answer
QUESTIONS = [f"{a}+{b}" for a in range(4) for b in range(4)]
Roles = dict[str, Path]


def run_engine(command: Sequence[str | Path], log: Path, *, env: Mapping[str, str] | None = None, title: str) -> float:
    """`processes.run_logged` without the start of a process. Raises `AssertionError` if the engine fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [Path(sys.executable).with_name(str(command[0])), *command[1:]]
    done = forked.run(words, ROOT, {**os.environ, **(env or {})})
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    assert done.returncode == 0, f"{title} failed: {(done.stdout + done.stderr)[-1500:]}"
    return 0.0


processes.run_logged = run_engine


def recipe_for(instruct: Path) -> Recipe:
    """The recipe of the demo domain, shortened, with the experts that a refusal of it would name."""
    from thinkswitch_plugin.training.reach import find_experts

    recipe = load_recipe(ROOT / "recipes" / "arithmetic.yaml")
    values = {**recipe.axolotl, "num_epochs": 2, "micro_batch_size": 4, "logging_steps": 1}
    if experts := find_experts(instruct):
        values["lora_target_parameters"] = list(experts.names)
    return replace(recipe, axolotl=values)


def sweep_by_server(model: Model, roles: Roles, folder: Path) -> None:
    """A point of a sweep in a running vLLM: it is given what the merge on disk holds, and answers as that does."""
    from thinkswitch_plugin.engines.embedded import EmbeddedEngine
    from thinkswitch_plugin.engines.live_worker import Digest, of_folder
    from thinkswitch_plugin.merging.holding import Live, MergeJob, holding
    from thinkswitch_plugin.merging.in_memory import load

    require_compatible(roles["instruct"], roles["thinking"])
    keys, work = EngineKeys.model_validate({"vllm_args": SMALL}), folder / "server"
    job = MergeJob(roles["thinking"], roles["thinking"], keys, work, work / "vllm.log", batch=1, budget=8)
    with holding("vllm", job) as holder:
        assert isinstance(holder, Live)
        engine = holder.hold(merge_config(roles))
        engine.count_digests = True
        answers = first_tokens(engine)
    merged = merged_folder(model, roles, folder)
    counted = Digest()
    list(counted.of(of_folder(str(merged))))
    assert engine.digests == [str(counted)], f"the server was given {engine.digests}, the merge on disk is {counted}"
    expected = first_tokens(EmbeddedEngine(roles["thinking"], load(merged, {}, device="cpu")))
    assert answers == expected, f"the server answers {answers}, transformers {expected}"


def first_tokens(asker: Asker) -> list[str]:
    """What a checkpoint writes first to a few questions."""
    bodies = [
        {"messages": [{"role": "user", "content": q}], "max_tokens": 8, "temperature": 0, "stop": ["<|im_end|>"]}
        for q in QUESTIONS[:4]
    ]
    replies = ask_in_order(asker, bodies)
    if refused := next((reply for reply in replies if isinstance(reply, Unanswered)), None):
        raise ThinkSwitchError(f"The server answers no request: {refused}.")
    return [str(reply["choices"][0]["message"]["content"]) for reply in replies if isinstance(reply, dict)]


def train(model: Model, roles: Roles, folder: Path) -> None:
    """`thinkswitch train`: the adapter has moved, and every loss is finite."""
    require_compatible(roles["instruct"], roles["thinking"])
    recipe = recipe_for(roles["instruct"])
    distil.require_trainable(recipe, str(roles["instruct"]))
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": str(len(q))}] for q in QUESTIONS]
    files.write_jsonl(folder / "pairs.jsonl", [{"messages": turns} for turns in rows])
    config = iteration_config(
        recipe,
        base_model=str(roles["instruct"]),
        pairs=folder / "pairs.jsonl",
        here=folder,
        seed=0,
    )
    distil.train(config, folder, options=(), minimum=1e-4)
    log = (folder / "logs" / "train.log").read_text(encoding="utf-8")
    losses = [float(text) for text in re.findall(r"'(?:train_)?loss': '?([\w.+-]+)", log)]
    assert losses and all(map(math.isfinite, losses)), f"losses are {losses}"


def merge_lora(model: Model, roles: Roles, folder: Path) -> None:
    """`thinkswitch merge-lora`: every matrix is its parent's plus its LoRA, all else is as it was, and it loads."""
    from thinkswitch_plugin.loop.work import merge_adapter

    if not (folder / "adapter").is_dir():
        train(model, roles, folder)
    parent, out = roles["instruct"], folder / "distilled"
    merge_adapter(folder, str(parent), out)
    before, after, adapter = read(parent), read(out), load_file(str(folder / "adapter" / ADAPTER_WEIGHTS))
    as_loaded = loaded(out).state_dict()
    if not any(lora_target(name) in before for name in adapter):  # a vision-language model is stored under other names
        before, after = loaded(parent).state_dict(), as_loaded
    settings = files.read_json(folder / "adapter" / "adapter_config.json")
    scale = settings["lora_alpha"] / settings["r"]
    trained, moved = set(), set()
    for name, down in adapter.items():
        target = lora_target(name)
        if ".lora_A." in name and target in before:
            up = adapter[name.replace(".lora_A.", ".lora_B.")]
            expected = before[target].double() + scale * up.double() @ down.double()
            assert torch.allclose(after[target].double(), expected, atol=1e-5), (
                f"{target} is not its parent plus its LoRA"
            )
            trained.add(target)
            moved |= {target} if bool(up.any()) else set()  # no text reaches the LoRAs of a vision tower
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved, "the adapter names none of the checkpoint's matrices"
    assert moved <= changed, f"{sorted(moved - changed)[:3]} did not change"
    assert all("expert" in name for name in changed - trained), f"{sorted(changed - trained)[:3]} changed"


def export(model: Model, roles: Roles, folder: Path) -> None:
    """`thinkswitch export-loras` at full rank: base and adapter give the checkpoint, but for the loss that is stated."""
    from thinkswitch_plugin.engines.embedded import with_adapter
    from thinkswitch_plugin.export.extract import cut, extract, losses, require_extractable

    base, checkpoint = roles["instruct"], roles["thinking"]
    require_compatible(base, checkpoint)
    require_extractable(base, checkpoint)
    extract(base, checkpoint, folder / "extracted", RANK, folder / "logs" / "extract.log")
    cut(folder / "extracted", folder / "lora", RANK, base=str(base), revision=None)
    (stated,) = losses(base, checkpoint, [folder / "lora"])
    assert stated["error_in_matrices"] < 1e-3, f"at full rank the matrices are off by {stated['error_in_matrices']:.1g}"
    merged: Any = with_adapter(base, folder / "lora")
    state = merged.merge_and_unload().state_dict()
    plain = type(merged.base_model.model)
    one, other = (plain.from_pretrained(path, dtype="auto").state_dict() for path in (base, checkpoint))
    names = {tensor.data_ptr(): name for name, tensor in other.items()}.values()  # a tied head counts once
    found = math.sqrt(sum(float((other[n] - state[n]).double().square().sum()) for n in names))
    whole = math.sqrt(sum(float((other[n] - one[n]).double().square().sum()) for n in names))
    assert abs(found / whole - stated["error"]) < 0.05, f"{found / whole:.3f} is lost, not {stated['error']:.3f}"


def teach(checkpoint: Path, out: Path, answer: str) -> None:
    """A copy of a checkpoint that gives the same answer to every question."""
    from transformers import AutoTokenizer

    from thinkswitch_plugin.merging.layout import model_class

    kind = model_class(checkpoint)
    assert kind is not None
    network = kind.from_pretrained(checkpoint, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in QUESTIONS
    ]
    ids = tokenizer([prompt + answer for prompt in prompts], return_tensors="pt", add_special_tokens=False).input_ids
    labels = ids.clone()
    labels[:, : -len(tokenizer(answer, add_special_tokens=False).input_ids)] = -100
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(150):
        loss = network(input_ids=ids, labels=labels).loss
        if loss.item() < TAUGHT:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 2 * TAUGHT, f"the tiny model did not learn its answer: {loss.item():.2f}"
    network.save_pretrained(out)
    adopt_mode(checkpoint, out)


def loop(model: Model, roles: Roles, folder: Path) -> None:
    """One iteration of every stage with a thinking checkpoint that thinks, by the functions that `make iterate` calls."""
    from thinkswitch_plugin.loop import work

    require_compatible(roles["instruct"], roles["thinking"])
    distil.require_trainable(recipe_for(roles["instruct"]), str(roles["instruct"]))
    teach(roles["instruct"], folder / "start" / "instruct", "7<|im_end|>")
    teach(roles["thinking"], folder / "start" / "thinking", "1</think>\n\n8<|im_end|>")
    recipe = recipe_for(roles["instruct"])
    files.write_jsonl(folder / "prompts.jsonl", [{"prompt": question} for question in QUESTIONS])
    own = recipe.keys
    keys = own.model_copy(
        update={
            "pair": own.pair.model_copy(
                update={"demo": False, "base": None}
                | {mode: str(folder / "start" / mode) for mode in ("instruct", "thinking")}
            ),
            "prompts": own.prompts.model_copy(
                update={"path": str(folder / "prompts.jsonl"), "count": len(QUESTIONS), "fresh": False}
            ),
            "sampling": own.sampling.model_copy(update={"max_tokens": 16}),
            "evaluation": own.evaluation.model_copy(update={"limit": 8, "max_tokens": 16}),
        }
    )
    run = Run(folder / "run", replace(recipe, keys=keys), 0, "embedded", 1)
    (run.folder / "iter-1" / "logs").mkdir(parents=True)
    work.prepare_pair(run)
    for stage in (
        work.write_requests,
        work.answer_requests,
        work.build_pairs,
        work.train,
        work.merge_lora,
        work.rebuild,
    ):
        stage(run, 1)
    for mode in ("instruct", "thinking"):
        work.evaluate(run, 1, mode)
    found = files.read_json(run.iteration(1) / "pairs.json")
    assert found["kept"] == len(QUESTIONS), f"pairs.json says {found}"
